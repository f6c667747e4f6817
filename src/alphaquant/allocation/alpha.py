"""Calibration-free costs: the heavier the tail of a matrix's spectrum, the better trained it is, and the more it costs.

AlphaQ (arXiv:2606.04980): cost `(median α / α)^γ · Var(W) · 2^(-2b)`, here with the format's relative squared error in
the place of `2^(-2b)` and weighted by the number of weights. α is the Hill estimate on the eigenvalues of `Wᵀ W`, taken
over blocks of one size so that shapes compare (FARMS, arXiv:2506.03470). Shapes: N blocks of S × S.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING

import torch

from alphaquant.allocation.costs import Costs, relative_errors
from alphaquant.models import read_layer
from alphaquant.pipeline.stream import silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from alphaquant.allocation.candidates import Candidate
    from alphaquant.pipeline import Prepared, Progress

__all__ = ["alpha_costs", "hill_alpha", "matrix_alpha"]

_BLOCK = 128
_MAX_BLOCKS = 64  # of one matrix, spread evenly over it
_TAIL = 0.1
_NATS_A_BIT = math.log(4)  # one bit divides the squared error by four


def hill_alpha(eigenvalues_NS: Tensor) -> Tensor:
    """Exponent of the tail of each row of eigenvalues: Hill's estimator on the largest tenth.

    `1 + k / Σ ln(λ_i / λ_{k+1})`, i = 1 … k. NaN where fewer than k + 1 eigenvalues are positive.
    """
    k = max(1, int(_TAIL * eigenvalues_NS.shape[-1]))
    top = eigenvalues_NS.double().topk(k + 1, -1).values
    alpha_N = 1 + k / (top[..., :k] / top[..., k:]).log().sum(-1)
    return torch.where(top[..., k] > 0, alpha_N, torch.nan)


def matrix_alpha(w_OI: Tensor) -> float:
    """Mean α over blocks of 128 × 128 (or what the matrix has), at most 64 of them; NaN for a matrix of zeros."""
    size = (min(_BLOCK, w_OI.shape[0]), min(_BLOCK, w_OI.shape[1]))
    blocks = w_OI.unfold(0, size[0], size[0]).unfold(1, size[1], size[1]).flatten(0, 1)
    if len(blocks) > _MAX_BLOCKS:
        # a prime stride walks over rows and columns of blocks alike
        blocks = blocks[torch.arange(_MAX_BLOCKS, device=w_OI.device) * 7919 % len(blocks)]
    block = blocks.float()
    if size[0] < size[1]:
        block = block.mT
    return float(hill_alpha(torch.linalg.eigvalsh(block.mT @ block)).nanmean())


def alpha_costs(
    prepared: Prepared, candidates: Sequence[Candidate], device: torch.device, progress: Progress = silent
) -> Costs:
    """Costs of every module from its weights alone, read layer by layer.

    γ is chosen so that one standard deviation of ln α over the model's matrices is worth one bit: γ = ln 4 / σ(ln α).
    """
    spec = prepared.spec
    found: dict[str, tuple[float, float, int]] = {}
    seconds = {"read": 0.0, "spectra": 0.0}
    for layer in range(spec.num_layers):
        progress("spectra", layer, spec.num_layers)
        begin = time.perf_counter()
        weights = read_layer(prepared.source, spec, layer, spec.dtype, device)
        seconds["read"] += time.perf_counter() - begin
        begin = time.perf_counter()
        for parameter in spec.parameters(layer):
            if parameter.source is None:
                continue
            stacked = weights[parameter.key]
            matrices = stacked if parameter.num_experts else stacked[None]
            for name, w_OI in zip(spec.module_names(layer, parameter), matrices, strict=True):
                found[name] = (matrix_alpha(w_OI), float(w_OI.float().square().mean()), w_OI.numel())
        seconds["spectra"] += time.perf_counter() - begin
    alphas = [alpha for alpha, _, _ in found.values() if math.isfinite(alpha)]
    median = statistics.median(alphas) if alphas else 1.0
    spread = statistics.pstdev(map(math.log, alphas)) if alphas else 0.0
    gamma = _NATS_A_BIT / spread if spread > 0 else 0.0
    errors = relative_errors(candidates)
    costs: dict[str, tuple[float, ...]] = {}
    facts: dict[str, dict[str, float]] = {}
    for name, (alpha, variance, num_weights) in found.items():
        known = math.isfinite(alpha)
        weight = math.exp(gamma * math.log(median / alpha)) if known else 1.0
        costs[name] = tuple(weight * variance * num_weights * error for error in errors)
        facts[name] = {"alpha": alpha, "variance": variance} if known else {"variance": variance}
    slower = max(seconds, key=seconds.__getitem__)
    settings = {"gamma": gamma, "median_alpha": median, "seconds_by_phase": seconds, "bound_by": slower}
    return Costs(costs, facts, settings)
