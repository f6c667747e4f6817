"""Quality of next-token predictions: perplexity with its standard error, and divergence from an original.

Shapes: N windows, L positions, V vocabulary; T tokens, K experts of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Agreement", "Quality", "WindowScores", "router_agreement", "score_windows"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a model's predictions differ from an original's.

    Attributes:
        kl: mean KL(original ‖ model) in nats a token.
        kl_stderr: its standard error over windows.
        top1_agreement: share of tokens for which both predict the same next token.
        original_perplexity: of the original on the same windows.
        router_by_layer: share of a token's experts that are also the original's, the mean over tokens; None in a dense
            layer; empty where the models cannot be compared layer by layer.
    """

    kl: float
    kl_stderr: float
    top1_agreement: float
    original_perplexity: float
    router_by_layer: tuple[float | None, ...] = ()

    @property
    def router(self) -> float | None:
        """Mean of `router_by_layer` over the layers that route; None where there is none."""
        found = [share for share in self.router_by_layer if share is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity of a model on windows of text.

    Attributes:
        perplexity: exp of the mean over windows of the mean negative log-likelihood of tokens 2 … L.
        stderr: its standard error over windows, by the delta method.
        tokens: predicted tokens.
        windows: number of windows.
        agreement: against an original, where there is one.
    """

    perplexity: float
    stderr: float
    tokens: int
    windows: int
    agreement: Agreement | None = None


@dataclass(slots=True)
class WindowScores:
    """Means over each window, gathered chunk by chunk."""

    loss: list[float] = field(default_factory=list)
    original_loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)

    def quality(self, predicted_per_window: int, router_by_layer: tuple[float | None, ...] = ()) -> Quality:
        """The figures over all windows."""
        mean, stderr = _mean(self.loss)
        perplexity = math.exp(mean)
        agreement = None
        if self.kl:
            kl, kl_stderr = _mean(self.kl)
            original = math.exp(_mean(self.original_loss)[0])
            agreement = Agreement(kl, kl_stderr, _mean(self.same)[0], original, router_by_layer)
        windows = len(self.loss)
        return Quality(perplexity, perplexity * stderr, windows * predicted_per_window, windows, agreement)


@torch.no_grad()
def score_windows(logits_NLV: Tensor, ids_NL: Tensor, original_NLV: Tensor | None, scores: WindowScores) -> None:
    """Add windows to `scores`; logits may be of any float type and are compared in fp32."""
    targets = ids_NL[:, 1:].to(logits_NLV.device)
    log_q = logits_NLV[:, :-1].float().log_softmax(-1)
    scores.loss += _nll(log_q, targets)
    if original_NLV is None:
        return
    log_p = original_NLV[:, :-1].float().log_softmax(-1)
    scores.original_loss += _nll(log_p, targets)
    scores.kl += F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean(-1).tolist()
    scores.same += (log_p.argmax(-1) == log_q.argmax(-1)).float().mean(-1).tolist()


def router_agreement(chosen: Sequence[Tensor | None], original: Sequence[Tensor | None]) -> tuple[float | None, ...]:
    """By layer the share of chosen experts `[T, K]` that the original chose, too; empty where shapes differ."""
    shapes = [[None if ids is None else ids.shape for ids in model] for model in (chosen, original)]
    if shapes[0] != shapes[1] or not any(shapes[0]):
        return ()
    return tuple(
        None if a is None or b is None else float((a[:, :, None] == b[:, None, :]).any(-1).float().mean())
        for a, b in zip(chosen, original, strict=True)
    )


def _nll(log_probs_NLV: Tensor, targets_NL: Tensor) -> list[float]:
    picked: list[float] = (-log_probs_NLV.gather(-1, targets_NL[..., None])[..., 0].mean(-1)).tolist()
    return picked


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (zero for a single value)."""
    x = torch.tensor(values, dtype=torch.float64)
    stderr = x.std() / math.sqrt(len(values)) if len(values) > 1 else torch.zeros(())
    return float(x.mean()), float(stderr)
