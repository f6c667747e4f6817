"""How a forward pass shows the inputs of its linears to whoever collects Hessians."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.models.spec import Source

__all__ = ["Choice", "Routing", "Tap"]


class Choice(NamedTuple):
    """A router's choice for T tokens: experts `topk_ids_TK` and the scores that weight their outputs (fp32)."""

    topk_ids_TK: Tensor
    score_TK: Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """Which rows of a tapped input belong to which expert, and the score that the block multiplies them with.

    Rows `[R, I]` are sorted by expert; `counts_E` sums to R. `score_R` is the weight that the forward pass really
    used, in the rows' own order (fp32). A shared expert's gate is a routing with one expert. `choice` is the router's
    that led to it.
    """

    counts_E: Tensor
    score_R: Tensor
    choice: Choice | None = None


class Tap(Protocol):
    """Receives the input of every group of linears, once a forward pass."""

    def __call__(self, source: Source, x: Tensor, routing: Routing | None = None) -> None:
        """Take `x [..., I]`, the input of all linears that read `source`."""
