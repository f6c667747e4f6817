"""Router repair: a layer's router refitted, on what the quantized model gives it, to the original's logits.

The fit is a ridge regression of the original router's logits on the quantized stream's inputs, the ridge holding it to
the weights that it has: `R' = R + (L₀ - X Rᵀ)ᵀ X (Xᵀ X + λI)⁻¹`. Part of the samples is held out to judge it by.
EAC-MoE (arXiv 2508.01625) calibrates routers so by gradient steps.

Shapes: N samples, L positions, D hidden, E experts, T tokens, K experts of a token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.errors import ConfigError
from alphaquant.models import MoESpec, all_scores, route, router_input
from alphaquant.pipeline.records import RepairRecord
from alphaquant.solver import HessianSum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from alphaquant.models import LayerWeights, ModelSpec
    from alphaquant.pipeline.distributed import Team
    from alphaquant.pipeline.stream import Stream
    from alphaquant.solver import Recipe

__all__ = ["ROUTER", "refit_router", "require_routers"]

ROUTER = "mlp.gate.weight"
"""The key of a layer's router."""
_PERIOD = 4  # the last of so many samples is held out
_RIDGE, _EVIDENCE = 0.01, 0.1  # of the mean square of an input; times inputs over tokens, where that is more


def require_routers(recipe: Recipe, spec: ModelSpec, *, calibrated: bool) -> None:
    """Where routers are to be refitted there are some, and tokens to do it on.

    Raises:
        ConfigError: there are not.
    """
    if not recipe.repair_router or (spec.has_experts and calibrated):
        return
    what, remedy = f"{spec.family} has no routers to refit", "leave --repair-router out"
    if spec.has_experts:
        what, remedy = "routers are refitted on calibration tokens", f"{remedy}, or give --calib"
    raise ConfigError(what, where="--repair-router", remedy=remedy)


@torch.no_grad()
def refit_router(
    x_NLD: Stream,
    original_NLD: Stream,
    weights: LayerWeights,
    spec: ModelSpec,
    layer: int,
    turns: Sequence[slice | Tensor | None],
    team: Team,
) -> tuple[Tensor, RepairRecord]:
    """The refitted router `[E, D]`, rounded to the model's own type, and what it does to held-out samples.

    Args:
        x_NLD: the quantized model's residual stream before the layer's feed-forward.
        original_NLD: the original model's.
        weights: of the layer, its router being the original's.
        spec: the model.
        layer: its number; it has experts.
        turns: chunks of samples, those of this process.
        team: the processes that share the work: the first fits, all judge.
    """
    mlp, router_ED = spec.layers[layer].mlp, weights[ROUTER]
    assert isinstance(mlp, MoESpec)
    num_samples = x_NLD.shape[0]

    def inputs(turn: slice | Tensor, *, held_out: bool) -> tuple[Tensor, Tensor]:
        """What both models' routers read of a chunk's samples on one side of the split."""
        numbers = torch.arange(num_samples)[turn]
        period = min(_PERIOD, num_samples)
        some = numbers[(numbers % period == period - 1) == held_out]
        return router_input(x_NLD[some], weights, spec), router_input(original_NLD[some], weights, spec)

    width, takes = spec.hidden_size, [range(int(rank == 0)) for rank in range(team.size)]
    gram = HessianSum(1, width, 1.0, x_NLD.device)
    cross_ED = torch.zeros(router_ED.shape, device=x_NLD.device)
    for turn in turns:
        rows = torch.empty(0, width + mlp.num_experts, device=x_NLD.device)
        if turn is not None:
            own_TD, target_TD = inputs(turn, held_out=False)
            short_TE = F.linear(target_TD.float(), router_ED.float()) - F.linear(own_TD.float(), router_ED.float())
            rows = torch.cat([own_TD.float(), short_TE], 1)
        for part, _ in [(rows, None)] if team.size == 1 else team.exchange(rows, None, 1, takes):
            own_TD, short_TE = part.split([width, mlp.num_experts], 1)
            gram.add(own_TD.to(x_NLD.dtype))
            cross_ED += short_TE.T @ own_TD
    refitted_ED = (router_ED.float() + _solution(gram, cross_ED)).to(spec.dtype)
    team.spread(refitted_ED, 0)
    both = [weights, weights | {ROUTER: refitted_ED.to(router_ED.dtype)}]
    found: list[list[float]] = []
    for turn in turns:
        if turn is None:
            continue
        own_TD, target_TD = inputs(turn, held_out=True)
        chosen_TK, target_TE = route(target_TD, weights, mlp).topk_ids_TK, _shares(target_TD, router_ED, mlp)
        sums = [float(len(own_TD))]
        for tried in both:
            same = (route(own_TD, tried, mlp).topk_ids_TK[:, :, None] == chosen_TK[:, None]).any(-1)
            own_TE = _shares(own_TD, tried[ROUTER], mlp)
            sums += [float(same.sum()) / mlp.top_k, float((target_TE * (target_TE.log() - own_TE.log())).sum())]
        found.append(sums)
    told = [sums for part in team.tell(found) for sums in part]
    tokens, *totals = (math.fsum(column) for column in zip(*told, strict=True))
    agreement, kl, agreement_after, kl_after = (total / tokens for total in totals)
    return refitted_ED, RepairRecord(int(tokens), agreement, agreement_after, kl, kl_after, kl_after < kl)


def _solution(gram: HessianSum, cross_ED: Tensor) -> Tensor:
    """What the ridge regression adds to the router; zeros where there is nothing to be had."""
    tokens = int(gram.evidence.tokens_E[0])
    mean_DD = gram.normalized()[0]
    ridge = max(_RIDGE, _EVIDENCE * len(mean_DD) / max(tokens, 1)) * mean_DD.diagonal().mean()
    factor_DD, failed = torch.linalg.cholesky_ex(mean_DD.double() + ridge * torch.eye(len(mean_DD)).to(mean_DD))
    if failed:
        return torch.zeros_like(cross_ED)
    return torch.cholesky_solve(cross_ED.T.double() / tokens, factor_DD).T.float()


def _shares(x_TD: Tensor, router_ED: Tensor, mlp: MoESpec) -> Tensor:
    """Scores of all experts as shares of one: those of sigmoids are divided by their sum."""
    scores_TE = all_scores(x_TD, router_ED, mlp).clamp_min(torch.finfo(torch.float32).tiny)
    return scores_TE / scores_TE.sum(-1, keepdim=True)
