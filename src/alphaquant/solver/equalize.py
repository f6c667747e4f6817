"""Free moves of columns before they are quantized: places that they change, and scales that their inputs make up for.

Shapes: E experts, O rows, I columns, G groups of N columns.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from alphaquant.formats import Scheme

__all__ = ["Moves", "Permute", "channel_order", "equalizing_scales"]

_SQUARINGS = 3
_POWER = 2**_SQUARINGS  # of the norm that stands for the largest weight of a group
_STEPS = 6
_CALM = 100.0  # with columns that cost so many times the median one a matrix is left as it is
_LEAST_SHARE = 1e-6
_TINY = 1e-30


class Permute(Enum):
    """By what hidden channels are put in order, so that those of a group are alike."""

    NONE = "none"
    RANGE = "range"  # their largest weight
    IMPORTANCE = "importance"  # what a rounding error of theirs costs


class Moves(NamedTuple):
    """How columns moved before they were quantized, `[E, I]` each; see `Outcome`."""

    channel_EI: Tensor
    scale_EI: Tensor

    @classmethod
    def none(cls, num_experts: int, in_features: int, device: torch.device) -> Moves:
        """All columns in their places, and as they were."""
        channel_EI = torch.arange(in_features, device=device).repeat(num_experts, 1)
        return cls(channel_EI, torch.ones(num_experts, in_features, device=device))


def channel_order(w_EOI: Tensor, curvature_EI: Tensor, by: Permute) -> Tensor:
    """Order of columns, int64 `[E, I]` of place → column, falling; stable for ties.

    Args:
        w_EOI: weights, not changed.
        curvature_EI: `D` of the factorised Hessian, in natural order; see `factorize`.
        by: what to sort by.
    """
    if by is Permute.NONE:
        return Moves.none(len(w_EOI), w_EOI.shape[2], w_EOI.device).channel_EI
    key_EI = w_EOI.float().abs().amax(1) if by is Permute.RANGE else curvature_EI
    return key_EI.argsort(dim=1, descending=True, stable=True)


def equalizing_scales(w_EOI: Tensor, curvature_EI: Tensor, scheme: Scheme) -> Tensor:
    """Scales `s` of columns, fp32 `[E, I]`, of geometric mean one in a group, for which `w / s` loses less.

    A group's step is that of its largest weight, and a rounding error of column `i` costs `D_i s_i²`: the loss of a
    group is `Σ_o max_i (w_oi / s_i)² · Σ_i D_i s_i²`. It is least where each column's share in the steps is its share
    in the costs, which Newton's method on the logarithms finds, with a norm in the maximum's place. Cross-layer
    equalization (Nagel et al. 2019) gives columns one range; here one that costs more has more of it.

    Where few columns cost more than all others (of a massive activation), chance decides what they lose; ones there.

    Args:
        w_EOI: weights, not changed.
        curvature_EI: `D` of the factorised Hessian, in natural order; see `factorize`.
        scheme: number format and groups.
    """
    num_groups = scheme.num_groups(w_EOI.shape[2])
    is_calm_E = curvature_EI.amax(1) < _CALM * curvature_EI.median(1).values
    scale_EI = torch.ones_like(curvature_EI)
    # expert by expert: how products are summed depends on how many there are, and results must not
    for expert in is_calm_E.nonzero()[:, 0].tolist():
        w_GON = w_EOI[expert].unflatten(1, (num_groups, -1)).transpose(0, 1)
        scale_EI[expert] = _scales_of_one(w_GON, curvature_EI[expert].unflatten(0, (num_groups, -1))).flatten()
    return scale_EI


def _scales_of_one(w_GON: Tensor, cost_GN: Tensor) -> Tensor:
    power_GON = w_GON.float().abs()
    largest_GO1 = power_GON.amax(-1, keepdim=True).clamp_min(_TINY)
    power_GON.div_(largest_GO1)
    for _ in range(_SQUARINGS):
        power_GON.square_()
    square_GO1 = largest_GO1.square()
    log_GN = torch.zeros_like(cost_GN)
    for _ in range(_STEPS):
        weight_GN = (-_POWER * log_GN).exp()
        norm_GO1 = torch.bmm(power_GON, weight_GN[..., None]).clamp_min(_TINY)
        slope_GO1 = norm_GO1.pow(2 / _POWER - 1) * square_GO1
        step_GN = weight_GN * torch.bmm(slope_GO1.transpose(1, 2), power_GON)[:, 0]
        log_GN += (_shares(step_GN) / _shares(cost_GN * (2 * log_GN).exp())).log() / (_POWER + 2)
        log_GN -= log_GN.mean(-1, keepdim=True)
    return log_GN.exp()


def _shares(x_GN: Tensor) -> Tensor:
    return (x_GN / x_GN.sum(-1, keepdim=True).clamp_min(_TINY)).clamp_min(_LEAST_SHARE)
