"""One safetensors file: its header, checked, and its tensors, read without mmap.

Mapped pages count as resident memory, and the promise is the memory of one layer: a tensor is read with
``preadv`` straight into the memory that will hold it. The format is the one of
https://github.com/huggingface/safetensors#format; headers are untrusted and every field is checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alphaquant.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

__all__ = [
    "CHUNK_BYTES",
    "DAMAGED",
    "DTYPES",
    "MAX_HEADER_BYTES",
    "Shard",
    "Slot",
    "TensorInfo",
    "iter_chunks",
    "load_shard",
    "read_header",
    "read_into",
    "read_slot",
    "unreadable",
]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

CHUNK_BYTES = 16 << 20  # of a temporary, where bytes cannot go straight to their place
MAX_HEADER_BYTES = 25_000_000  # of 200,000 tensors; parsed, JSON takes up to thirty times its size
DAMAGED = "the file is damaged or incomplete: download or save it again"
_MAX_DIMS = 64
_MAX_READ_BYTES = 1 << 30  # one system call reads at most 2 GiB less a page


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says of one tensor; ``num_bytes`` is its size in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor and the place of its first byte."""

    info: TensorInfo
    path: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its tensors, its size in bytes and the sha256 of its header."""

    path: Path
    slots: dict[str, Slot]
    num_bytes: int
    header_sha256: str


def iter_chunks(tensor: Tensor, max_elements: int) -> Iterator[Tensor]:
    """Views of at most ``max_elements`` elements that cover a tensor in row-major order, whatever its strides."""
    if tensor.numel() == 0:
        return
    if tensor.numel() <= max_elements or tensor.dim() == 0:
        yield tensor
        return
    row_elements = tensor.numel() // tensor.shape[0]
    if row_elements > max_elements:
        for row in tensor:
            yield from iter_chunks(row, max_elements)
    else:
        num_rows = max_elements // row_elements
        for start in range(0, tensor.shape[0], num_rows):
            yield tensor[start : start + num_rows]


def load_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read, is cut, or its header is wrong in any way.
    """
    try:
        with path.open("rb") as file:
            return read_header(file, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise unreadable(path, error) from error


def read_header(file: BinaryIO, num_bytes: int, path: Path) -> Shard:
    """Read and check the header that a file of `num_bytes` begins with; `path` is where its tensors are, or would be.

    Raises:
        CheckpointError: the file is cut, or its header is wrong in any way.
    """
    length_field = file.read(8)
    length = int.from_bytes(length_field, "little")
    if len(length_field) < 8 or length > min(MAX_HEADER_BYTES, num_bytes - 8):
        raise _broken(path, f"a header of {length} bytes is announced in a file of {num_bytes}")
    header = file.read(length)
    if len(header) < length:
        raise _broken(path, f"the file ends inside its header, after {len(header)} of {length} bytes")
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"the header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise _broken(path, "the header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "__metadata__ is no object of strings")
    data_start = 8 + length
    slots = {name: _parse_entry(path, name, entry, data_start) for name, entry in entries.items()}
    _check_layout(path, slots, data_start, num_bytes)
    return Shard(path, slots, num_bytes, hashlib.sha256(header).hexdigest())


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> Slot:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _broken(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"tensor {name!r} has the dtype {entry['dtype']!r}, which is not read",
            where=str(path),
            remedy=f"dtypes that are read: {', '.join(DTYPES)}; save the model in one of them",
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    # The product is bounded with zeros counted as ones, since torch computes strides in 64 bits.
    if not _are_counts(shape) or len(shape) > _MAX_DIMS or math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise _broken(path, f"tensor {name!r} has the impossible shape {str(shape)[:200]}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"tensor {name!r} has the impossible data_offsets {str(offsets)[:200]}")
    start, end = offsets
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - start != num_bytes:
        raise _broken(path, f"tensor {name!r} takes {num_bytes} bytes by dtype and shape, {end - start} by its offsets")
    return Slot(TensorInfo(name, dtype, tuple(shape), num_bytes), path, data_start + start)


def _check_layout(path: Path, slots: dict[str, Slot], data_start: int, file_bytes: int) -> None:
    """Tensors must follow one another without gap or overlap, from the header to the end of the file."""
    position = data_start
    for slot in sorted(slots.values(), key=lambda slot: (slot.offset, slot.info.num_bytes)):
        if slot.offset != position:
            fault = "overlaps the one before it" if slot.offset < position else "leaves a gap before it"
            raise _broken(path, f"tensor {slot.info.name!r} {fault}")
        position += slot.info.num_bytes
        if position > file_bytes:
            raise _broken(path, f"tensor {slot.info.name!r} ends at byte {position} of a file of {file_bytes}")
    if position != file_bytes:
        raise _broken(path, f"{file_bytes - position} bytes after the last tensor belong to none")


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} occurs twice")
    return result


def read_slot(slot: Slot) -> Tensor:
    """Read one tensor, in its stored dtype, to the CPU.

    Raises:
        CheckpointError: the file cannot be read, or was cut since its header was read.
    """
    out = torch.empty(slot.info.shape, dtype=slot.info.dtype)
    read_into(slot, out)
    return out


def read_rows(slot: Slot, rows: range) -> Tensor:
    """Read some consecutive rows of a tensor, in its stored dtype, to the CPU.

    Raises:
        CheckpointError: the file cannot be read, or was cut since its header was read.
    """
    info = slot.info
    row_bytes = info.num_bytes // max(1, info.shape[0])
    part = TensorInfo(info.name, info.dtype, (len(rows), *info.shape[1:]), len(rows) * row_bytes)
    return read_slot(Slot(part, slot.path, slot.offset + rows.start * row_bytes))


def read_into(slot: Slot, out: Tensor) -> None:
    """Read one tensor into ``out``, of its shape and of any dtype, strides and device.

    Raises:
        CheckpointError: the file cannot be read, or was cut since its header was read.
    """
    info, offset, out = slot.info, slot.offset, out.detach()
    try:
        # Opened for each read: no handle is shared between threads, and none is left open.
        with slot.path.open("rb", buffering=0) as file:
            if out.dtype == info.dtype and out.device.type == "cpu" and out.is_contiguous():
                _fill(file.fileno(), slot, offset, out)
                return
            max_elements = CHUNK_BYTES // info.dtype.itemsize
            buffer = torch.empty(min(out.numel(), max_elements), dtype=info.dtype)
            for part in iter_chunks(out, max_elements):
                stored = buffer[: part.numel()].view(part.shape)
                _fill(file.fileno(), slot, offset, stored)
                part.copy_(stored)
                offset += stored.nbytes
    except OSError as error:
        raise unreadable(slot.path, error) from error


def _fill(descriptor: int, slot: Slot, offset: int, out: Tensor) -> None:
    """Read the bytes from ``offset`` on into the memory of a contiguous CPU tensor."""
    if out.numel() == 0:
        return
    memory = out.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done : done + _MAX_READ_BYTES]], offset + done)
        if count == 0:
            raise _broken(slot.path, f"the file ends inside tensor {slot.info.name!r}: it was cut since it was opened")
        done += count


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is no valid safetensors file: {what}", where=str(path), remedy=DAMAGED)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system does not let us read."""
    return CheckpointError(
        f"{path.name} cannot be read: {error.strerror or error}",
        where=str(path),
        remedy="check the file and its rights",
    )
