"""What a forward pass does between its products, in C, for bf16 on a CPU: norms, rotations, softmax, sums of experts.

torch takes several passes over memory for each of them, which on narrow models is most of a forward pass. Where the CPU
has AMX, attention and the products of narrow experts go through its tiles too. Each function of `native.c` does what
the torch code where it is called does, with fewer roundings on the way.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alphaquant.compiled import blocks_of, library, run_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "attends",
    "attention",
    "combine",
    "expert_products",
    "fits",
    "has_tiles",
    "multiplies",
    "rms_norm",
    "rotate",
    "softmax",
    "swiglu",
]

_SOURCE = Path(__file__).with_name("native.c")
_LANES = 16  # numbers that are worked on together
_STEP = 32  # numbers that a product of tiles sums over
_WIDEST = 1024  # inputs, as in native.c
_NARROW = 1 << 18  # weights of an expert, beyond which the library's products are faster
_VALUE = 0.5  # nanoseconds that a number takes, about
_PRODUCT = 256  # terms of a product in tiles a nanosecond


def fits(*tensors: Tensor, width: int = _LANES) -> bool:
    """Whether the functions take such tensors: bf16 on a CPU, contiguous, rows of `width` a multiple of 16.

    Not where something is differentiated, or where there is no C compiler.
    """
    return (
        width % _LANES == 0
        and not torch.is_grad_enabled()
        and all(x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.is_contiguous() for x in tensors)
        and library(_SOURCE) is not None
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis."""
    size = x.shape[-1]
    out = torch.empty_like(x)
    _run("rms_norm", (x, weight, out), (size,), x.numel() // size, size, eps)
    return out


def rotate(x_BLHC: Tensor, cosine_LC: Tensor, sine_LC: Tensor) -> Tensor:
    """Heads turned by halves, as many channels as the fp32 tables have; `[B, H, L, C]`, contiguous."""
    batch, length, heads, channels = x_BLHC.shape
    out_BHLC = x_BLHC.new_empty(batch, heads, length, channels)
    sizes = (length, heads, channels, cosine_LC.shape[-1])
    _run("rotate", (x_BLHC, cosine_LC, sine_LC, out_BHLC), sizes, batch * length, heads * channels)
    return out_BHLC


@cache
def has_tiles() -> bool:
    """Whether attention goes through tiles of bf16 (Intel AMX): the compiler knows them and the kernel grants them."""
    request = getattr(library(_SOURCE), "request_tiles", None)
    return request is not None and request() == 0


def attends(q_BHLC: Tensor, k_BKLC: Tensor, v_BKLV: Tensor) -> bool:
    """Whether `attention` takes such tensors."""
    return (
        not torch.is_grad_enabled()
        and q_BHLC.shape[2] == k_BKLC.shape[2]
        and all(x.dtype is torch.bfloat16 and x.device.type == "cpu" for x in (q_BHLC, k_BKLC, v_BKLV))
        and all(x.stride(-1) == 1 and not (x.shape[2] % _STEP or x.shape[3] % _STEP) for x in (q_BHLC, k_BKLC, v_BKLV))
        and has_tiles()
    )


def attention(q_BHLC: Tensor, k_BKLC: Tensor, v_BKLV: Tensor, window: int | None, scale: float) -> Tensor:
    """Causal attention `[B, H, L, V]`, laid out as `[B, L, H, V]`; heads of queries share those of keys in order.

    Raises:
        MemoryError: there is no room for a head's keys and scores.
    """
    batch, heads, length, channels = q_BHLC.shape
    key_heads, values = v_BKLV.shape[1], v_BKLV.shape[3]
    out_BLHV = q_BHLC.new_empty(batch, length, heads, values)
    done, strides = torch.zeros(1, dtype=torch.int32), [x.stride()[:3] for x in (q_BHLC, k_BKLC, v_BKLV)]
    sizes = (length, channels, values, heads, key_heads, sys.maxsize if window is None else window)
    total = batch * key_heads
    cost = heads // key_heads * length**2 * (1 + (channels + values) / _PRODUCT)
    # by their strides: they need not be contiguous
    pointers = [x.data_ptr() for x in (q_BHLC, k_BKLC, v_BKLV)]
    numbers = (*pointers, *sizes, float(scale))
    run_parts(_SOURCE, "attention", (out_BLHV, done, torch.tensor(strides)), numbers, total, cost)
    if done != total:
        raise MemoryError(f"no memory for the attention of {length} positions")
    return out_BLHV.transpose(1, 2)


def multiplies(x_RI: Tensor, w_EOI: Tensor) -> bool:
    """Whether `expert_products` takes such tensors, and is faster than a product of the library for each expert."""
    outputs, inputs = w_EOI.shape[1:]
    return (
        fits(x_RI, w_EOI, width=inputs)
        and not (inputs % _STEP or outputs % _STEP)
        and inputs <= _WIDEST
        and inputs * outputs <= _NARROW
        and has_tiles()
    )


def expert_products(x_RI: Tensor, counts_E: Tensor, w_EOI: Tensor) -> Tensor:
    """Each row times the weight of its expert `[R, O]`; rows are sorted by expert."""
    num_experts, outputs, inputs = w_EOI.shape
    packed = torch.empty_like(w_EOI)
    run_parts(_SOURCE, "pack_weights", (w_EOI, packed), (inputs,), num_experts * outputs // 16, 16 * inputs * _VALUE)
    out_RO = x_RI.new_empty(len(x_RI), outputs)
    blocks = blocks_of(counts_E, _STEP)
    cost = int(_STEP * inputs * outputs / _PRODUCT / _VALUE)
    _run("expert_products", (x_RI, packed, out_RO, *blocks), (len(x_RI), inputs, outputs), len(blocks[0]), cost)
    return out_RO


def softmax(scores_SQK: Tensor, start: int, first_key: int, window: int | None) -> Tensor:
    """Probabilities in bf16 of fp32 scores, which are used up.

    Query `start + i` sees keys up to its own position, the `window` last at most; key j of the scores has position
    `first_key + j`.
    """
    sequences, queries, keys = scores_SQK.shape
    out_SQK = torch.empty(scores_SQK.shape, dtype=torch.bfloat16)
    sizes = (queries, keys, start, first_key, sys.maxsize if window is None else window)
    _run("softmax", (scores_SQK, out_SQK), sizes, sequences * queries, 2 * keys)
    return out_SQK


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of tensors of a multiple of 16 numbers."""
    out = torch.empty_like(gate)
    _run("swiglu", (gate, up, out), (), gate.numel() // _LANES, 2 * _LANES)
    return out


def combine(out_RD: Tensor, place_TK: Tensor, score_TK: Tensor) -> Tensor:
    """Sums `[T, D]` of the rows at the places of each token, times their fp32 scores."""
    num_tokens, top_k = place_TK.shape
    total_TD = out_RD.new_empty(num_tokens, out_RD.shape[1])
    sizes = (top_k, out_RD.shape[1])
    _run("combine", (out_RD, place_TK, score_TK, total_TD), sizes, num_tokens, top_k * out_RD.shape[1])
    return total_TD


def _run(name: str, tensors: Sequence[Tensor], sizes: Sequence[int], total: int, values: int, *numbers: float) -> None:
    """Call a function of the library for `total` parts of its work, each of so many values."""
    run_parts(_SOURCE, name, tensors, (*sizes, *map(float, numbers)), total, values * _VALUE)
