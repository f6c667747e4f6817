"""GPTQ, batched over experts: walk the columns, round each, let the later ones make up for its error.

Shapes: E experts, O rows (outputs), I columns (inputs), G groups. Inside the walk columns lie first, `[E, I, O]`, so
that a column of all experts is contiguous. Codes come out as they lie, and weights are not turned that lie so already:
between the steps of the method nothing is turned to and fro.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from alphaquant.formats import QuantizedTensor, encode, pool_rows, quantize_values
from alphaquant.solver.backend import Backend, kernels_for
from alphaquant.solver.factor import chosen_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.solver.factor import Factor
    from alphaquant.solver.scales import Scales

__all__ = ["Columns", "Solution", "better_rows", "columns_first", "encode_grouped", "solve"]

_LEAF = 16  # columns that torch walks one by one
_MOST = 128  # columns that a kernel takes


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A quantized weight and its loss `tr(E H Eᵀ)` under the damped Hessian, a row: `loss_EO`."""

    quantized: QuantizedTensor
    loss_EO: Tensor


def better_rows(old: Solution, new: Solution) -> Solution:
    """Row by row the solution of lower loss, or block by block of rows; both must have the same scheme."""
    scheme = new.quantized.scheme
    better = (pool_rows(new.loss_EO[..., None], scheme) < pool_rows(old.loss_EO[..., None], scheme))[..., 0]
    rows = better[..., None]
    zero = None
    if old.quantized.zero is not None and new.quantized.zero is not None:
        zero = torch.where(rows, new.quantized.zero, old.quantized.zero)
    quantized = replace(
        new.quantized,
        codes=torch.where(rows, new.quantized.codes, old.quantized.codes),
        scale=torch.where(rows, new.quantized.scale, old.quantized.scale),
        zero=zero,
    )
    return Solution(quantized, torch.where(better, new.loss_EO, old.loss_EO))


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """A weight and its scales in walking order, `[E, I, O]`."""

    w_EIO: Tensor
    step_EIO: Tensor
    zero_EIO: Tensor | None

    @classmethod
    def of(cls, w_EOI: Tensor, scales: Scales, scheme: Scheme, order_EI: Tensor | None = None) -> Columns:
        """Columns of a weight in the given order, or their own, each with the scale and zero point of its group."""
        num_experts, _, in_features = w_EOI.shape
        if order_EI is None:
            order_EI = torch.arange(in_features, device=w_EOI.device).expand(num_experts, -1)
        group_EI = order_EI // (in_features // scheme.num_groups(in_features))
        zero = None if scales.zero is None else _columns(scales.zero.float(), group_EI)
        return cls(_columns(w_EOI.float(), order_EI), _columns(scales.effective(), group_EI), zero)

    def round(self, target_EO: Tensor, column: int, scheme: Scheme) -> Tensor:
        """Grid values of one column's targets."""
        zero = None if self.zero_EIO is None else self.zero_EIO[:, column]
        return quantize_values(target_EO, self.step_EIO[:, column], zero, scheme.format)


def solve(
    w_EOI: Tensor,
    factor: Factor,
    scheme: Scheme,
    scales: Scales,
    block_size: int = 128,
    backend: Backend = Backend.AUTO,
) -> Solution:
    """Quantize weights column by column with error feedback, scales fixed beforehand.

    With `H = M D Mᵀ`: `t_j = w_j + Σ_{k<j} (w_k - q_k) M[k, j]`, `q_j = round(t_j)`, loss `Σ_j D_j (t_j - q_j)²`: the
    codes of Frantar et al. 2022 (GPTQ), in the form of Chee et al. 2023 (QuIP). Columns keep the scale of their own
    group whatever the walking order.

    Args:
        w_EOI: weights, not changed.
        factor: of the inputs' Hessians.
        scheme: number format and groups.
        scales: from `alphaquant.solver.scales`.
        block_size: columns that are walked before their error reaches the rest; changes speed only.
        backend: what walks the columns of a block.
    """
    kernels = kernels_for(w_EOI, backend)
    if factor.packed_EII is not None and kernels is not None:
        w_EIO = w_EOI.transpose(1, 2).float().contiguous()
        value_EIO, loss_EO = kernels.walk(w_EIO, scales, factor, scheme.format)
        codes = encode_grouped(value_EIO.transpose(1, 2), scales.zero, scheme)
        return Solution(QuantizedTensor(codes, scales.scale, scales.zero, scales.global_scale, scheme), loss_EO)
    columns = Columns.of(w_EOI, scales, scheme, factor.order_EI)
    target_EIO = columns.w_EIO.clone()
    value_EIO, error_EIO = torch.empty_like(target_EIO), torch.empty_like(target_EIO)
    feedback = factor.feedback_EII
    size = w_EOI.shape[2]

    def push(start: int, mid: int, end: int) -> None:
        """Errors of columns start…mid reach columns mid…end."""
        target_EIO[:, mid:end].baddbmm_(feedback[:, start:mid, mid:end].transpose(1, 2), error_EIO[:, start:mid])

    def walk(start: int, end: int) -> None:
        for j in range(start, end):
            target = target_EIO[:, j]
            value = columns.round(target, j, scheme)
            quantized = value * columns.step_EIO[:, j]
            value_EIO[:, j] = value
            torch.sub(columns.w_EIO[:, j], quantized, out=error_EIO[:, j])
            target.sub_(quantized)  # what is left in place is t - q, which the loss needs
            if j + 1 < end:
                reach = feedback[:, j, j + 1 : end, None]
                target_EIO[:, j + 1 : end].addcmul_(reach, error_EIO[:, j, None])

    for start, mid, end in _halves(0, size, min(block_size, _LEAF if kernels is None else _MOST)):
        if mid < end:
            push(start, mid, end)
        elif kernels is None:
            walk(start, end)
        else:
            cut = slice(start, end)
            kernels.walk_block(target_EIO, columns, feedback, value_EIO, error_EIO, cut, scheme.format)
    loss_EO = torch.bmm(factor.curvature_EI[:, None], target_EIO.square_())[:, 0]
    return Solution(_collect(value_EIO, scales, scheme, factor.order_EI), loss_EO)


def _halves(start: int, end: int, leaf: int) -> Iterator[tuple[int, int, int]]:
    """What to do in order: leaves to walk (start, end, end), and pushes (start, mid, end) between two halves.

    Not a function inside `solve`: one that calls itself there is a cycle, and keeps every tensor it sees alive.
    """
    if end - start <= leaf:
        yield start, end, end
        return
    mid = start + (end - start + 1) // 2
    yield from _halves(start, mid, leaf)
    yield start, mid, end
    yield from _halves(mid, end, leaf)


def _collect(value_EIO: Tensor, scales: Scales, scheme: Scheme, order_EI: Tensor) -> QuantizedTensor:
    """Grid values in walking order to codes in natural order."""
    value_EIO = _columns(value_EIO.transpose(1, 2), order_EI.argsort(1))
    codes = encode_grouped(value_EIO.transpose(1, 2), scales.zero, scheme)
    return QuantizedTensor(codes, scales.scale, scales.zero, scales.global_scale, scheme)


def columns_first(x_EOI: Tensor, backend: Backend = Backend.AUTO) -> Tensor:
    """The transposes `[E, I, O]`, contiguous; not copied where columns lie first already."""
    x_EIO = x_EOI.transpose(1, 2)
    if x_EIO.is_contiguous():
        return x_EIO
    turned: Callable[[Tensor], Tensor | None] | None = getattr(kernels_for(x_EOI, backend), "turned", None)
    out_EIO = None if turned is None else turned(x_EOI)
    return x_EIO.contiguous() if out_EIO is None else out_EIO


def _columns(x_EOJ: Tensor, index_EI: Tensor) -> Tensor:
    """The chosen columns of each expert, columns first: `[E, I, O]`, contiguous."""
    return chosen_rows(x_EOJ.transpose(1, 2).contiguous(), index_EI)


def encode_grouped(value_EOI: Tensor, zero_EOG: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes of grid values `[E, O, I]`."""
    if zero_EOG is None:
        return encode(value_EOI, scheme.format)
    grouped = value_EOI.unflatten(-1, (zero_EOG.shape[-1], -1))
    return encode(grouped, scheme.format, zero_EOG[..., None]).flatten(-2)
