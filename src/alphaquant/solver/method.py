"""The whole method for one stack of matrices that share a scheme: weights and Hessians in, codes and records out.

Shapes: E experts, O rows, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import TYPE_CHECKING

import torch

from alphaquant.formats import ScaleKind, matrix_scale, round_scale
from alphaquant.numerics import rough_product
from alphaquant.solver import native
from alphaquant.solver.backend import Backend
from alphaquant.solver.bands import bands
from alphaquant.solver.equalize import Moves, Permute, channel_order, equalizing_scales
from alphaquant.solver.factor import Factor, damp, factorize, reorder, shrink
from alphaquant.solver.gptq import Solution, better_rows, columns_first, solve
from alphaquant.solver.refine import leanings, refine, refit_scales
from alphaquant.solver.rtn import round_to_nearest
from alphaquant.solver.scales import Scales, absmax_scales, search_scales, whole_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from alphaquant.formats import QuantizedTensor, Scheme

__all__ = [
    "SPENDING",
    "WORKSPACE_WEIGHTS",
    "Effort",
    "Method",
    "Outcome",
    "Recipe",
    "Spending",
    "experts_a_part",
    "is_thin",
    "moved",
    "quantize_stack",
    "trusted",
]

WORKSPACE_WEIGHTS = 1 << 24  # weights solved at a time; about ten fp32 copies of them are alive


class Method(Enum):
    """How codes are chosen."""

    GPTQ = "gptq"
    RTN = "rtn"


class Effort(Enum):
    """How much is spent: absmax scales and one walk; scale search, three walks and refinement; more, and tuning."""

    FAST = "fast"
    DEFAULT = "default"
    BEST = "best"


@dataclass(frozen=True, slots=True)
class Spending:
    """What an effort pays for beyond one walk.

    Attributes:
        search: whether scales are searched before; else they cover every weight.
        shifts: more walks with all scales shifted so many times `_SHIFT / 2^bits`, relatively.
        refits: more walks with the scales refitted to the best codes so far.
        sweeps: of refinement: over all groups, scale first, then codes.
        tuning: steps by gradient, of all linears of a half-layer together.
    """

    search: bool = True
    shifts: tuple[int, ...] = ()
    refits: int = 0
    sweeps: int = 0
    tuning: int = 0

    @property
    def walks(self) -> int:
        """All of them."""
        return 1 + len(self.shifts) + self.refits


SPENDING = {
    Effort.FAST: Spending(search=False),
    Effort.DEFAULT: Spending(shifts=(1,), refits=1, sweeps=2),
    Effort.BEST: Spending(shifts=(1, -1), refits=3, sweeps=6, tuning=96),
}
_SHIFT = 0.6


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of the method.

    Attributes:
        method: GPTQ, or round to nearest.
        effort: how much is spent on scales and refinement.
        act_order: walk columns by falling Hessian diagonal, groups staying where they are.
        block_size: columns that are walked before their errors reach the rest; speed only.
        damping: least damping, relative to the mean diagonal.
        tuned_damping: the same where codes are tuned afterwards, which makes up for what it costs.
        damping_evidence: damping is at least this times inputs / effective samples.
        shrinkage: Hessians are mixed with so many samples' worth of their own diagonal, as a share of the inputs.
        routing_power: a routed row weighs its score to this power.
        rtn_below: experts with fewer effective samples than this share of their inputs are rounded to nearest.
        repair_router: refit each layer's router to the logits of the original model's.
        equalize: scale the hidden channels of feed-forward blocks so that `down` loses less, and `up` makes up for it.
        permute: what hidden channels of feed-forward blocks are sorted by, so that those alike share groups of `down`.
        asymmetric_target: how far weights move, before they are quantized, toward what makes of the quantized model's
            inputs the outputs that they make of the original's: 0 not at all, 1 all the way.
        tune_steps: by gradient, of all linears of a half-layer together; None: what the effort spends.
        backend: what runs the inner loops; speed only, up to the order of sums.
    """

    method: Method = Method.GPTQ
    effort: Effort = Effort.DEFAULT
    act_order: bool = True
    block_size: int = 128
    damping: float = 0.01
    tuned_damping: float = 0.3
    damping_evidence: float = 0.1
    shrinkage: float = 0.0
    routing_power: float = 1.0
    rtn_below: float = 1 / 32
    repair_router: bool = False
    equalize: bool = True
    permute: Permute = Permute.NONE
    asymmetric_target: float = 0.0
    tune_steps: int | None = None
    backend: Backend = Backend.AUTO

    @property
    def pairs(self) -> bool:
        """Whether inputs are paired with the original model's."""
        return self.method is Method.GPTQ and self.asymmetric_target > 0

    @property
    def moves(self) -> bool:
        """Whether hidden channels of feed-forward blocks move before they are quantized."""
        return self.equalize or self.permute is not Permute.NONE

    @property
    def tuning(self) -> int:
        """Steps of tuning: none where nothing is to be calibrated."""
        if self.method is Method.RTN:
            return 0
        return SPENDING[self.effort].tuning if self.tune_steps is None else self.tune_steps


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Codes of a stack and what choosing them cost.

    Attributes:
        quantized: codes and scales `[E, O, I]`.
        loss_EO: `e H eᵀ` of each row under the damped mean Hessian; the squared error without calibration.
        energy_EO: `w H wᵀ` of each row, roughly: loss over energy is the relative error of the output.
        damping_E: damping used; zero where rounded to nearest.
        retries_E: how often the damping was raised to make the factorisation succeed.
        fallback_E: true where GPTQ was asked for and the evidence was too thin.
        channel_EI: the input column that each column of the codes was.
        scale_EI: what the inputs must be multiplied by, in that order; codes are those of weights divided by it.
        leaning_EOI: see `leanings`; None where nobody asked.
    """

    quantized: QuantizedTensor
    loss_EO: Tensor
    energy_EO: Tensor
    damping_E: Tensor
    retries_E: Tensor
    fallback_E: Tensor
    channel_EI: Tensor
    scale_EI: Tensor
    leaning_EOI: Tensor | None = None


def experts_a_part(out_features: int, in_features: int, workspace: int = WORKSPACE_WEIGHTS) -> int:
    """How many matrices of this shape are solved together: neither they nor their Hessians exceed the workspace."""
    return max(1, workspace // (max(out_features, in_features) * in_features))


def quantize_stack(
    w_EOI: Tensor,
    h_EII: Tensor | None,
    effective_E: Tensor | None,
    scheme: Scheme,
    recipe: Recipe,
    workspace: int = WORKSPACE_WEIGHTS,
    *,
    shift_EII: Tensor | None = None,
    moves: bool = False,
    leans: bool = False,
) -> Outcome:
    """Quantize a stack of matrices; experts and rows go through in parts that bound the workspace.

    Args:
        w_EOI: weights, any float type, not changed.
        h_EII: mean Hessians of their inputs, fp32, not changed; None without calibration: plain rounding.
        effective_E: effective sample sizes behind the Hessians.
        scheme: number format and groups.
        recipe: settings.
        workspace: weights solved at a time; memory only.
        shift_EII: means of `(x₀ - x)ᵀ x`, of the original's inputs x₀; what is quantized then are weights as `moved`.
        moves: whether columns may change places and be scaled, where the recipe says so; see `Outcome.scale_EI`.
        leans: whether codes are tuned afterwards, so that `Outcome.leaning_EOI` is wanted.
    """
    num_experts, out_features, in_features = w_EOI.shape
    if h_EII is None or effective_E is None or recipe.method is Method.RTN:
        fallback_E = torch.zeros(num_experts, dtype=torch.bool)
        rounded_E = torch.ones(num_experts, dtype=torch.bool)
    else:
        rounded_E = fallback_E = is_thin(effective_E.cpu(), in_features, recipe)
    at_once = experts_a_part(out_features, in_features, workspace)
    order, parts = [], []
    for is_rounded in (True, False):
        for experts in (rounded_E == is_rounded).nonzero()[:, 0].split(at_once):
            if experts.numel() == 0:
                continue
            # all of them lie there already: a copy would take as long as half a factorisation
            index = slice(None) if len(experts) == num_experts else experts.to(w_EOI.device)
            h_part, damping_E = None, None
            if h_EII is not None and effective_E is not None:
                h_part, damping_E = trusted(h_EII[index], effective_E[experts], recipe, is_tuned=leans)
            part = _quantize_part(
                w_EOI[index],
                h_part,
                damping_E,
                scheme,
                recipe,
                workspace,
                shift_EII=None if shift_EII is None else shift_EII[index],
                rounded=is_rounded,
                moves=moves,
                leans=leans,
            )
            parts.append(replace(part, fallback_E=fallback_E[experts]))
            order.append(experts)
    return _map(lambda *x: torch.cat(x)[torch.cat(order).argsort().to(x[0].device)], parts)


def trusted(h_EII: Tensor, effective_E: Tensor, recipe: Recipe, *, is_tuned: bool = False) -> tuple[Tensor, Tensor]:
    """Hessians as far as the evidence carries them, and their damping.

    The fewer samples an input has, the more its correlations are shrunk and the more it is damped.
    """
    in_features, least = h_EII.shape[1], recipe.tuned_damping if is_tuned else recipe.damping
    damping_E = (recipe.damping_evidence * in_features / effective_E.clamp_min(1)).clamp_min(least).float()
    return shrink(h_EII, effective_E, recipe.shrinkage * in_features), damping_E


def moved(w_EOI: Tensor, shift_EII: Tensor, factor: Factor, strength: float) -> Tensor:
    """Weights that make of inputs x what `w` makes of the original's x₀, as nearly as damped least squares can.

    `w + strength · w (x₀ - x)ᵀx (xᵀx + λ)⁻¹`, fp32: the target of GPTAQ (Li et al. 2025, arXiv 2504.02692) and Qronos
    (Zhang et al. 2025, arXiv 2505.11695) before anything is rounded.

    Args:
        w_EOI: weights.
        shift_EII: means of `(x₀ - x)ᵀ x`.
        factor: of the damped mean Hessian `xᵀx`.
        strength: 1 for all the way.
    """
    w_EOI = w_EOI.float()
    return w_EOI + strength * factor.divided(w_EOI @ shift_EII)


def is_thin(effective_E: Tensor, in_features: int, recipe: Recipe) -> Tensor:
    """Whether the evidence is too thin for GPTQ, so that an expert is rounded to nearest."""
    return effective_E < recipe.rtn_below * in_features


def _quantize_part(
    w_EOI: Tensor,
    h_EII: Tensor | None,
    damping_E: Tensor | None,
    scheme: Scheme,
    recipe: Recipe,
    workspace: int,
    *,
    shift_EII: Tensor | None,
    rounded: bool,
    moves: bool,
    leans: bool,
) -> Outcome:
    num_experts, _, in_features = w_EOI.shape
    nothing_E = torch.zeros(num_experts)
    channel_EI, scale_EI = Moves.none(num_experts, in_features, w_EOI.device)
    factor, damped_EII, packed_EII = None, None, None
    if h_EII is not None and damping_E is not None:
        if not rounded:
            factor = factorize(h_EII, damping_E, act_order=recipe.act_order, backend=recipe.backend)
            damping_E = factor.damping_E
        damped_EII = damp(h_EII, damping_E)
        if factor is not None and shift_EII is not None:
            w_EOI = moved(w_EOI, shift_EII, factor, recipe.asymmetric_target)
        if moves and recipe.permute is not Permute.NONE and factor is not None:
            channel_EI = channel_order(w_EOI, factor.in_natural_order(), recipe.permute)
            factor, damped_EII = factor.reordered(channel_EI), reorder(damped_EII, channel_EI)
            w_EOI = w_EOI.gather(2, channel_EI[:, None].expand_as(w_EOI))
        if moves and recipe.equalize and factor is not None:
            scale_EI = equalizing_scales(w_EOI, factor.in_natural_order(), scheme)
            factor = factor.scaled(scale_EI, recipe.backend)
            damped_EII *= scale_EI[:, :, None] * scale_EI[:, None]
            w_EOI = w_EOI / scale_EI[:, None]
        if factor is not None and factor.packed_EII is not None:
            packed_EII = native.packed(damped_EII)
    # a matrix has one scale of its own in NVFP4, whichever rows are solved together
    global_scale_E = matrix_scale(w_EOI) if scheme.format.scale is ScaleKind.E4M3 else None
    parts = []
    for w_part in w_EOI.split(whole_blocks(workspace // (num_experts * in_features), scheme), 1):
        w_part_EOI = w_part.float()
        solution = _solve_rows(w_part_EOI, damped_EII, packed_EII, factor, scheme, recipe, global_scale_E)
        codes = columns_first(solution.quantized.codes.transpose(1, 2), recipe.backend)
        outcome = Outcome(
            quantized=replace(solution.quantized, codes=codes),
            loss_EO=solution.loss_EO,
            energy_EO=_energy(w_part_EOI, damped_EII),
            damping_E=nothing_E if factor is None else factor.damping_E.cpu(),
            retries_E=nothing_E.long() if factor is None else factor.retries_E.cpu(),
            fallback_E=nothing_E.bool(),
            channel_EI=channel_EI,
            scale_EI=scale_EI,
            leaning_EOI=leanings(w_part_EOI, damped_EII, solution.quantized) if leans else None,
        )
        parts.append(outcome)
    together = _map(lambda *x: torch.cat(x, 1) if x[0].ndim > 1 else x[0], parts)
    return replace(together, channel_EI=channel_EI, scale_EI=scale_EI)


def _energy(w_EOI: Tensor, h_EII: Tensor | None) -> Tensor:
    """`w H wᵀ` of each row, roughly; expert by expert, since memory for all of them at once takes longer to be had."""
    if h_EII is None:
        return w_EOI.square().sum(-1)
    energy_EO = w_EOI.new_zeros(w_EOI.shape[:2])
    for w_OI, h_II, energy_O in zip(w_EOI, h_EII, energy_EO, strict=True):
        for start, end in bands(len(h_II)):  # what lies right of a band's square lies below it, too
            moved_OI = rough_product(w_OI[:, start:end], h_II[start:end, start:])
            moved_OI[:, end - start :] *= 2
            energy_O.add_((moved_OI * w_OI[:, start:]).sum(-1))
    return energy_EO


def _solve_rows(
    w_EOI: Tensor,
    damped_EII: Tensor | None,
    packed_EII: Tensor | None,
    factor: Factor | None,
    scheme: Scheme,
    recipe: Recipe,
    global_scale_E: Tensor | None,
) -> Solution:
    spending = SPENDING[recipe.effort]
    if factor is None or damped_EII is None:
        rounded = round_to_nearest(w_EOI, scheme, absmax_scales(w_EOI, scheme, global_scale_E), damped_EII)
        if not spending.search:
            return rounded
        importance_EI = None if damped_EII is None else damped_EII.diagonal(dim1=1, dim2=2)
        scales = search_scales(w_EOI, scheme, importance_EI, global_scale_E, recipe.backend)
        # errors of correlated inputs add up: the search sees single columns, so it may lose to where it began
        return better_rows(rounded, round_to_nearest(w_EOI, scheme, scales, damped_EII))
    if spending.search:
        scales = search_scales(w_EOI, scheme, global_scale_E=global_scale_E, backend=recipe.backend)
    else:
        scales = absmax_scales(w_EOI, scheme, global_scale_E)
    w_EOI = columns_first(w_EOI, recipe.backend).transpose(1, 2)  # once, and not in every step
    solution = _best_walk(w_EOI, damped_EII, packed_EII, factor, scheme, scales, recipe)
    if spending.sweeps == 0:
        return solution
    return refine(w_EOI, damped_EII, solution, sweeps=spending.sweeps, backend=recipe.backend, packed_EII=packed_EII)


def _best_walk(
    w_EOI: Tensor,
    damped_EII: Tensor,
    packed_EII: Tensor | None,
    factor: Factor,
    scheme: Scheme,
    scales: Scales,
    recipe: Recipe,
) -> Solution:
    """Several walks, each row from the one that loses least.

    What a walk rounds is spread wider than the weights, by the errors that were fed back; so no scale that is chosen
    before it is the best one. Scales that are powers of two cannot be shifted by a little.
    """
    spending = SPENDING[recipe.effort]

    def walk(scales: Scales) -> Solution:
        return solve(w_EOI, factor, scheme, scales, recipe.block_size, recipe.backend)

    best = walk(scales)
    if scheme.format.scale is ScaleKind.E8M0:
        return best
    for shift in spending.shifts:
        factor_of = 1 + shift * _SHIFT / 2**scheme.format.bits
        shifted = replace(scales, scale=round_scale(scales.scale * factor_of, scheme))
        best = better_rows(best, walk(shifted))
    for _ in range(spending.refits if scheme.format.scale is ScaleKind.MODEL else 0):
        # rough products: scales are rounded after all, and whether they are better is seen by their walk
        refitted = refit_scales(w_EOI, damped_EII, best.quantized, rough_product, packed_EII)
        best = better_rows(best, walk(Scales(refitted.scale, refitted.zero, refitted.global_scale)))
    return best


def _map(join: Callable[..., Tensor], parts: list[Outcome]) -> Outcome:
    """Join the tensors of several outcomes."""
    quantized = [part.quantized for part in parts]

    def each(name: str, owners: Sequence[object]) -> Tensor:
        return join(*(getattr(owner, name) for owner in owners))

    first = quantized[0]
    return Outcome(
        quantized=replace(
            first,
            codes=each("codes", quantized),
            scale=each("scale", quantized),
            zero=None if first.zero is None else each("zero", quantized),
            global_scale=None if first.global_scale is None else each("global_scale", quantized),
        ),
        **{
            field.name: each(field.name, parts)
            for field in fields(Outcome)
            if field.name != "quantized" and getattr(parts[0], field.name) is not None
        },
    )
