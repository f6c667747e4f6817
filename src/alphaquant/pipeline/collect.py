"""Collecting: the Hessians of a half-layer's linears, and what the router did, from one forward pass.

Where memory does not hold all Hessians at once they are collected in several passes, each of a few experts.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.formats import Activation, Inputs, round_inputs
from alphaquant.models import Source
from alphaquant.pipeline.records import RoutingRecord
from alphaquant.pipeline.stream import is_finite
from alphaquant.solver import Backend, EvidenceSum, HessianSum

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from alphaquant.models import Choice, Parameter, Routing
    from alphaquant.pipeline.distributed import Team

__all__ = ["ROUTED", "Collector", "Reading", "Rows", "Shown", "collection_passes", "exchanged", "widths"]

# sources whose routing is kept whether or not what reads them is quantized
ROUTED = (Source.EXPERT_IN, Source.SHARED_IN)

# what a source's linears make is read by the linears of the sources before it here
_DEEPEST_FIRST = (
    Source.ATTENTION_OUT,
    Source.QUERY_LATENT,
    Source.KV_LATENT,
    Source.ATTENTION_IN,
    Source.EXPERT_HIDDEN,
    Source.SHARED_HIDDEN,
    Source.MLP_HIDDEN,
    Source.EXPERT_IN,
    Source.SHARED_IN,
    Source.MLP_IN,
)


class Reading(NamedTuple):
    """Whose Hessian linears share: the source that they read, and how they round it."""

    source: Source
    inputs: Inputs = Inputs()


def widths(parameters: Iterable[Parameter]) -> dict[Source, tuple[int, int]]:
    """How many experts read each source, and how many inputs it has."""
    return {p.source: (p.num_experts or 1, p.shape[-1]) for p in parameters if p.source is not None}


def collection_passes(
    wanted: Mapping[Reading, tuple[int, int]], hessian_bytes: int = sys.maxsize
) -> list[dict[Reading, range]]:
    """Which experts' Hessians each forward pass collects: all in one pass where they fit.

    The deepest sources come first. What is solved after a pass so never changes the inputs that a later one sees, and
    any number of passes gives the same Hessians as one.

    Args:
        wanted: experts and inputs of each reading.
        hessian_bytes: what the sums of a pass may take; one expert's are always allowed.
    """
    passes: list[dict[Reading, range]] = [{}]
    left = hessian_bytes
    for reading in sorted(wanted, key=lambda reading: _DEEPEST_FIRST.index(reading.source)):
        num_experts, in_features = wanted[reading]
        size, first = 4 * in_features**2, 0
        while first < num_experts:
            if left < size and passes[-1]:
                passes.append({})
                left = hessian_bytes
            stop = min(num_experts, first + max(1, left // size))
            passes[-1][reading] = range(first, stop)
            left -= (stop - first) * size
            first = stop
    return passes


class Rows(NamedTuple):
    """Inputs `[R, I]` of a source, how they are routed, and what the original model has in their place."""

    x_RI: Tensor
    routing: Routing | None
    original_RI: Tensor | None = None


def exchanged(rows: Rows, team: Team, num_experts: int, takes: Sequence[range]) -> list[Rows]:
    """Rows of one's own experts from each process, for those that it takes; see `Team.exchange`."""
    x_RI, routing, original_RI = rows
    if original_RI is None:
        return [Rows(*part) for part in team.exchange(x_RI, routing, num_experts, takes)]
    # what belongs together travels together
    parts = team.exchange(torch.cat([x_RI, original_RI], 1), routing, num_experts, takes)
    return [Rows(x, routing, beside) for both, routing in parts for x, beside in [both.split(x_RI.shape[1], 1)]]


class Shown:
    """A tap that keeps what one chunk shows of each source."""

    def __init__(self) -> None:
        self.rows: dict[Source, Rows] = {}

    def __call__(self, source: Source, x: Tensor, routing: Routing | None = None) -> None:
        """See `alphaquant.models.Tap`."""
        self.rows[source] = Rows(x.flatten(0, -2), routing)

    @property
    def choice(self) -> Choice | None:
        """The router's."""
        routed = self.rows.get(Source.EXPERT_IN)
        return None if routed is None or routed.routing is None else routed.routing.choice

    def pair(self, original: Shown) -> None:
        """Put what the original model showed, by the same choice, beside it."""
        self.rows = {
            source: rows._replace(original_RI=original.rows[source].x_RI) for source, rows in self.rows.items()
        }


class Collector:
    """A tap that sums a Hessian for every wanted reading of a source, and keeps what router and shared gate did.

    Args:
        parameters: the layer's; they say how wide each source is and how many experts read it.
        wanted: what linears that are to be quantized read, and which of their experts.
        routing_power: rows of routed sources weigh their score to this power.
        backend: what sums the Hessians.
        pairs: whether rows come with the original model's.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        wanted: Mapping[Reading, range],
        routing_power: float,
        backend: Backend = Backend.AUTO,
        *,
        pairs: bool = False,
    ) -> None:
        self._pairs = pairs
        self._backend = backend
        self._power = routing_power
        self._widths = widths(parameters)
        self._wanted = wanted
        self.hessians: dict[Reading, HessianSum] = {}
        self._chosen: dict[Source, EvidenceSum] = {}
        self.rows: dict[Reading, list[int]] = {}
        """Of each wanted reading the rows that were left out because they are no numbers, and all rows."""

    def __call__(self, source: Source, x: Tensor, routing: Routing | None = None) -> None:
        """See `alphaquant.models.Tap`."""
        self.show(source, Rows(x.flatten(0, -2), routing))

    def take(self, shown: Shown) -> None:
        """Add all that a chunk showed."""
        for source, rows in shown.rows.items():
            self.show(source, rows)

    def show(self, source: Source, rows: Rows) -> None:
        """Add all rows of a source."""
        x_RI, routing, original_RI = rows
        self.note(source, routing)
        for reading, experts in self._wanted.items():
            if reading.source is source:
                counts = None if routing is None else routing.counts_E.tolist()
                some = slice(None) if counts is None else _rows(counts, experts)
                self.add(reading, Rows(x_RI[some], routing, None if original_RI is None else original_RI[some]))

    def note(self, source: Source, routing: Routing | None) -> None:
        """Count what the router or the shared gate did, of sources that they route."""
        if source in ROUTED and routing is not None:
            counts = routing.counts_E.tolist()
            self._chosen.setdefault(source, EvidenceSum(len(counts), self._power)).add(counts, routing.score_R)

    def add(self, reading: Reading, rows: Rows) -> None:
        """Add the rows of wanted experts alone, with the routing of all that their source showed."""
        x_RI, routing, original_RI = rows
        experts = self._wanted.get(reading)
        if experts is None:
            return
        if reading not in self.hessians:
            width = self._widths[reading.source][1]
            self.hessians[reading] = HessianSum(
                len(experts), width, self._power, x_RI.device, self._backend, pairs=self._pairs
            )
        counts = None if routing is None else routing.counts_E.tolist()
        score_R = None if routing is None else routing.score_R
        if counts is not None and len(experts) < len(counts):
            some = _rows(counts, experts)
            counts = counts[experts.start : experts.stop]
            score_R = None if score_R is None else score_R[some]
        x_RI, counts, score_R, original_RI = self._numbers(reading, x_RI, counts, score_R, original_RI)
        if reading.inputs.activation is not Activation.BF16:
            grid_RI, scale_R1 = round_inputs(x_RI, *reading.inputs)
            x_RI = (grid_RI * scale_R1).to(x_RI.dtype)
        self.hessians[reading].add(x_RI, counts, score_R, original_RI)

    def _numbers(
        self,
        reading: Reading,
        x_RI: Tensor,
        counts: list[int] | None,
        score_R: Tensor | None,
        original_RI: Tensor | None,
    ) -> tuple[Tensor, list[int] | None, Tensor | None, Tensor | None]:
        """The rows that are numbers, as they almost always are: one of NaN would spoil the whole Hessian."""
        seen = self.rows.setdefault(reading, [0, 0])
        seen[1] += x_RI.shape[0]
        both = [x_RI] if original_RI is None else [x_RI, original_RI]
        if all(map(is_finite, both)):
            return x_RI, counts, score_R, original_RI
        good_R = torch.stack([torch.isfinite(x).all(1) for x in both]).all(0)
        seen[0] += int((~good_R).sum())
        if counts is not None:
            counts = [int(part.sum()) for part in good_R.split(counts)]
        score_R, original_RI = (None if x is None else x[good_R] for x in (score_R, original_RI))
        return x_RI[good_R], counts, score_R, original_RI

    def routing(self) -> RoutingRecord | None:
        """What the router did, and the gate of shared experts; None where no expert was shown."""
        if Source.EXPERT_IN not in self._chosen:
            return None
        shared = self._chosen.get(Source.SHARED_IN)
        return _record(self._chosen[Source.EXPERT_IN], None if shared is None else _record(shared))


def _rows(counts: list[int], experts: range) -> slice:
    """Of rows that are sorted by expert, those of some."""
    return slice(sum(counts[: experts.start]), sum(counts[: experts.stop]))


def _record(chosen: EvidenceSum, shared: RoutingRecord | None = None) -> RoutingRecord:
    seen = chosen.evidence
    return RoutingRecord(seen.tokens_E.tolist(), seen.score_mass_E.tolist(), seen.effective_E.tolist(), shared)
