"""After the walk: coordinate descent over codes, and closed-form scales for frozen codes.

Both lower `tr((W - Q) H (W - Q)ᵀ)` step by step. Shapes as in `gptq`: columns first, `[E, I, O]`, natural order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from alphaquant.formats import ScaleKind, decode, dequantize, round_scale
from alphaquant.solver.backend import Backend, kernels_for
from alphaquant.solver.gptq import Columns, Solution, better_rows, encode_grouped
from alphaquant.solver.rtn import hessian_loss
from alphaquant.solver.scales import Scales

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.formats import QuantizedTensor, Scheme

__all__ = ["refine", "refit_scales"]

_BLOCK = 32
_KERNEL_BLOCK = 128


def refine(
    w_EOI: Tensor,
    h_EII: Tensor,
    solution: Solution,
    *,
    rounds: int,
    sweeps: int,
    backend: Backend = Backend.AUTO,
) -> Solution:
    """`rounds` times: refit the scales to the codes (where the format allows it), then `sweeps` descents over codes.

    A row keeps what it had unless the loss really fell. Sources: CDQuant (Nair and Suggala 2024) for the descent;
    the scale step is the least-squares optimum of one group with everything else fixed.

    Args:
        w_EOI: weights, not changed.
        h_EII: damped Hessians in natural column order.
        solution: where to start from.
        rounds: how often both steps alternate.
        sweeps: passes over all columns in each round.
        backend: what descends over the columns of a block.
    """
    w_EOI = w_EOI.float()
    best = replace(solution, loss_EO=_loss(w_EOI, solution.quantized, h_EII))
    quantized = best.quantized
    for _ in range(rounds):
        if quantized.scheme.format.scale is ScaleKind.MODEL:
            quantized = refit_scales(w_EOI, h_EII, quantized)
        for _ in range(sweeps):
            quantized = _descend(w_EOI, h_EII, quantized, backend)
        best = better_rows(best, Solution(quantized, _loss(w_EOI, quantized, h_EII)))
        quantized = best.quantized
    return best


def _loss(w_EOI: Tensor, quantized: QuantizedTensor, h_EII: Tensor) -> Tensor:
    return hessian_loss(w_EOI - dequantize(quantized), h_EII)


def _descend(w_EOI: Tensor, h_EII: Tensor, quantized: QuantizedTensor, backend: Backend) -> QuantizedTensor:
    """One sweep: every code in turn becomes the best one given all others."""
    scheme = quantized.scheme
    scales = Scales(quantized.scale, quantized.zero, quantized.global_scale)
    size = w_EOI.shape[2]
    order = torch.arange(size, device=w_EOI.device).expand(w_EOI.shape[0], size)
    columns = Columns.of(w_EOI, scales, scheme, order)
    value_EIO = _values(quantized).transpose(1, 2).contiguous()
    q_EIO = value_EIO * columns.step_EIO
    gradient_EIO = torch.bmm(h_EII, columns.w_EIO - q_EIO)
    inverse_EI = h_EII.diagonal(dim1=1, dim2=2).reciprocal()
    kernels = kernels_for(w_EOI, backend)
    block = _BLOCK if kernels is None else _KERNEL_BLOCK
    for start in range(0, size, block):
        end = min(start + block, size)
        if kernels is not None:
            cut = slice(start, end)
            moved_EBO = kernels.descend_block(gradient_EIO, q_EIO, columns, h_EII, value_EIO, cut, scheme.format)
            gradient_EIO[:, end:].baddbmm_(h_EII[:, end:, cut], moved_EBO)
            continue
        local_EBO = gradient_EIO[:, start:end].clone()
        moved_EBO = torch.empty_like(local_EBO)
        for j in range(start, end):
            target = torch.addcmul(q_EIO[:, j], local_EBO[:, j - start], inverse_EI[:, j, None])
            value = columns.round(target, j, scheme)
            new = value * columns.step_EIO[:, j]
            step = torch.sub(q_EIO[:, j], new, out=moved_EBO[:, j - start])
            value_EIO[:, j], q_EIO[:, j] = value, new
            if j + 1 < end:
                local_EBO[:, j - start + 1 :].addcmul_(h_EII[:, j, j + 1 : end, None], step[:, None])
        gradient_EIO[:, end:].baddbmm_(h_EII[:, end:, start:end], moved_EBO)
    codes = encode_grouped(value_EIO.transpose(1, 2).contiguous(), quantized.zero, scheme)
    return replace(quantized, codes=codes)


def refit_scales(w_EOI: Tensor, h_EII: Tensor, quantized: QuantizedTensor) -> QuantizedTensor:
    """Group by group the scale of least loss for the codes as they are, rounded to its storage type."""
    scheme = quantized.scheme
    num_groups = quantized.scale.shape[-1]
    value_EGNO = _values(quantized).transpose(1, 2).contiguous().unflatten(1, (num_groups, -1))
    width = value_EGNO.shape[2]
    error_EIO = (w_EOI - dequantize(quantized)).transpose(1, 2)
    gradient_EIO = torch.bmm(h_EII, error_EIO)
    scale_EGO = quantized.scale.transpose(1, 2).contiguous()
    for g in range(num_groups):
        cut = slice(g * width, (g + 1) * width)
        value_ENO = value_EGNO[:, g]
        slope_EO = (value_ENO * gradient_EIO[:, cut]).sum(1)
        curve_EO = (value_ENO * torch.bmm(h_EII[:, cut, cut], value_ENO)).sum(1)
        wanted = scale_EGO[:, g] + torch.where(curve_EO > 0, slope_EO / curve_EO, 0.0)
        # a fit to a few codes may ask for a sign change or a blow-up: the codes would no longer be the nearest ones
        wanted = torch.where((wanted / scale_EGO[:, g] - 1).abs() < 0.5, wanted, scale_EGO[:, g])
        new = round_scale(wanted, scheme)
        gradient_EIO.baddbmm_(h_EII[:, :, cut], value_ENO * (scale_EGO[:, g] - new)[:, None])
        scale_EGO[:, g] = new
    return replace(quantized, scale=scale_EGO.transpose(1, 2).contiguous())


def _values(quantized: QuantizedTensor) -> Tensor:
    """Grid values `[E, O, I]`."""
    scheme: Scheme = quantized.scheme
    if quantized.zero is None:
        return decode(quantized.codes, scheme.format)
    grouped = quantized.codes.unflatten(-1, (quantized.zero.shape[-1], -1))
    return decode(grouped, scheme.format, quantized.zero[..., None]).flatten(-2)
