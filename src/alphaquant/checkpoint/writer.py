"""Atomic files: a safetensors shard streamed and hashed as it is written, and small JSON, text and byte files.

Each is written to ``<name>.tmp``, synced and renamed, so that a file with its final name is whole: a run that is
killed at any moment resumes from what it finds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from alphaquant.checkpoint.shard import CHUNK_BYTES, DTYPES, iter_chunks, unreadable
from alphaquant.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

__all__ = [
    "ShardInfo",
    "copy_file",
    "sync_directory",
    "write_bytes",
    "write_index",
    "write_json",
    "write_shard",
    "write_text",
]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPIED_BYTES = 1 << 20  # at a time: they stay in the processor's cache
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A written shard: file name, size in bytes, sha256 of the whole file, and its tensors in file order."""

    name: str
    num_bytes: int
    sha256: str
    tensor_names: tuple[str, ...]


def write_shard(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    after_part: Callable[[], None] = lambda: None,
) -> ShardInfo:
    """Write a safetensors file, byte for byte the same for the same tensors and metadata.

    Tensors may lie on any device and have any strides; at most 16 MiB of them are copied at a time, and `after_part`
    is called behind each.

    Raises:
        OutputError: the file cannot be written (a full disk is named as such), or a tensor's dtype or name does not
            go into a safetensors file. Nothing is left behind.
    """
    path = Path(path)
    # Wide types first, as the safetensors library does: each tensor is then aligned to its own type.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header = _encode_header(path, {name: tensors[name] for name in order}, metadata)
    sha256 = hashlib.sha256(header)
    num_bytes = len(header)
    with _atomic_file(path) as file:
        file.write(header)
        for name in order:
            tensor = tensors[name].detach()
            for part in iter_chunks(tensor, CHUNK_BYTES // tensor.itemsize):
                data = part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                sha256.update(data)
                num_bytes += len(data)
                after_part()
    return ShardInfo(path.name, num_bytes, sha256.hexdigest(), tuple(order))


def write_index(path: str | Path, weight_map: Mapping[str, str], total_size: int) -> str:
    """Write ``model.safetensors.index.json``: the shard of each tensor, and the bytes of all tensors.

    Returns:
        The sha256 of the file.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_json(path, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: str | Path, obj: Any, *, allow_nan: bool = False) -> str:
    """Write an object as indented JSON, keys in their own order.

    Args:
        path: the file.
        obj: what ``json.dumps`` takes.
        allow_nan: write NaN and infinities as Python does; some models' config.json hold them.

    Returns:
        The sha256 of the file.

    Raises:
        OutputError: the file cannot be written.
        ValueError: a number is NaN or infinite, which JSON does not know.
    """
    return write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n")


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's bytes.

    Raises:
        CheckpointError: the source cannot be read.
        OutputError: the file cannot be written.
    """
    try:
        file = source.open("rb", buffering=0)
    except OSError as error:
        raise unreadable(source, error) from error
    piece = memoryview(bytearray(_COPIED_BYTES))
    with file, _atomic_file(path) as copy:
        while count := file.readinto(piece):
            copy.write(piece[:count])


def write_text(path: str | Path, text: str) -> str:
    """Write a text as UTF-8; returns the sha256 of the file.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> str:
    """Write a file's bytes; returns their sha256.

    Raises:
        OutputError: the file cannot be written.
    """
    with _atomic_file(Path(path)) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name only when it is complete and on the disk; on any failure nothing is left."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(path, error) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory last, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot sync a directory say so with EINVAL
            raise
    finally:
        os.close(descriptor)


def _encode_header(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or name == "__metadata__":
            raise OutputError(
                f"tensor {name!r} of dtype {str(tensor.dtype).removeprefix('torch.')} does not go into a safetensors "
                "file",
                where=str(path),
                remedy=f"dtypes that are written: {', '.join(DTYPES)}; '__metadata__' is no tensor's name",
            )
        end = start + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _unwritable(path: Path, error: OSError) -> OutputError:
    if error.errno in _DISK_FULL:
        return OutputError(
            f"the disk is full: {path.name} cannot be written",
            where=str(path),
            remedy="free space, or give another output directory; a stopped run resumes where it was",
        )
    return OutputError(
        f"{path.name} cannot be written: {error.strerror or error}",
        where=str(path),
        remedy="check that the output directory exists and may be written",
    )
