"""Hessian sums of the inputs of linears, an expert each, and what the routing says of their evidence.

Shapes: E experts (1 for a plain linear), I inputs, R rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["Evidence", "HessianSum"]


class Evidence(NamedTuple):
    """What an expert saw: rows, the sum of their scores, and the effective sample size `(Σc)² / Σc²`."""

    tokens_E: Tensor
    score_mass_E: Tensor
    effective_E: Tensor


class HessianSum:
    """`Σ c · x xᵀ` for each expert, stored as a sum with its weights and counts, so that parts add exactly.

    Args:
        num_experts: 1 for a linear that sees every token.
        in_features: I.
        power: rows weigh `score ** power` (MoEQuant's affinity-guided Hessian is power 1).
        device: where the sums live.
    """

    def __init__(self, num_experts: int, in_features: int, power: float, device: torch.device | str = "cpu") -> None:
        self.power = power
        self.sum_EII = torch.zeros(num_experts, in_features, in_features, device=device)
        self._weight_E = torch.zeros(num_experts, dtype=torch.float64)
        self._square_E = torch.zeros(num_experts, dtype=torch.float64)
        self._score_E = torch.zeros(num_experts, dtype=torch.float64)
        self._tokens_E = torch.zeros(num_experts, dtype=torch.int64)

    def add(self, x_RI: Tensor, counts: list[int] | None = None, score_R: Tensor | None = None) -> None:
        """Add rows, sorted by expert with `counts` rows each; `score_R` are their routing scores in the same order."""
        counts = [x_RI.shape[0]] if counts is None else counts
        weight_R = None if score_R is None else score_R.float() ** self.power
        for expert, rows in enumerate(_ranges(counts)):
            if rows.start == rows.stop:
                continue
            count = rows.stop - rows.start
            weight = None if weight_R is None else weight_R[rows]
            self._tokens_E[expert] += count
            self._score_E[expert] += count if score_R is None else score_R[rows].sum(dtype=torch.float64).item()
            self._weight_E[expert] += count if weight is None else weight.sum(dtype=torch.float64).item()
            self._square_E[expert] += count if weight is None else weight.double().square().sum().item()
            _add_gram(self.sum_EII[expert], x_RI[rows], weight)

    def normalized(self, experts: slice = slice(None)) -> Tensor:
        """Mean Hessians `[E, I, I]` a unit of weight; zero for an expert that saw nothing."""
        weight = self._weight_E[experts].clamp_min(torch.finfo(torch.float32).tiny)
        return self.sum_EII[experts] / weight.float().to(self.sum_EII.device)[:, None, None]

    @property
    def evidence(self) -> Evidence:
        """Rows, score mass and effective sample size of each expert."""
        effective = self._weight_E.square() / self._square_E.clamp_min(torch.finfo(torch.float64).tiny)
        return Evidence(self._tokens_E.clone(), self._score_E.clone(), effective)


def _ranges(counts: list[int]) -> Iterator[slice]:
    start = 0
    for count in counts:
        yield slice(start, start + count)
        start += count


def _add_gram(sum_II: Tensor, x_RI: Tensor, weight_R: Tensor | None) -> None:
    """`sum += xᵀ diag(weight) x` in fp32.

    Rows are scaled by √weight before the product, so the sum stays symmetric and positive semi-definite. bf16
    activations go through bf16 products with fp32 sums: exact for plain rows, and the Gram matrix of rows rounded
    once to bf16 for weighted ones.
    """
    rows = x_RI.float()
    if weight_R is not None:
        rows = rows * weight_R.sqrt()[:, None]
    rows_IR = rows.T.contiguous()
    if x_RI.dtype is not torch.bfloat16 or x_RI.device.type != "cpu":
        sum_II.addmm_(rows_IR, rows_IR.T)
        return
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        sum_II.addmm_(rows_IR, rows_IR.T)
    finally:
        torch.set_float32_matmul_precision(before)
