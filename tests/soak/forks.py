"""Runs in forked children, alone or as a team: what is imported once serves many runs, and each can be killed.

Fork only from a process of one thread, that is from a script and not from a test.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from alphaquant.errors import AlphaQuantError
from alphaquant.pipeline.distributed import Team

if TYPE_CHECKING:
    from collections.abc import Callable

OWN_ERROR = 2
_PATIENCE = 60.0  # seconds in which a team must notice that one of it is gone


def start(work: Callable[[Team], None], size: int = 1) -> list[int]:
    """Fork a team of children that do the work; returns their numbers, by rank, when they have met.

    Whoever waits for one that is killed while they meet may wait for ever: that is the launcher's to tell.
    """
    store = Path(tempfile.mkdtemp()) / "store"
    children = [_fork(work, rank, size, store) for rank in range(size)]
    end = time.monotonic() + _PATIENCE
    while size > 1 and time.monotonic() < end and not all(_met(store, rank).exists() for rank in range(size)):
        time.sleep(0.002)
    return children


def _met(store: Path, rank: int) -> Path:
    return store.with_name(f"met-{rank}")


def _fork(work: Callable[[Team], None], rank: int, size: int, store: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        if size > 1:
            _meet(store, rank, size)
            _met(store, rank).touch()
        work(Team(rank, size))
        os._exit(0)
    except AlphaQuantError as error:
        sys.stderr.write(f"process {rank}: {error}\n")
        os._exit(OWN_ERROR)
    except BaseException:  # noqa: BLE001  (a child must never return into its parent's code)
        traceback.print_exc()
        os._exit(1)


def _meet(store: Path, rank: int, size: int) -> None:
    """Join a team, with some patience."""
    try:
        patience = timedelta(seconds=_PATIENCE / 4)
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size, timeout=patience)
    except RuntimeError as error:
        raise AlphaQuantError(f"the others did not come: {error}") from error


def wait(children: list[int]) -> list[int]:
    """How each child ended: 0 well, 2 by one of our errors, -9 killed.

    Raises:
        AssertionError: the others did not notice within a minute that one of them is gone, or one broke down.
    """
    codes: dict[int, int] = {}
    failed_at = None
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _PATIENCE:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
            raise AssertionError("a process of the team ended, and the others went on for a minute")
        time.sleep(0.005)
    assert set(codes.values()) <= {0, OWN_ERROR, -signal.SIGKILL}, f"a run broke down: {codes}"
    return [codes[child] for child in children]


def result_of(out: Path) -> dict[str, bytes]:
    """The bytes of everything that a run is a function of nothing but its inputs for."""
    files = {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*")) if p.is_file()}
    passing = ("report.json", "manifest.json", "lock")
    return {name: path.read_bytes() for name, path in files.items() if path.name not in passing}
