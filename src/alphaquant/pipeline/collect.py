"""Collecting: the Hessians of a half-layer's linears, and what the router did, from one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models import Source
from alphaquant.pipeline.records import RoutingRecord
from alphaquant.solver import Backend, EvidenceSum, HessianSum

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import Tensor

    from alphaquant.models import Parameter, Routing

__all__ = ["Collector"]


class Collector:
    """A tap that sums a Hessian for every wanted source, and always keeps what the router and the shared gate did.

    Args:
        parameters: the layer's; they say how wide each source is and how many experts read it.
        wanted: sources whose linears are to be quantized.
        routing_power: rows of routed sources weigh their score to this power.
        backend: what sums the Hessians.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        wanted: Collection[Source],
        routing_power: float,
        backend: Backend = Backend.AUTO,
    ) -> None:
        self._backend = backend
        self._power = routing_power
        self._widths = {p.source: (p.num_experts or 1, p.shape[-1]) for p in parameters if p.source is not None}
        self._wanted = wanted
        self.hessians: dict[Source, HessianSum] = {}
        self._chosen: dict[Source, EvidenceSum] = {}

    def __call__(self, source: Source, x: Tensor, routing: Routing | None = None) -> None:
        """See `alphaquant.models.Tap`."""
        counts = None if routing is None else routing.counts_E.tolist()
        score_R = None if routing is None else routing.score_R
        if source in (Source.EXPERT_IN, Source.SHARED_IN) and counts is not None:
            self._chosen.setdefault(source, EvidenceSum(len(counts), self._power)).add(counts, score_R)
        if source in self._wanted:
            if source not in self.hessians:
                self.hessians[source] = HessianSum(*self._widths[source], self._power, x.device, self._backend)
            self.hessians[source].add(x.flatten(0, -2), counts, score_R)

    def routing(self) -> RoutingRecord | None:
        """What the router did, and the gate of shared experts; None where no expert was shown."""
        if Source.EXPERT_IN not in self._chosen:
            return None
        shared = self._chosen.get(Source.SHARED_IN)
        return _record(self._chosen[Source.EXPERT_IN], None if shared is None else _record(shared))


def _record(chosen: EvidenceSum, shared: RoutingRecord | None = None) -> RoutingRecord:
    seen = chosen.evidence
    return RoutingRecord(seen.tokens_E.tolist(), seen.score_mass_E.tolist(), seen.effective_E.tolist(), shared)
