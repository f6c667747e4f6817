"""After the walk: closed-form scales for frozen codes, and coordinate descent over codes.

Both lower `tr((W - Q) H (W - Q)ᵀ)` step by step. Shapes as in `gptq`: columns first, `[E, I, O]`, natural order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.formats import ElementKind, ScaleKind, decode, pool_rows, quantize_values, round_scale, scale_bounds
from alphaquant.solver import native
from alphaquant.solver.backend import Backend, kernels_for
from alphaquant.solver.gptq import Columns, Solution, encode_grouped
from alphaquant.solver.scales import Scales

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import Tensor

    from alphaquant.formats import Format, QuantizedTensor, Scheme

    Product = Callable[[Tensor, Tensor], Tensor]

__all__ = ["grid_steps", "leanings", "refine", "refit_scales"]

_ALMOST_HALF = 0.49  # of a grid step
_LEANING_WEIGHTS = 1 << 20  # whose leanings are found together
_LEAF = 32  # columns whose moves reach each other one by one
_BLOCK = 128  # columns that descend before the rest of the gradient follows


def refine(
    w_EOI: Tensor,
    h_EII: Tensor,
    solution: Solution,
    *,
    sweeps: int,
    backend: Backend = Backend.AUTO,
    packed_EII: Tensor | None = None,
) -> Solution:
    """So many sweeps over the groups: refit the scale to the codes, where the format allows it, then the codes.

    A scale or a code changes where that lowers the loss, by the amount that its square and its gradient foretell; so no
    row gets worse, and one product with the Hessian at the beginning is the only one beyond what the changes cost.
    Sources: CDQuant (Nair and Suggala 2024) for the descent; the scale step is the least-squares optimum of one group
    with everything else fixed.

    Args:
        w_EOI: weights, not changed.
        h_EII: damped Hessians in natural column order.
        solution: where to start from; its loss is computed anew.
        sweeps: passes over all groups.
        backend: what descends over the columns of a block.
        packed_EII: the Hessians for products in tiles, where they are faster; see `native.packed`.
    """
    in_tiles = _InTiles.of(w_EOI, h_EII, solution.quantized, packed_EII)
    if in_tiles is not None and sweeps:
        return in_tiles.refined(sweeps)
    state = _State.of(w_EOI, h_EII, solution.quantized)
    loss_EO = ((state.columns.w_EIO - state.q_EIO) * state.gradient_EIO).sum(1)
    kernels = kernels_for(w_EOI, backend)
    for sweep in range(sweeps):
        for cut in state.cuts():
            local_EBO = state.gradient_EIO[:, cut].clone()
            moved_EBO = torch.zeros_like(local_EBO)
            if state.fits:
                loss_EO += state.refit(cut, local_EBO, moved_EBO)
            loss_EO += state.descend(cut, local_EBO, moved_EBO, kernels)
            # after the last sweep nobody asks what came before
            state.push(cut, moved_EBO, cut.stop if sweep == sweeps - 1 else 0)
    return Solution(state.quantized(), loss_EO)


def refit_scales(
    w_EOI: Tensor,
    h_EII: Tensor,
    quantized: QuantizedTensor,
    product: Product = torch.bmm,
    packed_EII: Tensor | None = None,
) -> QuantizedTensor:
    """Group by group the scale of least loss for the codes as they are, rounded to its storage type."""
    in_tiles = _InTiles.of(w_EOI, h_EII, quantized, packed_EII)
    if in_tiles is not None:
        return in_tiles.refined(1, descends=False).quantized
    state = _State.of(w_EOI, h_EII, quantized, product)
    for cut in state.cuts():
        moved_EBO = torch.zeros_like(state.gradient_EIO[:, cut])
        state.refit(cut, state.gradient_EIO[:, cut], moved_EBO)
        state.gradient_EIO[:, cut.stop :] += product(h_EII[:, cut.stop :, cut], moved_EBO)
    return replace(quantized, scale=state.scale_EGO.transpose(1, 2).contiguous())


def leanings(w_EOI: Tensor, h_EII: Tensor | None, quantized: QuantizedTensor) -> Tensor:
    """Where each weight would lie best if it alone were free, from its code's value, in grid values, fp16.

    That is the error's gradient over its curvature, held within what rounds to the code: after descent most are.

    Args:
        w_EOI: weights.
        h_EII: damped Hessians in natural column order; None: inputs that say nothing of each other.
        quantized: their codes.
    """
    num_experts, out_features, in_features = w_EOI.shape
    leaning_EOI = torch.empty(w_EOI.shape, dtype=torch.float16, device=w_EOI.device)
    step_EOG1, fmt = quantized.effective_scale()[..., None], quantized.scheme.format
    one = torch.ones((), device=w_EOI.device)
    at_once = max(1, _LEANING_WEIGHTS // in_features)
    for expert, start in itertools.product(range(num_experts), range(0, out_features, at_once)):
        part = (expert, slice(start, start + at_once))
        step_OG1 = step_EOG1[part]
        zero_OG1 = None if quantized.zero is None else quantized.zero[part][..., None]
        value_OGS = decode(quantized.codes[part].unflatten(-1, (step_OG1.shape[-2], -1)), fmt, zero_OG1)
        error_OI = w_EOI[part].float() - (value_OGS * step_OG1).flatten(-2)
        if h_EII is not None:
            error_OI = (error_OI @ h_EII[expert]).div_(h_EII[expert].diagonal())
        leaning_OGS = error_OI.view_as(value_OGS).div_(step_OG1)
        most_OGS = grid_steps(value_OGS, fmt).mul_(_ALMOST_HALF)
        leaning_OGS = torch.minimum(torch.maximum(leaning_OGS, -most_OGS), most_OGS)
        # below a power of two the steps of a float are half as wide
        strays = quantize_values(value_OGS + leaning_OGS, one, zero_OG1, fmt) != value_OGS
        leaning_EOI[part] = torch.where(strays, leaning_OGS / 2, leaning_OGS).flatten(-2).half()
    return leaning_EOI


def grid_steps(values: Tensor, fmt: Format) -> Tensor:
    """The distance from each grid value to the next one away from zero, float32 of the same shape."""
    if fmt.kind is ElementKind.INT:
        return torch.ones_like(values)
    normal = values.abs().clamp_min_(2.0**fmt.min_exponent)
    return torch.ldexp(torch.ones_like(values), torch.frexp(normal).exponent - 1 - fmt.mantissa_bits)


@dataclass(slots=True, eq=False)
class _State:
    """A quantized weight under change: grid values, quantized weights, scales, and the gradient `H (W - Q)`."""

    start: QuantizedTensor
    h_EII: Tensor
    columns: Columns
    value_EIO: Tensor
    q_EIO: Tensor
    gradient_EIO: Tensor
    scale_EGO: Tensor

    @classmethod
    def of(
        cls,
        w_EOI: Tensor,
        h_EII: Tensor,
        quantized: QuantizedTensor,
        product: Product = torch.bmm,
    ) -> _State:
        scales = Scales(quantized.scale, quantized.zero, quantized.global_scale)
        columns = Columns.of(w_EOI, scales, quantized.scheme)
        value_EIO = _values(quantized).transpose(1, 2).contiguous()
        q_EIO = value_EIO * columns.step_EIO
        gradient_EIO = product(h_EII, columns.w_EIO - q_EIO)
        scale_EGO = quantized.scale.transpose(1, 2).contiguous()
        return cls(quantized, h_EII, columns, value_EIO, q_EIO, gradient_EIO, scale_EGO)

    @property
    def fits(self) -> bool:
        """Whether a scale can take any value: neither a power of two nor a share of another scale."""
        return self.start.scheme.format.scale is ScaleKind.MODEL

    def cuts(self) -> list[slice]:
        """Columns that are changed together: a group where scales are refitted, else a block."""
        size = self.q_EIO.shape[1]
        width = size // self.scale_EGO.shape[1] if self.fits else _BLOCK
        return [slice(start, min(start + width, size)) for start in range(0, size, width)]

    def push(self, cut: slice, moved_EBO: Tensor, start: int) -> None:
        """What the columns of `cut` moved by reaches the gradient from column `start` on."""
        self.gradient_EIO[:, start:].baddbmm_(self.h_EII[:, start:, cut], moved_EBO)

    def refit(self, cut: slice, local_EBO: Tensor, moved_EBO: Tensor) -> Tensor:
        """The group's best scale, and what it changes the loss by; `local` is the group's gradient, kept up to date.

        Rows that share a scale share the sums that decide about it: their losses add up.
        """
        group = cut.start // (cut.stop - cut.start)
        old_EO, value_EBO = self.scale_EGO[:, group], self.value_EIO[:, cut]
        curved_EBO = torch.bmm(self.h_EII[:, cut, cut], value_EBO)
        slope_EO, curve_EO = (value_EBO * local_EBO).sum(1), (value_EBO * curved_EBO).sum(1)
        new_EO, less_EO, change_EO = _fitted(old_EO, slope_EO, curve_EO, self.start.scheme)
        moved_EBO.addcmul_(value_EBO, less_EO[:, None])
        local_EBO.addcmul_(curved_EBO, less_EO[:, None])
        self.scale_EGO[:, group], self.columns.step_EIO[:, cut] = new_EO, new_EO[:, None]
        torch.mul(value_EBO, new_EO[:, None], out=self.q_EIO[:, cut])
        return change_EO

    def descend(self, cut: slice, local_EBO: Tensor, moved_EBO: Tensor, kernels: ModuleType | None) -> Tensor:
        """Every code of the columns in turn becomes the best one given all others; what that changes the loss by.

        `local` is used up: it ends with the gradient that each column saw as it moved.
        """
        curvature_EI = self.h_EII.diagonal(dim1=1, dim2=2)
        change_EO = local_EBO.new_zeros(local_EBO.shape[0], local_EBO.shape[2])
        width = _LEAF if kernels is None else _BLOCK
        for start in range(cut.start, cut.stop, width):
            part = slice(start, min(start + width, cut.stop))
            inner = slice(part.start - cut.start, part.stop - cut.start)
            slope_ELO = local_EBO[:, inner]
            if kernels is None:
                step_ELO = self._descend_leaf(part, slope_ELO, curvature_EI)
            else:
                slope_ELO = slope_ELO.contiguous()
                tensors = (slope_ELO, self.q_EIO, self.columns, self.h_EII, self.value_EIO)
                step_ELO = kernels.descend_block(*tensors, part, self.start.scheme.format)
            change_EO += (step_ELO * (2 * slope_ELO + step_ELO * curvature_EI[:, part, None])).sum(1)
            moved_EBO[:, inner] += step_ELO
            rest = slice(part.stop, cut.stop)
            if part.stop < cut.stop:
                local_EBO[:, inner.stop :].baddbmm_(self.h_EII[:, rest, part], step_ELO)
        return change_EO

    def _descend_leaf(self, part: slice, local_ELO: Tensor, curvature_EI: Tensor) -> Tensor:
        moved_ELO = torch.empty_like(local_ELO)
        inverse_EL = curvature_EI[:, part].reciprocal()
        scheme = self.start.scheme
        for i, j in enumerate(range(part.start, part.stop)):
            old_EO = self.q_EIO[:, j]
            target_EO = torch.addcmul(old_EO, local_ELO[:, i], inverse_EL[:, i, None])
            value_EO = self.columns.round(target_EO, j, scheme)
            new_EO = value_EO * self.columns.step_EIO[:, j]
            step_EO = torch.sub(old_EO, new_EO, out=moved_ELO[:, i])
            self.value_EIO[:, j], self.q_EIO[:, j] = value_EO, new_EO
            if j + 1 < part.stop:
                local_ELO[:, i + 1 :].addcmul_(self.h_EII[:, j, j + 1 : part.stop, None], step_EO[:, None])
        return moved_ELO

    def quantized(self) -> QuantizedTensor:
        """Codes and scales as they are now."""
        codes = encode_grouped(self.value_EIO.transpose(1, 2), self.start.zero, self.start.scheme)
        return replace(self.start, codes=codes, scale=self.scale_EGO.transpose(1, 2).contiguous())


class _InTiles(NamedTuple):
    """The same by products in tiles, which are made anew for each gradient from what is left of all columns."""

    start: QuantizedTensor
    w_EIO: Tensor
    h_EII: Tensor
    packed_EII: Tensor
    width: int

    @classmethod
    def of(cls, w_EOI: Tensor, h_EII: Tensor, quantized: QuantizedTensor, packed_EII: Tensor | None) -> _InTiles | None:
        """None where the columns that are changed together are no tiles."""
        fmt, size = quantized.scheme.format, w_EOI.shape[2]
        width = size // quantized.scale.shape[2] if fmt.scale is ScaleKind.MODEL else _BLOCK
        if packed_EII is None or not native.fits_tiles(fmt.block_rows, width):
            return None
        return cls(quantized, w_EOI.transpose(1, 2).float().contiguous(), h_EII, packed_EII, width)

    def refined(self, sweeps: int, *, descends: bool = True) -> Solution:
        start, scheme = self.start, self.start.scheme
        fits = scheme.format.scale is ScaleKind.MODEL
        value_EIO = _values(start).transpose(1, 2).contiguous()
        scales = Scales(start.scale, start.zero, start.global_scale)
        how = native.Sweeps(self.width, sweeps, fits, descends)
        storage = native.Storage(scheme.scale_dtype, *scale_bounds(scheme), scheme.format.block_rows)
        weights = (self.w_EIO, value_EIO, scales, self.h_EII, self.packed_EII)
        step_EGO, loss_EO = native.refine(*weights, scheme.format, how, storage)
        scale = step_EGO.transpose(1, 2).contiguous() if fits else start.scale
        codes = encode_grouped(value_EIO.transpose(1, 2), start.zero, scheme) if descends else start.codes
        return Solution(replace(start, codes=codes, scale=scale), loss_EO)


def _fitted(old_EO: Tensor, slope_EO: Tensor, curve_EO: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """The best scale of a group given its sums, by how much it is less than the old one, and the change of the loss.

    Rows that share a scale share the sums that decide about it: their losses add up.
    """

    def pooled(x_EO: Tensor) -> Tensor:
        return pool_rows(x_EO[..., None], scheme)[..., 0]

    all_curve_EO = pooled(curve_EO)
    wanted_EO = old_EO + torch.where(all_curve_EO > 0, pooled(slope_EO) / all_curve_EO, 0.0)
    # a fit to a few codes may ask for a sign change or a blow-up: the codes would no longer be the nearest ones
    wanted_EO = torch.where((wanted_EO / old_EO - 1).abs() < 0.5, wanted_EO, old_EO)
    new_EO = round_scale(wanted_EO, scheme)
    less_EO = old_EO - new_EO
    change_EO = less_EO * (2 * slope_EO + less_EO * curve_EO)
    is_better_EO = pooled(change_EO) < 0
    new_EO, less_EO = torch.where(is_better_EO, new_EO, old_EO), torch.where(is_better_EO, less_EO, 0.0)
    return new_EO, less_EO, torch.where(is_better_EO, change_EO, 0.0)


def _values(quantized: QuantizedTensor) -> Tensor:
    """Grid values `[E, O, I]`."""
    scheme = quantized.scheme
    if quantized.zero is None:
        return decode(quantized.codes, scheme.format)
    grouped = quantized.codes.unflatten(-1, (quantized.zero.shape[-1], -1))
    return decode(grouped, scheme.format, quantized.zero[..., None]).flatten(-2)
