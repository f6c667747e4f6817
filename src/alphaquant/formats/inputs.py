"""Inputs of a linear, rounded token by token as the model runs: the scale is the token's own, or its group's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.formats.grid import round_to_grid_
from alphaquant.formats.spec import FORMATS, Activation

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.formats.spec import Format

__all__ = ["round_inputs"]

_GRIDS = {Activation.INT8: FORMATS["int8"], Activation.FP8: FORMATS["fp8"]}
_SMALLEST_FP8_SCALE = 1 / (448 * 512)  # vLLM holds it there; int8 scales go down to nothing
_SMALLEST_GROUP_SCALE = 1e-10 / 448  # its kernel for groups is another


def round_inputs(x: Tensor, activation: Activation, group_size: int = -1) -> tuple[Tensor, Tensor]:
    """Grid values of x [..., I], exact in its dtype, and the fp32 scales [..., 1] that they stand for.

    The scale maps a token's largest magnitude to the largest grid value, 127 or 448, as vLLM's dynamic per-token
    kernels do. With groups each has a scale of its own, which no product of whole rows can be multiplied by
    afterwards: what is given are then products of grid value and scale, rounded to the dtype of x, and ones.

    Args:
        x: any float type.
        activation: not BF16, which rounds nothing.
        group_size: inputs of a token that share a scale; -1 is all of them.
    """
    grid = _GRIDS[activation]
    smallest = _SMALLEST_FP8_SCALE if activation is Activation.FP8 else 2.0**-126
    if group_size == -1:
        values, scale = _rounded(x.float(), grid, smallest)
        return values.to(x.dtype), scale
    values, scale = _rounded(x.float().unflatten(-1, (-1, group_size)), grid, _SMALLEST_GROUP_SCALE)
    return values.mul_(scale).flatten(-2).to(x.dtype), scale.new_ones(*x.shape[:-1], 1)


def _rounded(x_fp32: Tensor, grid: Format, smallest: float) -> tuple[Tensor, Tensor]:
    scale = (x_fp32.abs().amax(-1, keepdim=True) / grid.max_value).clamp_min_(smallest)
    return round_to_grid_(x_fp32 / scale, grid), scale
