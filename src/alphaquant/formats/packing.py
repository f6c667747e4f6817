"""Codes of b bits as one dense little-endian bit stream a row: code i takes bits [i*b, i*b+b), low bits first.

The same stream serves compressed-tensors, humming and GPTQ checkpoints; in int32 words a code may straddle two.
Eight codes fill b whole bytes: as an int64 word of eight lanes they move together in three steps, pairs to pairs of
pairs to all eight, each for all words at once. Little-endian hosts only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from alphaquant.errors import AlphaQuantError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["pack_int32", "pack_rows", "unpack_int32", "unpack_rows"]

_LANES = 8  # codes a word
_CHUNK_WORDS = 1 << 15  # worked on at a time by a CPU: a quarter MiB stays in its cache


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., R, N] into uint8 [..., R, ceil(N * bits / 8)]; every row starts on a byte.

    Raises:
        AlphaQuantError: ``bits`` is not 1 to 8, or a code does not fit (it would spoil its neighbours).
    """
    _check_bits(bits)
    _check_dtype(codes, torch.uint8)
    if codes.numel() and int(codes.max()) >> bits:
        raise AlphaQuantError(f"code {int(codes.max())} does not fit {bits} bits", remedy="pack with the format's bits")
    if bits == _LANES:
        return codes.clone(memory_format=torch.contiguous_format)
    n = codes.shape[-1]
    lanes = _padded(codes, _LANES).contiguous()
    words = lanes.reshape(-1).view(torch.int64)
    packed = torch.empty((len(words), bits), dtype=torch.uint8, device=codes.device)
    for part, target in zip(_chunks(words), _chunks(packed), strict=True):
        word = part.clone()
        for shift, low, high in _steps(bits):
            moved = word.bitwise_right_shift(shift).bitwise_and_(high)
            word.bitwise_and_(low).bitwise_or_(moved)
        target.copy_(word[:, None].view(torch.uint8)[:, :bits])
    packed = packed.reshape(*lanes.shape[:-1], lanes.shape[-1] // _LANES * bits)
    return packed[..., : _num_units(n, bits, 8)].contiguous()


def unpack_rows(packed: Tensor, bits: int, n: int) -> Tensor:
    """The ``n`` codes of every row, uint8 [..., R, n], of uint8 [..., R, ceil(n * bits / 8)].

    Raises:
        AlphaQuantError: ``bits`` is not 1 to 8, or the rows have another length.
    """
    _check_bits(bits)
    _check_dtype(packed, torch.uint8)
    _check_length(packed, bits, n, unit_bits=8)
    return _unpack_bytes(packed, bits, n)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., R, N] into int32 [..., R, ceil(N * bits / 32)], the last word padded with zeros.

    Raises:
        AlphaQuantError: as ``pack_rows``.
    """
    packed = pack_rows(codes, bits)
    return _reinterpret(_padded(packed, 4), torch.int32)


def unpack_int32(packed: Tensor, bits: int, n: int) -> Tensor:
    """The ``n`` codes of every row, uint8 [..., R, n], of int32 [..., R, ceil(n * bits / 32)].

    Raises:
        AlphaQuantError: as ``unpack_rows``.
    """
    _check_bits(bits)
    _check_dtype(packed, torch.int32)
    _check_length(packed, bits, n, unit_bits=32)
    return _unpack_bytes(_reinterpret(packed, torch.uint8), bits, n)


def _unpack_bytes(packed: Tensor, bits: int, n: int) -> Tensor:
    packed = packed[..., : _num_units(n, bits, 8)]
    if bits == _LANES:
        return packed.clone(memory_format=torch.contiguous_format)
    padded = _padded(packed, bits).contiguous()
    fields = padded.reshape(-1, bits)
    words = torch.zeros(len(fields), dtype=torch.int64, device=packed.device)
    for part, target in zip(_chunks(fields), _chunks(words), strict=True):
        target[:, None].view(torch.uint8)[:, :bits] = part
        for shift, low, high in reversed(_steps(bits)):
            moved = target.bitwise_and(high).bitwise_left_shift_(shift)
            target.bitwise_and_(low).bitwise_or_(moved)
    codes = words.view(torch.uint8).reshape(*padded.shape[:-1], padded.shape[-1] // bits * _LANES)
    return codes[..., :n].contiguous()


def _padded(x: Tensor, multiple: int) -> Tensor:
    """Zeros behind the last dimension, up to a multiple; nothing is copied where there is nothing to add."""
    missing = -x.shape[-1] % multiple
    return functional.pad(x, (0, missing)) if missing else x


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """How the upper of every two lanes joins the lower, lanes of 8, 16 and 32 bits: shift, and masks of the two."""
    steps = []
    for width in (8, 16, 32):
        used = width // 8 * bits
        low = sum(((1 << used) - 1) << at for at in range(0, 64, 2 * width))
        steps.append((width - used, low, low << used))
    return steps


def _chunks(rows: Tensor) -> Sequence[Tensor]:
    return torch.split(rows, _CHUNK_WORDS if rows.device.type == "cpu" else max(1, len(rows)))


def _reinterpret(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` with the bytes of its last dimension read as ``dtype``; flat first, since view objects to odd strides."""
    width = x.shape[-1] * x.element_size() // dtype.itemsize
    return x.reshape(-1).view(dtype).reshape(*x.shape[:-1], width)


def _num_units(n: int, bits: int, unit_bits: int) -> int:
    return -(-n * bits // unit_bits)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise AlphaQuantError(f"cannot pack codes of {bits} bits", remedy="use 1 to 8 bits")


def _check_dtype(tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise AlphaQuantError(f"expected {dtype}, got {tensor.dtype}", remedy=f"pass a tensor of {dtype}")


def _check_length(packed: Tensor, bits: int, n: int, *, unit_bits: int) -> None:
    expected = _num_units(n, bits, unit_bits)
    if packed.shape[-1] != expected:
        raise AlphaQuantError(
            f"rows of {packed.shape[-1]} {packed.dtype} elements cannot hold {n} codes of {bits} bits",
            remedy=f"{expected} elements a row are expected; check the bits and the shape",
        )
