"""Calibration windows that every expert sees: more are drawn than are kept, and the original's routing chooses.

Shapes: N windows drawn, L positions, D hidden, X experts of all layers in a row, K experts of a token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from alphaquant.calibration import token_digest
from alphaquant.errors import ConfigError
from alphaquant.models import MoESpec, expert_choice, read_outer
from alphaquant.pipeline.stream import Progress, chunks, embed, silent, through

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.calibration import TokenBatch
    from alphaquant.models import LayerWeights, ModelSpec, TensorSource

__all__ = ["CANDIDATES", "balanced", "choose_windows", "require_experts"]

CANDIDATES = 4
"""Windows drawn for each that is kept."""


def require_experts(spec: ModelSpec) -> None:
    """Refuse to balance what has no experts.

    Raises:
        ConfigError: the model is dense.
    """
    if not spec.has_experts:
        raise ConfigError(f"{spec.family} has no experts to balance", where="--balance", remedy="leave --balance out")


def balanced(
    source: TensorSource,
    spec: ModelSpec,
    drawn: TokenBatch,
    num_kept: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = silent,
) -> TokenBatch:
    """The windows of `drawn` that raise the least-used experts' tokens most, in the order drawn, with the coverage.

    Coverage is told before (as expected of windows kept at random) and after: tokens of the least-used expert, and
    the mean of the tenth of all experts that see least.
    """
    counts_NX = _routing_counts(source, spec, drawn.ids, dtype, device, progress)
    num_kept = min(num_kept, len(drawn.ids))
    kept = choose_windows(counts_NX, num_kept)
    expected_X = counts_NX.double().mean(0) * num_kept
    ids = drawn.ids[kept].contiguous()
    coverage = {
        "drawn": len(drawn.ids),
        "before": _coverage(expected_X),
        "after": _coverage(counts_NX[kept].double().sum(0)),
    }
    return replace(drawn, ids=ids, digest=token_digest(ids), coverage=coverage)


def choose_windows(counts_NX: Tensor, num_kept: int) -> Tensor:
    """Greedy choice of windows by the gain in `Σ log(1 + tokens)` over all experts; sorted indices.

    The objective is submodular, so the greedy choice is within 1 - 1/e of the best one (Nemhauser et al. 1978).
    """
    counts_NX = counts_NX.double()
    total_X = torch.ones_like(counts_NX[0])
    free_N = torch.ones(len(counts_NX), dtype=torch.bool)
    for _ in range(num_kept):
        gain_N = (counts_NX / total_X).log1p_().sum(1)
        best = int(torch.where(free_N, gain_N, -1.0).argmax())
        free_N[best] = False
        total_X += counts_NX[best]
    return (~free_N).nonzero()[:, 0]


@torch.no_grad()
def _routing_counts(
    source: TensorSource, spec: ModelSpec, ids_NL: Tensor, dtype: torch.dtype, device: torch.device, progress: Progress
) -> Tensor:
    """How many tokens of each window the original routes to each expert of each layer."""
    outer: LayerWeights = read_outer(source, spec, dtype, device)
    x_NLD = embed(ids_NL, outer["model.embed_tokens.weight"])
    counts: list[Tensor] = []
    for layer, weights in through(x_NLD, source, spec, dtype, "balance", progress):
        if isinstance(spec.layers[layer].mlp, MoESpec):
            counts.append(torch.cat([_count(x_NLD[cut], weights, spec, layer) for cut in chunks(*ids_NL.shape)]))
    return torch.cat(counts, 1)


def _count(x_BLD: Tensor, weights: LayerWeights, spec: ModelSpec, layer: int) -> Tensor:
    choice = expert_choice(x_BLD, weights, spec, layer)
    mlp = spec.layers[layer].mlp
    assert isinstance(mlp, MoESpec)
    chosen = choice.topk_ids_TK.reshape(len(x_BLD), -1).cpu()
    return torch.zeros(len(x_BLD), mlp.num_experts).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float))


def _coverage(tokens_X: Tensor) -> dict[str, float]:
    lowest = tokens_X.sort().values[: max(1, len(tokens_X) // 10)]
    return {"least": round(float(tokens_X.min()), 1), "lowest_tenth": round(float(lowest.mean()), 1)}
