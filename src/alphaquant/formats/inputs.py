"""Inputs of a linear, rounded token by token as the model runs: the scale is the token's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.formats.grid import round_to_grid_
from alphaquant.formats.spec import FORMATS, Activation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["round_inputs"]

_GRIDS = {Activation.INT8: FORMATS["int8"], Activation.FP8: FORMATS["fp8"]}
_SMALLEST_FP8_SCALE = 1 / (448 * 512)  # vLLM holds it there; int8 scales go down to nothing


def round_inputs(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Grid values of x [..., I], exact in its dtype, and the fp32 scales [..., 1] that they stand for.

    The scale maps a token's largest magnitude to the largest grid value, 127 or 448, as vLLM's dynamic per-token
    kernels do. `activation` is not BF16, which rounds nothing.
    """
    grid = _GRIDS[activation]
    x_fp32 = x.float()
    scale = x_fp32.abs().amax(-1, keepdim=True) / grid.max_value
    smallest = _SMALLEST_FP8_SCALE if activation is Activation.FP8 else 2.0**-126
    scale = scale.clamp_min_(smallest)
    return round_to_grid_(x_fp32 / scale, grid).to(x.dtype), scale
