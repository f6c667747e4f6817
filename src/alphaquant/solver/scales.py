"""Choosing the scales of groups before any column is rounded.

Shapes: E experts, O rows, I columns, G groups of N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alphaquant.formats import ElementKind, ScaleKind, initial_scale, pool_rows, quantize_values, round_scale
from alphaquant.solver.backend import Backend, kernels_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from alphaquant.formats import Format, Scheme

__all__ = ["Scales", "absmax_scales", "search_scales", "whole_blocks"]

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
    w_EOI: Tensor,
    scheme: Scheme,
    importance_EI: Tensor | None = None,
    global_scale_E: Tensor | None = None,
    backend: Backend = Backend.AUTO,
) -> Scales:
    """For each group (or block) the scale of least rounding error among shrunken and stretched absmax scales.

    Args:
        w_EOI: weights, not changed.
        scheme: number format and groups.
        importance_EI: what a squared error of a column costs; None: all alike. For plain rounding give the Hessian's
            diagonal.
        global_scale_E: as in `absmax_scales`.
        backend: what rounds.
    """
    start = absmax_scales(w_EOI, scheme, global_scale_E)
    num_groups = start.scale.shape[-1]
    scale, zero = start.scale.clone(), None if start.zero is None else start.zero.clone()
    rows = whole_blocks(_CHUNK_WEIGHTS // w_EOI.shape[2], scheme)
    for expert in range(w_EOI.shape[0]):
        importance_GN = None if importance_EI is None else importance_EI[expert].float().view(num_groups, -1)
        for begin in range(0, w_EOI.shape[1], rows):
            cut = (expert, slice(begin, begin + rows))
            part = Scales(
                start.scale[cut],
                None if start.zero is None else start.zero[cut],
                None if start.global_scale is None else start.global_scale[expert],
            )
            w_OGN = w_EOI[cut].float().unflatten(-1, (num_groups, -1))
            best = _search(w_OGN, part, scheme, importance_GN, backend)
            scale[cut] = best.scale
            if zero is not None and best.zero is not None:
                zero[cut] = best.zero
    return Scales(scale, zero, start.global_scale)


def whole_blocks(rows: int, scheme: Scheme) -> int:
    """The rows to take at a time where there is room for so many: whole blocks of those that share scales."""
    block = scheme.format.block_rows
    return max(block, rows // block * block)


def _search(w_OGN: Tensor, start: Scales, scheme: Scheme, importance_GN: Tensor | None, backend: Backend) -> Scales:
    errors_of = getattr(kernels_for(w_OGN, backend), "rounding_errors", _rounding_errors)
    factor_of, best_error_OG = torch.ones_like(start.scale), torch.full_like(start.scale, torch.inf)
    best_scale, best_zero = start.scale, None if start.zero is None else start.zero.float()

    def attempt(factor: float | Tensor, scale: Tensor, zero: Tensor | None) -> None:
        nonlocal factor_of, best_error_OG, best_scale, best_zero
        step = scale if start.global_scale is None else scale / start.global_scale
        error_OG = pool_rows(errors_of(w_OGN, step, zero, importance_GN, scheme.format), scheme)
        better = error_OG < best_error_OG
        best_error_OG = torch.where(better, error_OG, best_error_OG)
        best_scale = torch.where(better, scale, best_scale)
        factor_of = torch.where(better, factor, factor_of)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)

    attempt(1.0, best_scale, best_zero)  # first: ties keep it
    factors, between = _factors(scheme)
    stretched = _Stretch.of(w_OGN, start, scheme)
    for factor in factors:
        for scale, zero in stretched.by(factor):
            attempt(factor, scale, zero)
    around = factor_of
    for offset in between:
        for scale, zero in stretched.by(around + offset):
            attempt(around + offset, scale, zero)
    return Scales(best_scale, None if best_zero is None else best_zero.to(torch.uint8), start.global_scale)


def _rounding_errors(
    w_OGN: Tensor, step_OG: Tensor, zero_OG: Tensor | None, importance_GN: Tensor | None, fmt: Format
) -> Tensor:
    """Squared errors of groups that are rounded with these steps and zero points, each at its column's importance."""
    step, zero = step_OG[..., None], None if zero_OG is None else zero_OG[..., None]
    error_OGN = quantize_values(w_OGN, step, zero, fmt).mul_(step).sub_(w_OGN).square_()
    return (error_OGN if importance_GN is None else error_OGN.mul_(importance_GN)).sum(-1)


@dataclass(frozen=True, slots=True, eq=False)
class _Stretch:
    """What is stretched or shrunken: the starting scale, or the ends of each group's range with a zero point inside."""

    scale_OG: Tensor
    low_OG: Tensor | None
    scheme: Scheme

    @classmethod
    def of(cls, w_OGN: Tensor, start: Scales, scheme: Scheme) -> _Stretch:
        if start.zero is None:
            return cls(start.scale, None, scheme)
        low_OG, high_OG = w_OGN.amin(-1).clamp_max(0), w_OGN.amax(-1).clamp_min(0)
        return cls((high_OG - low_OG) / (2.0**scheme.format.bits - 1), low_OG, scheme)

    def by(self, factor: float | Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Storable scales, and the zero points (as floats) on both sides of the exact one."""
        scale = round_scale(self.scale_OG * factor, self.scheme)
        if self.low_OG is None:
            yield scale, None
            return
        exact = -self.low_OG * factor / scale
        for zero in (exact.floor(), exact.ceil()):
            yield scale, zero.clamp(0, 2.0**self.scheme.format.bits - 1)


def _factors(scheme: Scheme) -> tuple[list[float], list[float]]:
    """Factors of the starting scale to try; and offsets to try around the best of them.

    A float grid repeats itself every power of two, and its error has many local minima: all of a fine grid is tried.
    An integer grid only gains by clipping, and by one minimum.
    """
    fmt = scheme.format
    if fmt.scale is ScaleKind.E8M0:
        return [0.5, 2.0], []
    if fmt.scale is ScaleKind.E4M3:
        return _grid(0.6, 1.6, 24), []
    if fmt.kind is ElementKind.FLOAT:
        return _grid(0.6, 2.0, 40), []
    coarse = _grid(0.3 if fmt.bits == 2 else 0.4, 1.05, 12)
    third = (coarse[1] - coarse[0]) / 3
    return coarse, [-third, third, -2 * third, 2 * third]


def _grid(low: float, high: float, points: int) -> list[float]:
    return torch.linspace(low, high, points, dtype=torch.float64).tolist()
