"""How products are computed on a CPU, where fp32 is several times slower than bf16."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["bf16_products", "give_back_freed_memory", "keep_freed_memory", "rough_product"]


@contextmanager
def bf16_products(like: Tensor) -> Iterator[None]:
    """Let fp32 products of a block round their operands to bf16 and sum in fp32, where `like` is bf16 on a CPU.

    Nothing is lost for operands that came from bf16. Elsewhere products stay as they are.
    """
    before = torch.get_float32_matmul_precision()
    if like.dtype is torch.bfloat16 and like.device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rough_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32, where two digits will do: in bf16 on a CPU with AMX, seven times as fast."""
    if a.device.type == "cpu" and _has_amx():
        return (a.bfloat16() @ b.bfloat16()).float()
    return a @ b


@cache
def _has_amx() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and bool(probe())


def keep_freed_memory() -> None:
    """Let the C library reuse freed blocks instead of giving them back; for a command, which owns its process.

    By default glibc maps and unmaps every large tensor, and the kernel clears each page anew: a fifth of the time of
    a run on a small model.
    """
    _set_thresholds(trim=(1 << 31) - 1, mmap=1 << 30)


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory`: a freed tensor takes no memory any more, at some cost of time."""
    _set_thresholds(trim=1 << 17, mmap=1 << 20)


def _set_thresholds(trim: int, mmap: int) -> None:
    trim_threshold, mmap_threshold = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, trim)
        mallopt(mmap_threshold, mmap)
