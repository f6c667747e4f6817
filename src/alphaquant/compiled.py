"""Loops in C: compiled by the machine's own C compiler when they are first needed, and kept in the user's cache.

Their work is shared among threads by parts that do not touch each other, so that threads change no bit.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["blocks_of", "leave_threads", "library", "run_parts"]

_HEADERS = [Path(__file__).with_name(name) for name in ("parts.h", "tiles.h")]  # which they include
_COMPILERS = ("cc", "gcc", "clang")
# without contraction a product and a sum are rounded one by one, as in torch
_FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-fPIC", "-shared")
_PROCESS = os.getpid()
_WORTH_A_THREAD = 1 << 16  # nanoseconds of work, about: with less, calling one takes longer than it saves


class _Given(ctypes.Union):
    """What a function is given, as in `parts.h`."""

    _fields_ = (("pointer", ctypes.c_void_p), ("integer", ctypes.c_int64), ("real", ctypes.c_float))


class _OpenMP(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("parallel", "number", "count"))


def run_parts(
    source: Path,
    name: str,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float | ctypes.Structure],
    total: int,
    cost: float,
) -> None:
    """Let a function do `total` parts of its work, by as many threads as torch would.

    Args:
        source: where the function is written; `library` must have made it.
        name: of the function.
        tensors: contiguous; the function is given where they lie.
        numbers: what it is given after them: integers, floats, and where structures lie.
        total: parts.
        cost: nanoseconds that a part takes, about.
    """
    assert all(x is None or x.is_contiguous() for x in tensors)
    loaded = library(source)
    assert loaded is not None
    work = getattr(loaded, name)
    values = [*(_Given(pointer=None if x is None else x.data_ptr()) for x in tensors), *map(_given, numbers)]
    given = (_Given * len(values))(*values)
    num_threads = max(1, min(torch.get_num_threads(), total, int(total * cost) // _WORTH_A_THREAD))
    openmp = _openmp() if num_threads > 1 else None
    if openmp is not None:
        loaded.share_work(work, given, ctypes.c_int64(total), ctypes.c_int64(num_threads), ctypes.byref(openmp))
        return
    ends = [total * part // num_threads for part in range(num_threads + 1)]

    def part(index: int) -> None:  # the library is called without Python's lock
        work(given, ctypes.c_int64(ends[index]), ctypes.c_int64(ends[index + 1]))

    others = [_threads().submit(part, index) for index in range(1, num_threads)]
    part(0)
    for other in others:
        other.result()


def _given(number: float | ctypes.Structure) -> _Given:
    if isinstance(number, ctypes.Structure):
        return _Given(pointer=ctypes.addressof(number))
    return _Given(integer=number) if isinstance(number, int) else _Given(real=number)


def blocks_of(counts_E: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are sorted by expert, in blocks of one expert: its number, and where a block begins and ends.

    The last block of an expert may be short; one without rows has none.
    """
    ends_E, blocks_E = counts_E.cumsum(0), (counts_E + size - 1) // size
    expert_S = torch.arange(len(counts_E)).repeat_interleave(blocks_E)
    first_E = blocks_E.cumsum(0) - blocks_E
    begin_S = (ends_E - counts_E)[expert_S] + size * (torch.arange(len(expert_S)) - first_E[expert_S])
    return expert_S, begin_S, torch.minimum(begin_S + size, ends_E[expert_S])


def leave_threads() -> None:
    """Let torch work in the calling thread alone from now on.

    As soon as a second thread shares its work, too, OpenMP counts more threads than there are cores, and no thread of
    either waits awake any more: every shared step of both, however small, takes 30 microseconds longer.
    """
    torch.get_num_threads()  # else torch sets the number anew when it first shares something
    with suppress(AttributeError, TypeError, OSError):
        ctypes.CDLL(None).omp_set_num_threads(1)


@cache
def _openmp() -> _OpenMP | None:
    """OpenMP's functions as torch has loaded them; None where there are none, or threads would not survive a fork."""
    if os.getpid() != _PROCESS:
        return None
    try:
        loaded = ctypes.CDLL(None)
        functions = [getattr(loaded, name) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
    except (AttributeError, TypeError, OSError):
        return None
    return _OpenMP(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))


@cache
def _threads() -> ThreadPoolExecutor:
    """Threads that are kept, where OpenMP has none: starting one takes as long as many a call."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="alphaquant-loops")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
    os.register_at_fork(after_in_child=_openmp.cache_clear)


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """What a C file compiles to; None where no compiler works."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None
    text = b"\0".join(path.read_bytes() for path in (source, *_HEADERS))
    for flags in ((*_FLAGS, "-march=native"), _FLAGS):  # not every compiler knows every machine
        key = hashlib.sha256(b"\0".join([text, repr((compiler, flags, _machine())).encode()])).hexdigest()[:16]
        try:
            return ctypes.CDLL(str(_compiled(compiler, flags, source, f"native-{key}.so")))
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def _machine() -> str:
    """What `-march=native` depends on: a home directory may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


def _compiled(compiler: str, flags: Sequence[str], source: Path, name: str) -> Path:
    """The library in the user's cache, made where it is not there; in a directory of this process where none can be.

    Raises:
        OSError: there is no place for it.
        CalledProcessError: the compiler refuses.
    """
    folder = Path.home() / ".cache" / "alphaquant"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_ours = os.access(folder, os.W_OK) and (os.name != "posix" or folder.stat().st_uid == os.geteuid())
    except (OSError, RuntimeError):
        is_ours = False
    if not is_ours:
        folder = Path(tempfile.mkdtemp(prefix="alphaquant-"))
    made = folder / name
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / name
            subprocess.run([compiler, *flags, str(source), "-o", str(fresh)], check=True, capture_output=True)  # noqa: S603
            fresh.replace(made)
    return made
