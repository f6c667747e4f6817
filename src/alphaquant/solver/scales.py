"""Choosing the scales of groups before any column is rounded.

Shapes: E experts, O rows, I columns, G groups of N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alphaquant.formats import ElementKind, ScaleKind, initial_scale, quantize_values, round_scale

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from alphaquant.formats import Scheme

__all__ = ["Scales", "absmax_scales", "search_scales"]

_CHUNK_WEIGHTS = 1 << 18  # weights searched at a time: the working set stays in a core's cache


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """Scales of a stack of matrices, in the terms of `QuantizedTensor`: fp32 values exact in their storage type."""

    scale: Tensor
    zero: Tensor | None
    global_scale: Tensor | None

    def effective(self) -> Tensor:
        """What a grid value is multiplied by, `[E, O, G]`."""
        return self.scale if self.global_scale is None else self.scale / self.global_scale[..., None, None]


def absmax_scales(w_EOI: Tensor, scheme: Scheme, global_scale_E: Tensor | None = None) -> Scales:
    """Scales that cover every weight: absolute maximum, or the range from minimum to maximum where asymmetric.

    `global_scale_E` is NVFP4's matrix scale where rows are only part of a matrix.
    """
    return Scales(*initial_scale(w_EOI, scheme, global_scale_E))


def search_scales(
    w_EOI: Tensor, scheme: Scheme, importance_EI: Tensor | None = None, global_scale_E: Tensor | None = None
) -> Scales:
    """For each group the scale of least rounding error among shrunken and stretched copies of the absmax scale.

    Args:
        w_EOI: weights, not changed.
        scheme: number format and groups.
        importance_EI: what a squared error of a column costs; None: all alike. For plain rounding give the Hessian's
            diagonal.
        global_scale_E: as in `absmax_scales`.
    """
    start = absmax_scales(w_EOI, scheme, global_scale_E)
    num_groups = start.scale.shape[-1]
    scale, zero = start.scale.clone(), None if start.zero is None else start.zero.clone()
    rows = max(1, _CHUNK_WEIGHTS // w_EOI.shape[2])
    for expert in range(w_EOI.shape[0]):
        importance_GN = None if importance_EI is None else importance_EI[expert].float().view(num_groups, -1)
        for begin in range(0, w_EOI.shape[1], rows):
            cut = (expert, slice(begin, begin + rows))
            part = Scales(
                start.scale[cut],
                None if start.zero is None else start.zero[cut],
                None if start.global_scale is None else start.global_scale[expert],
            )
            best = _search(w_EOI[cut].float().unflatten(-1, (num_groups, -1)), part, scheme, importance_GN)
            scale[cut] = best.scale
            if zero is not None and best.zero is not None:
                zero[cut] = best.zero
    return Scales(scale, zero, start.global_scale)


def _search(w_OGN: Tensor, start: Scales, scheme: Scheme, importance_GN: Tensor | None) -> Scales:
    best_error: Tensor | None = None
    best_scale, best_zero = start.scale, start.zero
    for scale, zero in _candidates(w_OGN, start, scheme):
        step = scale if start.global_scale is None else scale / start.global_scale
        zeros = None if zero is None else zero[..., None]
        error_OGN = quantize_values(w_OGN, step[..., None], zeros, scheme.format).mul_(step[..., None]).sub_(w_OGN)
        if importance_GN is None:
            error = error_OGN.square_().sum(-1)
        else:
            error = error_OGN.square_().mul_(importance_GN).sum(-1)
        if best_error is None:
            best_error, best_scale, best_zero = error, scale, zero
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return Scales(best_scale, None if best_zero is None else best_zero.to(torch.uint8), start.global_scale)


def _candidates(w_OGN: Tensor, start: Scales, scheme: Scheme) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Storable scales (and zero points, as floats) to try, the starting ones first: ties keep them."""
    fmt = scheme.format
    yield start.scale, None if start.zero is None else start.zero.float()
    if fmt.scale is ScaleKind.E8M0:
        for factor in (0.5, 2.0):
            yield round_scale(start.scale * factor, scheme), None
        return
    if fmt.scale is ScaleKind.E4M3:
        for factor in _grid(0.6, 1.6, 24):
            yield round_scale(start.scale * factor, scheme), None
        return
    # a float grid repeats itself every power of two; an integer grid only gains by clipping
    least = 0.3 if fmt.bits == 2 else 0.4
    factors = _grid(0.6, 2.0, 40) if fmt.kind is ElementKind.FLOAT else _grid(least, 1.05, 32)
    if scheme.symmetric:
        for factor in factors:
            yield round_scale(start.scale * factor, scheme), None
        return
    low, high = (bound.clamp_max(0) for bound in (w_OGN.amin(-1), -w_OGN.amax(-1)))
    levels = 2.0**fmt.bits - 1
    for factor in factors:
        scale = round_scale((-high - low) * factor / levels, scheme)
        exact = -low * factor / scale
        for zero in (exact.floor(), exact.ceil()):
            yield scale, zero.clamp(0, levels)


def _grid(low: float, high: float, points: int) -> list[float]:
    return torch.linspace(low, high, points, dtype=torch.float64).tolist()
