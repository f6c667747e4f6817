"""Quantizing one layer: collect, solve, put the de-quantized weights back, go on with them.

Shapes: E experts, O out, I in; N sequences, L positions, D hidden.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from alphaquant.models import MoESpec, Source, as_served, head_input
from alphaquant.pipeline.behind import Behind
from alphaquant.pipeline.collect import Collector, Reading, Rows, Shown, collection_passes, exchanged, widths
from alphaquant.pipeline.distributed import SOLO, Team
from alphaquant.pipeline.pace import Pace, fits
from alphaquant.pipeline.records import LayerRecord, ModuleRecord, RepairRecord, RoutingRecord, TuningRecord
from alphaquant.pipeline.repair import ROUTER, refit_router
from alphaquant.pipeline.samples import MOST, Samples, culprit, rows_left_out
from alphaquant.pipeline.solving import LayerSolver, QuantizedLayer
from alphaquant.pipeline.stream import Clock, attend, chunks, feed, half_function, silent
from alphaquant.pipeline.tuning import Objective, Tunable, taken_apart, tune
from alphaquant.solver import WORKSPACE_WEIGHTS, HessianSum, Moves, Permute

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.models import LayerWeights, ModelSpec
    from alphaquant.pipeline.solving import Stack
    from alphaquant.pipeline.stream import Progress, Stream
    from alphaquant.solver import Recipe

__all__ = ["ATTENTION_SOURCES", "LayerQuantizer", "Limits", "follows_original"]

ATTENTION_SOURCES = (Source.ATTENTION_IN, Source.QUERY_LATENT, Source.KV_LATENT, Source.ATTENTION_OUT)


def follows_original(recipe: Recipe, spec: ModelSpec) -> bool:
    """Whether the original model's stream is needed beside the quantized one's."""
    return recipe.tuning > 0 or recipe.pairs or (recipe.repair_router and spec.has_experts)


class Original(NamedTuple):
    """What the original model has before a half-layer: weights and stream."""

    weights: LayerWeights
    x_NLD: Stream


@dataclass(frozen=True, slots=True)
class Limits:
    """What may lie in memory at a time.

    Attributes:
        hessian_bytes: Hessian sums of one forward pass; with less, there are more passes. What pairs add is not in it.
        workspace_weights: weights solved together.
        holds_stream: whether activations lie elsewhere between the chunks that are worked on; see `held_stream`.
        reads_ahead: whether the next layer is read while one is worked on, and lies beside it.
    """

    hessian_bytes: int = sys.maxsize
    workspace_weights: int = WORKSPACE_WEIGHTS
    holds_stream: bool = False
    reads_ahead: bool = False


@dataclass(frozen=True)
class LayerQuantizer:
    """Quantizes layer after layer of one model.

    Attributes:
        spec: the model.
        schemes: for every module its scheme, None to leave it.
        recipe: settings of the method.
        clock: counts seconds by phase.
        progress: is told what happens.
        limits: what may lie in memory at a time; no code depends on it.
        team: the processes that share the work.
        samples: which calibration samples are left out.
        pace: how many of them go at a time; it falls where a device's memory runs out.
        behind: what is still done with the streams as they are; waited for before one moves.
    """

    spec: ModelSpec
    schemes: Mapping[str, Scheme | None]
    recipe: Recipe
    clock: Clock = field(default_factory=Clock)
    progress: Progress = silent
    limits: Limits = field(default_factory=Limits)
    team: Team = SOLO
    samples: Samples = field(default_factory=Samples)
    pace: Pace = field(default_factory=Pace)
    behind: Behind = field(default_factory=Behind)

    @property
    def solver(self) -> LayerSolver:
        """What solves its linears."""
        return LayerSolver(self.spec, self.schemes, self.recipe, self.limits.workspace_weights)

    @property
    def follows_original(self) -> bool:
        """Whether a layer is to be given the original model's stream, too."""
        return follows_original(self.recipe, self.spec)

    @torch.no_grad()
    def layer(
        self, layer: int, weights: LayerWeights, x_NLD: Stream | None, original_NLD: Stream | None = None
    ) -> QuantizedLayer:
        """Quantize one layer: attention first, then the feed-forward on what the quantized attention gives.

        `weights` are replaced by their de-quantized values and `x_NLD` moves on through them, both in place. Without a
        stream everything is rounded to nearest, without calibration. With the original model's stream, which moves on
        through the weights as they were, the router is refitted before experts are calibrated on what it chooses, and
        what a half-layer's codes have become is tuned to it.
        """
        tunes = original_NLD is not None and self.recipe.tuning > 0
        result = QuantizedLayer(record=LayerRecord(layer), leanings={} if tunes else None)
        parameters = self.spec.parameters(layer)
        served = as_served(weights, self.spec, layer, self.schemes)
        routing: RoutingRecord | None = None
        notes: list[str] = []
        repair: RepairRecord | None = None
        tuning: list[TuningRecord] = []
        for half, where in ((attend, "attention"), (feed, "feed-forward")):
            in_half = [p for p in parameters if (p.source in ATTENTION_SOURCES) == (half is attend)]
            stacks = self.solver.stacks(layer, in_half)
            shares = self._shares(stacks)
            before: Original | None = None
            if original_NLD is not None and self.recipe.pairs and stacks:
                before = Original(weights, original_NLD.clone())
            if original_NLD is not None and x_NLD is not None:
                refit = self._follow(half, layer, weights, x_NLD, original_NLD, where, result, notes)
                repair = refit or repair
            most = {reading: (max(map(len, ranks)), width) for reading, (ranks, width) in shares.items()}
            for part in collection_passes(most, self.limits.hessian_bytes):
                takes = {
                    reading: [share[some.start : some.stop] for share in shares[reading][0]]
                    for reading, some in part.items()
                }
                own = {reading: ranks[self.team.rank] for reading, ranks in takes.items() if ranks[self.team.rank]}
                collector = self._collector(layer, own)
                # with nothing to solve the pass is still worth its time for what it shows of the experts
                if x_NLD is not None and (stacks or isinstance(self.spec.layers[layer].mlp, MoESpec)):
                    self._tell("calibrate", layer, x_NLD)
                    with self.clock("calibrate"):
                        while not self._collect(half, layer, served, x_NLD, before, collector, takes):
                            notes.append(self.pace.slower(self._cuts(x_NLD), f"layer {layer}, {where}"))
                            collector = self._collector(layer, own)
                        seen = self._rows_seen(collector)
                        notes += rows_left_out(seen, self.spec, layer, f"layer {layer}, {where}")
                self._tell("solve", layer)
                with self.clock("solve"):
                    self._solve(layer, weights, stacks, takes, collector, result)
                routing = collector.routing() or routing
            self._share(weights, stacks, {reading: ranks for reading, (ranks, _) in shares.items()})
            if stacks and tunes and x_NLD is not None and original_NLD is not None:
                tuning.append(self._tune(half, layer, served, x_NLD, original_NLD, stacks, where, result, notes))
            if x_NLD is not None:
                self.settle()
                self._tell("propagate", layer, x_NLD)
                with self.clock("propagate"):
                    notes += self._propagate(half, layer, served, x_NLD, f"layer {layer}, {where}")
        records = {module.name: module for module in self._together(result.record)}
        names = (name for parameter in parameters for name in self.solver.names(layer, parameter))
        modules = [records[name] for name in names if name in records]
        record = LayerRecord(layer, modules, routing, notes, repair, tuning)
        return QuantizedLayer(result.quantized, record, result.refitted)

    @torch.no_grad()
    def embedding(self, outer: LayerWeights) -> QuantizedLayer:
        """Round the embedding to nearest, where the plan names it: a look-up has no input to calibrate on."""
        parameter = self.spec.outer_parameters()[0]
        result = QuantizedLayer()
        scheme = self.schemes[parameter.role]
        if scheme is not None:
            with self.clock("solve"):
                self.solver.round(outer, parameter, scheme, result)
        return result

    @torch.no_grad()
    def head(self, outer: LayerWeights, x_NLD: Stream | None) -> QuantizedLayer:
        """Quantize the head, where the plan names it, on the normed output of the last layer."""
        result = QuantizedLayer()
        parameter = next((p for p in self.spec.outer_parameters() if p.source is Source.HEAD_IN), None)
        if parameter is None or self.schemes[parameter.role] is None:
            return result
        hessian = None
        takes = self.team.shares({Source.HEAD_IN: [1.0]})[Source.HEAD_IN]
        if x_NLD is not None:
            hessian = HessianSum(1, self.spec.hidden_size, 1.0, x_NLD.device, self.recipe.backend)
            with self.clock("calibrate"):
                for cut in self.team.turns(self.samples.cuts(*x_NLD.shape[:2])):
                    x_BLD = x_NLD[:0] if cut is None else head_input(x_NLD[cut], outer, self.spec)
                    x_TD = x_BLD.flatten(0, 1)
                    for rows, _ in [(x_TD, None)] if self.team.size == 1 else self.team.exchange(x_TD, None, 1, takes):
                        hessian.add(rows)
        with self.clock("solve"):
            stacks = self.solver.stacks(None, [parameter])
            self.solver.solve(None, outer, stacks, takes[self.team.rank], hessian, result)
        return result

    def settle(self) -> None:
        """Wait until the layer before is written."""
        if self.behind.is_busy:
            with self.clock("write"):
                self.behind.wait()

    def _shares(self, stacks: Sequence[Stack]) -> dict[Reading, tuple[list[range], int]]:
        """Of each reading the experts that each process sums Hessians of and solves, and its inputs."""
        costs: dict[Reading, list[float]] = {}
        sizes = {stack.reading: widths(stack.parameters)[stack.source] for stack in stacks}
        for reading, (experts, width) in sizes.items():
            rows = sum(p.shape[0] for stack in stacks if stack.reading == reading for p in stack.parameters)
            costs[reading] = [float(width**2 * (rows + width))] * experts
        return {reading: (ranks, sizes[reading][1]) for reading, ranks in self.team.shares(costs).items()}

    def _cuts(self, x_NLD: Stream) -> list[slice | Tensor]:
        """The chunks of the stream that are this process's."""
        return [cut for cut in self.team.turns(self.samples.cuts(*x_NLD.shape[:2])) if cut is not None]

    def _collector(self, layer: int, own: Mapping[Reading, range]) -> Collector:
        recipe = self.recipe
        return Collector(self.spec.parameters(layer), own, recipe.routing_power, recipe.backend, pairs=recipe.pairs)

    def _collect(
        self,
        half: Callable[..., None],
        layer: int,
        weights: LayerWeights,
        x_NLD: Stream,
        original: Original | None,
        collector: Collector,
        takes: Mapping[Reading, list[range]],
    ) -> bool:
        """Show the stream to the collector: all of it, or in turns and what each process takes of every turn.

        False where memory ran out, which leaves the collector with a part.
        """
        if self.team.size == 1:
            cuts = self.pace.cut(self._cuts(x_NLD))
            if original is None:
                return fits(half, x_NLD, weights, self.spec, layer, tap=collector, cuts=cuts)

            def pair(cut: slice | Tensor) -> None:
                collector.take(self._shown(half, layer, weights, x_NLD, original, cut))

            return all(fits(pair, cut) for cut in cuts)
        sizes, mlp = widths(self.spec.parameters(layer)), self.spec.layers[layer].mlp
        if half is feed and isinstance(mlp, MoESpec):
            routed = [Source.EXPERT_IN, *([Source.SHARED_IN] if mlp.shared_gate else [])]
            read = {reading.source for reading in takes}
            takes = {**{Reading(s): [range(0)] * self.team.size for s in routed if s not in read}, **takes}
        for cut in self.team.turns(self.samples.cuts(*x_NLD.shape[:2])):
            shown = Shown() if cut is None else self._shown(half, layer, weights, x_NLD, original, cut)
            noted = set[Source]()
            taken: list[tuple[Reading, Rows]] = []
            for reading, ranks in takes.items():
                experts, width = sizes[reading.source]
                none_RI = torch.empty(0, width, dtype=x_NLD.dtype, device=x_NLD.device)
                rows = shown.rows.get(reading.source, Rows(none_RI, None, None if original is None else none_RI))
                parts = exchanged(rows, self.team, experts, ranks)
                if reading.source not in noted:
                    for part in parts:
                        collector.note(reading.source, part.routing)
                noted.add(reading.source)
                taken += [(reading, part) for part in parts]
            shown.rows.clear()
            # only behind the exchanges: one process adds to the sums of one source, another to those of the next
            for reading, rows in taken:
                collector.add(reading, rows)
        return True

    def _shown(
        self,
        half: Callable[..., None],
        layer: int,
        weights: LayerWeights,
        x_NLD: Stream,
        original: Original | None,
        cut: slice | Tensor,
    ) -> Shown:
        """What a chunk shows, and beside it what the original has of the same tokens, by the same choice of experts."""
        shown = Shown()
        half_function(half, weights, self.spec, layer, x_NLD, shown)(x_NLD[cut])
        if original is not None:
            own, own_NLD = original
            beside = Shown()
            half_function(half, own, self.spec, layer, own_NLD, beside, shown.choice)(own_NLD[cut])
            shown.pair(beside)
        return shown

    def _rows_seen(self, collector: Collector) -> dict[Source, tuple[int, int]]:
        """Of each source the rows that are no numbers, and all, in the team's Hessians of one reading of it."""
        own = [[reading.source.value, str(reading.inputs), *seen] for reading, seen in collector.rows.items()]
        sums: dict[tuple[str, str], tuple[int, int]] = {}
        for source, inputs, bad, total in chain.from_iterable(self.team.tell(own)):
            before = sums.get((source, inputs), (0, 0))
            sums[source, inputs] = before[0] + bad, before[1] + total
        of_source = {source: [seen for (name, _), seen in sums.items() if name == source.value] for source in Source}
        return {source: max(seen) for source, seen in of_source.items() if seen}

    def _share(self, weights: LayerWeights, stacks: Sequence[Stack], shares: Mapping[Reading, list[range]]) -> None:
        """Give everyone the de-quantized weights of each process."""
        if self.team.size == 1:
            return
        with self.clock("share"):
            for stack in stacks:
                for parameter in stack.parameters:
                    target = weights[parameter.key] if parameter.num_experts else weights[parameter.key][None]
                    for rank, share in enumerate(shares[stack.reading]):
                        experts = [expert for expert in stack.experts if expert in share]
                        if experts:
                            part = target[experts]
                            self.team.spread(part, rank)
                            target[experts] = part

    def _solve(
        self,
        layer: int,
        weights: LayerWeights,
        stacks: Sequence[Stack],
        takes: Mapping[Reading, list[range]],
        collector: Collector,
        result: QuantizedLayer,
    ) -> None:
        """Solve what this process takes, and let `up` and gate make up for what any process moved in `down`."""
        for reading, ranks in takes.items():
            own, moves = ranks[self.team.rank], None
            same = [stack for stack in stacks if stack.reading == reading]
            if own:
                hessian = collector.hessians.pop(reading, None)
                moves = self.solver.solve(layer, weights, same, own, hessian, result)
            for stack in same:
                self._make_up(layer, weights, stack, ranks, moves)

    def _make_up(
        self, layer: int, weights: LayerWeights, stack: Stack, ranks: Sequence[range], moves: Moves | None
    ) -> None:
        """Move the rows of `up` and gate that feed the columns which each process moved; `moves` are this one's."""
        feeders = self.solver.feeders(layer, stack)
        if not feeders:
            return
        for rank, share in enumerate(ranks):
            experts = [expert for expert in stack.experts if expert in share]
            if not experts:
                continue
            part = Moves.none(len(experts), feeders[0].shape[0], weights[feeders[0].key].device)
            if rank == self.team.rank and moves is not None:
                part = Moves(*(move[[expert - share.start for expert in experts]] for move in moves))
            for move in part:
                self.team.spread(move, rank)
            up, gate = (weights[p.key] if p.num_experts else weights[p.key][None] for p in feeders)
            for expert, channel_I, scale_I in zip(experts, *part, strict=True):
                if self.recipe.permute is not Permute.NONE:
                    for target_EOI in (up, gate):
                        target_EOI[expert] = target_EOI[expert].index_select(0, channel_I)
                up[expert] = up[expert] * scale_I[:, None]

    def _follow(
        self,
        half: Callable[..., None],
        layer: int,
        weights: LayerWeights,
        x_NLD: Stream,
        original_NLD: Stream,
        where: str,
        result: QuantizedLayer,
        notes: list[str],
    ) -> RepairRecord | None:
        """Move the original's stream on through the weights as they are; before that, refit a router to it."""
        refitted_ED, repair = None, None
        if self.recipe.repair_router and half is feed and isinstance(self.spec.layers[layer].mlp, MoESpec):
            self._tell("repair", layer, x_NLD)
            with self.clock("repair"):
                turns = self.team.turns(self.samples.cuts(*x_NLD.shape[:2]))
                refitted_ED, repair = refit_router(x_NLD, original_NLD, weights, self.spec, layer, turns, self.team)
        self.settle()
        self._tell("propagate", layer, original_NLD)
        with self.clock("propagate"):
            notes += self._propagate(half, layer, weights, original_NLD, f"layer {layer}, {where}, original")
        if refitted_ED is not None and repair is not None and repair.kept:
            weights[ROUTER].copy_(refitted_ED)
            router = next(p for p in self.spec.parameters(layer) if p.key == ROUTER)
            result.refitted[self.spec.tensor_names(layer, router)[0]] = refitted_ED.cpu()
        return repair

    def _tune(
        self,
        half: Callable[..., None],
        layer: int,
        weights: LayerWeights,
        x_NLD: Stream,
        original_NLD: Stream,
        stacks: Sequence[Stack],
        where: str,
        result: QuantizedLayer,
        notes: list[str],
    ) -> TuningRecord:
        """Tune what a half-layer's stacks have become. The first process of a team does so, and keeps their codes."""
        team, leanings = self.team, result.leanings
        assert leanings is not None
        if team.size > 1:
            with self.clock("share"):
                for stream in (x_NLD, original_NLD):
                    team.gather_turns(stream, chunks(*stream.shape[:2]))
        parts = team.gather(taken_apart(result.quantized, leanings))
        own = list(leanings)
        leanings.clear()
        told: list[Any] = []
        self._tell("tune", layer, x_NLD)
        with self.clock("tune"):
            if team.rank == 0:
                function = half_function(half, weights, self.spec, layer, x_NLD)
                kept = self.samples.kept(x_NLD.shape[0])
                objective = Objective(function, x_NLD, original_NLD, kept, f"layer {layer}, {where}", self.pace)
                tunables = self._tunables(layer, weights, stacks, parts)
                parts.clear()
                record, tuned = tune(objective, weights, tunables, self.recipe.tuning, layer, self.recipe.backend)
                result.quantized.update(tuned)
                told = [asdict(record), objective.notes, {name: q.sha256() for name, q in tuned.items()}]
            else:
                for name in own:
                    del result.quantized[name]
            for key in sorted({parameter.key for stack in stacks for parameter in stack.parameters}):
                team.spread(weights[key], 0)
            said, found, hashes = team.tell(told)[0]
        notes += found
        result.record.modules[:] = [replace(m, sha256=hashes.get(m.name, m.sha256)) for m in result.record.modules]
        return TuningRecord(**said)

    def _tunables(
        self, layer: int, weights: LayerWeights, stacks: Sequence[Stack], parts: Mapping[str, Tensor]
    ) -> list[Tunable]:
        """The stacks' linears, so many experts at a time as are solved together."""
        found = []
        for stack in stacks:
            for parameter in stack.parameters:
                names = self.solver.names(layer, parameter)
                at_once = max(1, self.limits.workspace_weights // math.prod(parameter.shape))
                for start in range(0, len(stack.experts), at_once):
                    some = list(stack.experts[start : start + at_once])
                    own = [names[expert] for expert in some]
                    experts = some if parameter.num_experts else None
                    found.append(Tunable.of(parameter.key, own, experts, stack.scheme, parts, weights))
        return found

    def _propagate(
        self, half: Callable[..., None], layer: int, weights: LayerWeights, x_NLD: Stream, where: str
    ) -> list[str]:
        """Move the stream on; returns what to note of samples that are no numbers any more."""
        found = self.samples.found

        def bad(samples: list[int]) -> None:
            for sample in samples:
                # beyond what may be left out the first says enough
                if len(found) > MOST * x_NLD.shape[0]:
                    found.append((sample, found[0][1]))
                else:
                    found.append((sample, culprit(half, x_NLD[sample : sample + 1], weights, self.spec, layer)))

        notes, rest = [], self.pace.cut(self._cuts(x_NLD))
        while rest:
            if fits(half, x_NLD, weights, self.spec, layer, cuts=rest[:1], bad=bad):
                rest.pop(0)
            else:
                notes.append(self.pace.slower(rest, where))
                rest = self.pace.cut(rest)
        return notes + self.samples.settle(x_NLD.shape[0], where, self.team)

    def _together(self, record: LayerRecord) -> list[ModuleRecord]:
        """The records of all processes."""
        if self.team.size == 1:
            return record.modules
        told = self.team.tell([asdict(module) for module in record.modules])
        return [ModuleRecord(**module) for part in told for module in part]

    def _tell(self, phase: str, layer: int, x_NLD: Stream | None = None) -> None:
        tokens = 0 if x_NLD is None else x_NLD.shape[0] * x_NLD.shape[1]
        self.progress(phase, layer, self.spec.num_layers, tokens)
