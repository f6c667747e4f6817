"""Feed-forward half of a layer: dense, or routed experts with shared ones beside them.

Shapes: T tokens, K experts of a token, R = T * K routed rows, E experts, D hidden, F inner width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from alphaquant.models import native
from alphaquant.models.linear import expert_linear, linear
from alphaquant.models.spec import MLPSpec, MoESpec, Scoring, Source
from alphaquant.models.tap import Choice, Routing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from alphaquant.models.tap import Tap

__all__ = ["all_scores", "feed_forward", "route"]

_TINY = 1e-20  # sigmoids may all be zero


def all_scores(x_TD: Tensor, router_ED: Tensor, spec: MoESpec) -> Tensor:
    """Scores `[T, E]` of all experts in fp32, before any is chosen."""
    if spec.exact_logits:
        x_TD, router_ED = x_TD.float(), router_ED.float()
    logits_TE = F.linear(x_TD, router_ED).float()
    return logits_TE.sigmoid() if spec.scoring is Scoring.SIGMOID else logits_TE.softmax(-1)


def route(x_TD: Tensor, weights: Mapping[str, Tensor], spec: MoESpec) -> Choice:
    """Scores of all experts in fp32, then top-k, renormalised and scaled only where the model says so."""
    all_TE = all_scores(x_TD, weights["mlp.gate.weight"], spec)
    if spec.scoring is Scoring.SIGMOID:
        merit_TE = _of_best_groups(all_TE + weights["mlp.gate.e_score_correction_bias"], spec, 2, -torch.inf)
        topk_ids_TK = merit_TE.topk(spec.top_k, -1).indices
        score_TK = all_TE.gather(-1, topk_ids_TK)
    else:
        score_TK, topk_ids_TK = _of_best_groups(all_TE, spec, 1, 0.0).topk(spec.top_k, -1)
    if spec.normalize_top_k:
        score_TK = score_TK / (score_TK.sum(-1, keepdim=True) + _TINY)
    if spec.routed_scaling != 1.0:
        score_TK = score_TK * spec.routed_scaling
    return Choice(topk_ids_TK, score_TK)


def _of_best_groups(merit_TE: Tensor, spec: MoESpec, num_best: int, without: float) -> Tensor:
    """Merits, those outside the best groups replaced; a group counts as the sum of its best `num_best` experts."""
    if spec.top_groups == spec.num_groups:
        return merit_TE
    grouped: Tensor = merit_TE.unflatten(-1, (spec.num_groups, -1))
    chosen = grouped.topk(num_best, -1).values.sum(-1).topk(spec.top_groups, -1).indices
    is_out = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=merit_TE.device).scatter(-1, chosen, value=False)
    return merit_TE.masked_fill(is_out.repeat_interleave(grouped.shape[-1], -1), without)


def feed_forward(
    x_BLD: Tensor,
    weights: Mapping[str, Tensor],
    spec: MLPSpec | MoESpec,
    tap: Tap | None = None,
    choice: Choice | None = None,
) -> Tensor:
    """Feed-forward block on normed inputs `[B, L, D]`, without the residual.

    With a `tap` it shows every linear's input and skips the last products: the result is then meaningless. With a
    `choice` the router is not asked.
    """
    x_TD = x_BLD.flatten(0, -2)
    if isinstance(spec, MLPSpec):
        if tap is not None:
            tap(Source.MLP_IN, x_TD)
        out = _mlp(x_TD, weights, "mlp", Source.MLP_HIDDEN, None, tap)
        return out.view_as(x_BLD) if tap is None else x_BLD
    out = _routed(x_TD, weights, spec, tap, choice)
    if spec.shared is not None:
        gate = None
        if spec.shared_gate:
            gate = torch.sigmoid(F.linear(x_TD, weights["mlp.shared_expert_gate.weight"]))
        routing = None if gate is None else Routing(torch.tensor([x_TD.shape[0]]), gate[:, 0].float())
        if tap is not None:
            tap(Source.SHARED_IN, x_TD, routing)
        shared = _mlp(x_TD, weights, "mlp.shared_expert", Source.SHARED_HIDDEN, routing, tap)
        if tap is None:
            out = out + (shared if gate is None else shared * gate)
    return out.view_as(x_BLD) if tap is None else x_BLD


def _mlp(
    x_TD: Tensor,
    weights: Mapping[str, Tensor],
    prefix: str,
    hidden_source: Source,
    routing: Routing | None,
    tap: Tap | None,
) -> Tensor:
    def project(name: str, x: Tensor) -> Tensor:
        return linear(x, weights, f"{prefix}.{name}")

    hidden_TF = _swiglu(project("gate_proj", x_TD), project("up_proj", x_TD))
    if tap is not None:
        tap(hidden_source, hidden_TF, routing)
        return x_TD
    return project("down_proj", hidden_TF)


def _routed(
    x_TD: Tensor, weights: Mapping[str, Tensor], spec: MoESpec, tap: Tap | None, choice: Choice | None
) -> Tensor:
    choice = route(x_TD, weights, spec) if choice is None else choice
    expert_R = choice.topk_ids_TK.flatten()
    order_R = expert_R.short().argsort(stable=True)  # small integers are sorted in a third of the time
    counts_E = expert_R.bincount(minlength=spec.num_experts)
    x_RD = x_TD.index_select(0, order_R // spec.top_k)
    if tap is not None:
        routing = Routing(counts_E, choice.score_TK.flatten().index_select(0, order_R), choice)
        tap(Source.MLP_IN, x_TD)
        tap(Source.EXPERT_IN, x_RD, routing)
        tap(Source.EXPERT_HIDDEN, _expert_hidden(x_RD, counts_E, weights), routing)
        return x_TD
    out_RD = expert_linear(_expert_hidden(x_RD, counts_E, weights), counts_E, weights, "mlp.experts.down_proj")
    # gathers and a sum in fixed order give the same result on every device; scattered adds would not
    place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    place_TK = place_R.view_as(choice.topk_ids_TK)
    if native.fits(out_RD, width=out_RD.shape[1]):
        return native.combine(out_RD, place_TK, choice.score_TK.contiguous())
    score_TK = choice.score_TK.to(x_TD.dtype)
    total_TD = out_RD.index_select(0, place_TK[:, 0]) * score_TK[:, 0, None]
    for k in range(1, spec.top_k):
        total_TD = torch.addcmul(total_TD, out_RD.index_select(0, place_TK[:, k]), score_TK[:, k, None])
    return total_TD


def _expert_hidden(x_RD: Tensor, counts_E: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    gate, up = (expert_linear(x_RD, counts_E, weights, f"mlp.experts.{name}") for name in ("gate_proj", "up_proj"))
    return _swiglu(gate, up)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return native.swiglu(gate, up) if native.fits(gate, up, width=gate.numel()) else F.silu(gate) * up
