"""Quality of next-token predictions: perplexity with its standard error, and divergence from an original.

Shapes: N windows, L positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["Agreement", "Quality", "WindowScores", "score_windows"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a model's predictions differ from an original's.

    Attributes:
        kl: mean KL(original ‖ model) in nats a token.
        kl_stderr: its standard error over windows.
        top1_agreement: share of tokens for which both predict the same next token.
        original_perplexity: of the original on the same windows.
    """

    kl: float
    kl_stderr: float
    top1_agreement: float
    original_perplexity: float


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

    def quality(self, predicted_per_window: int) -> Quality:
        """The figures over all windows."""
        mean, stderr = _mean(self.loss)
        perplexity = math.exp(mean)
        agreement = None
        if self.kl:
            kl, kl_stderr = _mean(self.kl)
            original = math.exp(_mean(self.original_loss)[0])
            agreement = Agreement(kl, kl_stderr, _mean(self.same)[0], original)
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


def _nll(log_probs_NLV: Tensor, targets_NL: Tensor) -> list[float]:
    picked: list[float] = (-log_probs_NLV.gather(-1, targets_NL[..., None])[..., 0].mean(-1)).tolist()
    return picked


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (zero for a single value)."""
    x = torch.tensor(values, dtype=torch.float64)
    stderr = x.std() / math.sqrt(len(values)) if len(values) > 1 else torch.zeros(())
    return float(x.mean()), float(stderr)
