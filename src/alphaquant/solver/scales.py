"""Choosing the scales of groups before any column is rounded.

Shapes: E experts, O rows, I columns, G groups of N columns, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alphaquant.formats import ElementKind, ScaleKind, initial_scale, pool_rows, quantize_values, round_scale
from alphaquant.solver.backend import Backend, kernels_for

if TYPE_CHECKING:
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
    if len(w_EOI) > 1 and importance_EI is None and not scheme.format.has_one_group:
        # rows know nothing of their matrix: those of many small ones are searched together
        one = search_scales(w_EOI.flatten(0, 1)[None], scheme, backend=backend)
        zero = None if one.zero is None else one.zero.view(*w_EOI.shape[:2], -1)
        return Scales(one.scale.view(*w_EOI.shape[:2], -1), zero, None)
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
    kernels = kernels_for(w_OGN, backend)
    errors_of = getattr(kernels, "rounding_errors", _rounding_errors)
    least_of = getattr(kernels, "least_rounding_errors", None) if scheme.format.block_rows == 1 else None

    def best_of(scale_KOG: Tensor, zero_KOG: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of some candidates: the least error, which of them has it, and that one; of equal ones the first."""
        step_KOG = scale_KOG if start.global_scale is None else scale_KOG / start.global_scale
        candidates = (w_OGN, step_KOG, zero_KOG, importance_GN, scheme.format)
        if least_of is not None:
            error_OG, index_OG = least_of(*candidates)
        else:
            error_OG, index_OG = pool_rows(errors_of(*candidates), scheme).min(0)
        scale_OG, *zeros = (x_KOG.gather(0, index_OG[None])[0] for x_KOG in (scale_KOG, zero_KOG) if x_KOG is not None)
        return error_OG, index_OG, scale_OG, zeros[0] if zeros else None

    stretched = _Stretch.of(w_OGN, start, scheme)
    factors, between = _factors(scheme)
    factor_K = start.scale.new_tensor(factors)
    scale_KOG, zero_KOG = stretched.by(factor_K[:, None, None])
    each = len(scale_KOG) // len(factors)  # candidates of a factor
    begin_OG = None if start.zero is None else start.zero.float()
    # where it starts comes first: ties keep it
    scale_KOG = torch.cat([start.scale[None], scale_KOG])
    zero_KOG = None if zero_KOG is None or begin_OG is None else torch.cat([begin_OG[None], zero_KOG])
    error_OG, index_OG, scale_OG, zero_OG = best_of(scale_KOG, zero_KOG)
    if between:
        around_OG = torch.cat([factor_K.new_ones(1), factor_K.repeat_interleave(each)])[index_OG]
        found = best_of(*stretched.by(around_OG + factor_K.new_tensor(between)[:, None, None]))
        better_OG = found[0] < error_OG
        scale_OG = torch.where(better_OG, found[2], scale_OG)
        zero_OG = None if zero_OG is None or found[3] is None else torch.where(better_OG, found[3], zero_OG)
    return Scales(scale_OG, None if zero_OG is None else zero_OG.to(torch.uint8), start.global_scale)


def _rounding_errors(
    w_OGN: Tensor, step_KOG: Tensor, zero_KOG: Tensor | None, importance_GN: Tensor | None, fmt: Format
) -> Tensor:
    """Squared errors of groups rounded with K steps and zero points `[K, O, G]`, each at its column's importance."""
    error_KOG = torch.empty_like(step_KOG)
    for index, step_OG in enumerate(step_KOG):
        step, zero = step_OG[..., None], None if zero_KOG is None else zero_KOG[index][..., None]
        error_OGN = quantize_values(w_OGN, step, zero, fmt).mul_(step).sub_(w_OGN).square_()
        error_KOG[index] = (error_OGN if importance_GN is None else error_OGN.mul_(importance_GN)).sum(-1)
    return error_KOG


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

    def by(self, factor_KOG: Tensor) -> tuple[Tensor, Tensor | None]:
        """Storable scales `[K, O, G]`; of ranges two each, with the zero points on both sides of the exact one."""
        scale_KOG = round_scale(self.scale_OG * factor_KOG, self.scheme)
        if self.low_OG is None:
            return scale_KOG, None
        exact_KOG = -self.low_OG * factor_KOG / scale_KOG
        zero_KOG = torch.stack([exact_KOG.floor(), exact_KOG.ceil()], 1).flatten(0, 1)
        return scale_KOG.repeat_interleave(2, 0), zero_KOG.clamp_(0, 2.0**self.scheme.format.bits - 1)


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
