"""Round to nearest: what GPTQ falls back to, and a method of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.formats import dequantize, quantize_with
from alphaquant.solver.gptq import Solution

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.solver.scales import Scales

__all__ = ["hessian_loss", "round_to_nearest"]


def round_to_nearest(w_EOI: Tensor, scheme: Scheme, scales: Scales, h_EII: Tensor | None = None) -> Solution:
    """Round every weight on its own; the loss is `tr(E H Eᵀ)` a row, or the squared error without a Hessian."""
    quantized = quantize_with(w_EOI, scheme, scales.scale, scales.zero, scales.global_scale)
    error_EOI = w_EOI.float() - dequantize(quantized)
    return Solution(quantized, hessian_loss(error_EOI, h_EII))


def hessian_loss(error_EOI: Tensor, h_EII: Tensor | None) -> Tensor:
    """`e H eᵀ` of every row, `[E, O]`; the squared error where there is no Hessian."""
    moved = error_EOI if h_EII is None else error_EOI @ h_EII
    return (moved * error_EOI).sum(-1)
