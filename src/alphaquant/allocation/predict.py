"""What GPTQ's error will be, told from the factor of the inputs' Hessian without walking the columns.

With `H = M D Mᵀ`, the walk leaves in column j of its targets the plain rounding error `v_j`, and the loss is
`Σ_j D_j |v_j|²`. So the rounding errors of the weights themselves, which differ from those of the targets only by
chance, predict it; and `E = V M⁻¹` is an error of the weights that has exactly this loss: what the quantized weights
will be like. Shapes: E experts, O rows, I columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.formats import dequantize, quantize_with
from alphaquant.solver import damp, factorize, hessian_loss, search_scales

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.solver import Factor

__all__ = ["Inputs", "Prediction", "predict"]


class Inputs(NamedTuple):
    """What a stack's inputs amount to.

    Attributes:
        factor: of the damped Hessians.
        damped_EII: the damped Hessians.
        rounded_E: experts with so little evidence that their weights are rounded to nearest.
    """

    factor: Factor
    damped_EII: Tensor
    rounded_E: Tensor

    @classmethod
    def of(cls, h_EII: Tensor, damping_E: Tensor, rounded_E: Tensor) -> Inputs:
        """From mean Hessians, the damping by evidence, and which experts are rounded."""
        factor = factorize(h_EII, damping_E)
        return cls(factor, damp(h_EII, factor.damping_E), rounded_E.to(h_EII.device))


class Prediction(NamedTuple):
    """The loss `tr(E H Eᵀ)` of each expert, and plain rounding errors of the weights."""

    loss_E: Tensor
    rounding_EOI: Tensor

    def error(self, inputs: Inputs) -> Tensor:
        """An error of the weights `[E, O, I]` that has this loss and the correlations that GPTQ gives it."""
        factor = inputs.factor
        order_EOI = factor.order_EI[:, None, :].expand_as(self.rounding_EOI)
        walked_EOI = torch.linalg.solve_triangular(
            factor.feedback_EII, self.rounding_EOI.gather(2, order_EOI), upper=True, left=False, unitriangular=True
        )
        spread_EOI = torch.empty_like(walked_EOI).scatter_(2, order_EOI, walked_EOI)
        return torch.where(inputs.rounded_E[:, None, None], self.rounding_EOI, spread_EOI)


def predict(w_EOI: Tensor, inputs: Inputs, scheme: Scheme) -> Prediction:
    """Loss and rounding errors of a stack in a scheme, with scales searched as they are before the walk."""
    w_EOI = w_EOI.float()
    scales = search_scales(w_EOI, scheme)
    rounding_EOI = w_EOI - dequantize(quantize_with(w_EOI, scheme, scales.scale, scales.zero, scales.global_scale))
    square_EI = rounding_EOI.square().sum(1).gather(1, inputs.factor.order_EI)
    walked_E = (square_EI * inputs.factor.curvature_EI).sum(1)
    rounded_E = hessian_loss(rounding_EOI, inputs.damped_EII).sum(1)
    return Prediction(torch.where(inputs.rounded_E, rounded_E, walked_E), rounding_EOI)
