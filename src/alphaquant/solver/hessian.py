"""Hessian sums of the inputs of linears, an expert each, and what the routing says of their evidence.

Shapes: E experts (1 for a plain linear), I inputs, R rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.numerics import bf16_products
from alphaquant.solver.backend import Backend, kernels_for
from alphaquant.solver.bands import bands, mirrored

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Evidence", "EvidenceSum", "HessianSum"]

_ROWS = 256


class Evidence(NamedTuple):
    """What an expert saw: rows, the sum of their scores, and the effective sample size `(Σc)² / Σc²`."""

    tokens_E: Tensor
    score_mass_E: Tensor
    effective_E: Tensor


class EvidenceSum:
    """Counts and score sums for each expert; parts add exactly.

    Args:
        num_experts: 1 for a linear that sees every token.
        power: a row weighs `score ** power`.
    """

    def __init__(self, num_experts: int, power: float) -> None:
        self._power = power
        self._tokens_E = torch.zeros(num_experts, dtype=torch.int64)
        self._score_E, self.weight_E, self._square_E = torch.zeros(3, num_experts, dtype=torch.float64)

    def add(self, counts: list[int], score_R: Tensor | None) -> Tensor | None:
        """Add rows sorted by expert; returns their weights `[R]`, None where all are one."""
        counts_E = torch.tensor(counts)
        self._tokens_E += counts_E
        if score_R is None:
            self._score_E += counts_E
            self.weight_E += counts_E
            self._square_E += counts_E
            return None
        score_R = score_R.double()
        weight_R = score_R**self._power
        self._score_E += _expert_sums(score_R, counts)
        self.weight_E += _expert_sums(weight_R, counts)
        self._square_E += _expert_sums(weight_R.square(), counts)
        return weight_R.float()

    @property
    def evidence(self) -> Evidence:
        """Rows, score mass and effective sample size of each expert."""
        effective_E = self.weight_E.square() / self._square_E.clamp_min(torch.finfo(torch.float64).tiny)
        return Evidence(self._tokens_E.clone(), self._score_E.clone(), effective_E)


class HessianSum:
    """`Σ c · x xᵀ` for each expert, stored as a sum with its weights and counts, so that parts add exactly.

    Half of a symmetric sum is enough: bands of rows are filled from the diagonal on, and mirrored when they are read.
    Beside it there may be `Σ c · (x₀ - x)ᵀ x`, of what the original model has in place of each row.

    Args:
        num_experts: 1 for a linear that sees every token.
        in_features: I.
        power: rows weigh `score ** power` (MoEQuant's affinity-guided Hessian is power 1).
        device: where the sums live.
        backend: what sums.
        pairs: whether rows come with the original's.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        power: float,
        device: torch.device | str = "cpu",
        backend: Backend = Backend.AUTO,
        *,
        pairs: bool = False,
    ) -> None:
        self._backend = backend
        self._upper_EII = torch.zeros(num_experts, in_features, in_features, device=device)
        self._shift_EII = torch.zeros_like(self._upper_EII) if pairs else None
        self._evidence = EvidenceSum(num_experts, power)

    def add(
        self,
        x_RI: Tensor,
        counts: list[int] | None = None,
        score_R: Tensor | None = None,
        original_RI: Tensor | None = None,
    ) -> None:
        """Add rows, sorted by expert with `counts` rows each.

        In the same order go their routing scores, `score_R`, and what the original model has in place of each row.
        """
        counts = [x_RI.shape[0]] if counts is None else counts
        weight_R = self._evidence.add(counts, score_R)
        if x_RI.shape[0] == 0:
            return
        kernels = kernels_for(x_RI, self._backend)
        if kernels is not None and not kernels.sums(x_RI):
            kernels = None
        counts_E = torch.tensor(counts, device=x_RI.device)
        weights = [None] * len(counts) if weight_R is None else weight_R.split(counts)
        if self._shift_EII is not None:
            assert original_RI is not None
            missing_RI = original_RI.to(x_RI.dtype) - x_RI
            if kernels is not None and hasattr(kernels, "add_products"):
                kernels.add_products(self._shift_EII, missing_RI, x_RI.contiguous(), counts_E, weight_R)
            else:
                parts = zip(self._shift_EII, missing_RI.split(counts), x_RI.split(counts), weights, strict=True)
                for shift_II, missing, rows_RI, weight in parts:
                    scaled_RI = rows_RI.float() if weight is None else rows_RI * weight[:, None]
                    shift_II.addmm_(missing.float().T, scaled_RI)
        if kernels is not None:
            kernels.add_grams(self._upper_EII, x_RI.contiguous(), counts_E, weight_R)
            return
        for upper_II, rows_RI, weight in zip(self._upper_EII, x_RI.split(counts), weights, strict=True):
            if rows_RI.shape[0]:
                _add_gram(upper_II, rows_RI, weight)

    @property
    def sum_EII(self) -> Tensor:
        """The whole sums `[E, I, I]`, a new tensor."""
        return mirrored(self._upper_EII.clone())

    def normalized(self, experts: list[int] | None = None) -> Tensor:
        """Mean Hessians `[E, I, I]` a unit of weight, of some experts or of all; zero for one that saw nothing."""
        sum_EII = self.sum_EII if experts is None else mirrored(self._upper_EII[experts])
        return self._mean(sum_EII, experts)

    def shift(self, experts: list[int]) -> Tensor | None:
        """Means of `(x₀ - x)ᵀ x`, `[E, I, I]` a unit of weight, of some experts; None without the original's rows."""
        return None if self._shift_EII is None else self._mean(self._shift_EII[experts], experts)

    def _mean(self, sum_EII: Tensor, experts: list[int] | None) -> Tensor:
        weight_E = self._evidence.weight_E.clamp_min(torch.finfo(torch.float32).tiny).float()
        weight_E = weight_E if experts is None else weight_E[experts]
        return sum_EII.div_(weight_E.to(sum_EII.device)[:, None, None])

    @property
    def evidence(self) -> Evidence:
        """Rows, score mass and effective sample size of each expert."""
        return self._evidence.evidence


def _expert_sums(values_R: Tensor, counts: list[int]) -> Tensor:
    return torch.stack([part.sum() for part in values_R.split(counts)]).cpu()


def _add_gram(upper_II: Tensor, x_RI: Tensor, weight_R: Tensor | None) -> None:
    """`upper += xᵀ diag(weight) x` in fp32, from the diagonal on.

    Rows are scaled by √weight before the product, so the sum stays symmetric and positive semi-definite. On a CPU
    bf16 activations go through bf16 products with fp32 sums: exact for plain rows, and the Gram matrix of rows
    rounded once to bf16 for weighted ones. Zero rows fill up to a multiple of `_ROWS`: CPU libraries compile a kernel
    for each new number of rows, which costs more than the zeros.
    """
    num_rows, in_features = x_RI.shape
    rows_RI = torch.empty(-(-num_rows // _ROWS) * _ROWS, in_features, device=x_RI.device)
    rows_RI[num_rows:] = 0
    if weight_R is None:
        rows_RI[:num_rows] = x_RI
    else:
        torch.mul(x_RI, weight_R.sqrt()[:, None], out=rows_RI[:num_rows])
    with bf16_products(x_RI):
        for start, end in bands(in_features):
            upper_II[start:end, start:].addmm_(rows_RI[:, start:end].T, rows_RI[:, start:])
