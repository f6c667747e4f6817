"""Quantizing one layer: collect, solve, put the de-quantized weights back, go on with them.

Shapes: E experts, O out, I in; N sequences, L positions, D hidden.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.errors import NumericsError
from alphaquant.formats import QuantizedTensor, dequantize
from alphaquant.models import MoESpec, Source, head_input
from alphaquant.pipeline.collect import Collector, collection_passes, widths
from alphaquant.pipeline.records import LayerRecord, ModuleRecord, RoutingRecord
from alphaquant.pipeline.stream import Clock, attend, chunks, feed, silent
from alphaquant.solver import WORKSPACE_WEIGHTS, Evidence, HessianSum, Method, experts_a_part, quantize_stack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.models import LayerWeights, ModelSpec, Parameter
    from alphaquant.pipeline.records import RoutingRecord
    from alphaquant.pipeline.stream import Progress
    from alphaquant.solver import Outcome, Recipe

__all__ = ["ATTENTION_SOURCES", "LayerQuantizer", "Limits", "QuantizedLayer"]

ATTENTION_SOURCES = (Source.ATTENTION_IN, Source.QUERY_LATENT, Source.KV_LATENT, Source.ATTENTION_OUT)


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """Codes of a layer's quantized modules by checkpoint name, and the record of it."""

    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    record: LayerRecord = field(default_factory=lambda: LayerRecord(None))


class _Stack(NamedTuple):
    """Matrices that one call solves: some experts of linears that read one source and share a scheme."""

    source: Source
    scheme: Scheme
    parameters: tuple[Parameter, ...]
    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What may lie in memory at a time.

    Attributes:
        hessian_bytes: Hessian sums of one forward pass; with less, there are more passes.
        workspace_weights: weights solved together.
    """

    hessian_bytes: int = sys.maxsize
    workspace_weights: int = WORKSPACE_WEIGHTS


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
    """

    spec: ModelSpec
    schemes: Mapping[str, Scheme | None]
    recipe: Recipe
    clock: Clock = field(default_factory=Clock)
    progress: Progress = silent
    limits: Limits = field(default_factory=Limits)

    @torch.no_grad()
    def layer(self, layer: int, weights: LayerWeights, x_NLD: Tensor | None) -> QuantizedLayer:
        """Quantize one layer: attention first, then the feed-forward on what the quantized attention gives.

        `weights` are replaced by their de-quantized values and `x_NLD` moves on through them, both in place. Without a
        stream everything is rounded to nearest, without calibration.
        """
        result = QuantizedLayer(record=LayerRecord(layer))
        parameters = self.spec.parameters(layer)
        routing: RoutingRecord | None = None
        for half, in_half in ((attend, True), (feed, False)):
            stacks = self._stacks(layer, [p for p in parameters if (p.source in ATTENTION_SOURCES) == in_half])
            wanted = {stack.source: widths(stack.parameters)[stack.source] for stack in stacks}
            for experts in collection_passes(wanted, self.limits.hessian_bytes):
                collector = Collector(parameters, experts, self.recipe.routing_power, self.recipe.backend)
                # with nothing to solve the pass is still worth its time for what it shows of the experts
                if x_NLD is not None and (stacks or isinstance(self.spec.layers[layer].mlp, MoESpec)):
                    self._tell("calibrate", layer, x_NLD)
                    with self.clock("calibrate"):
                        half(x_NLD, weights, self.spec, layer, tap=collector)
                self._tell("solve", layer)
                with self.clock("solve"):
                    for source, some in experts.items():
                        hessian = collector.hessians.pop(source, None)
                        self._solve(layer, weights, [s for s in stacks if s.source is source], some, hessian, result)
                routing = collector.routing() or routing
            if x_NLD is not None:
                self._tell("propagate", layer, x_NLD)
                with self.clock("propagate"):
                    half(x_NLD, weights, self.spec, layer)
        records = {module.name: module for module in result.record.modules}
        names = (name for parameter in parameters for name in self._names(layer, parameter))
        modules = [records[name] for name in names if name in records]
        return QuantizedLayer(result.quantized, LayerRecord(layer, modules, routing))

    @torch.no_grad()
    def embedding(self, outer: LayerWeights) -> QuantizedLayer:
        """Round the embedding to nearest, where the plan names it: a look-up has no input to calibrate on."""
        parameter = self.spec.outer_parameters()[0]
        result = QuantizedLayer()
        scheme = self.schemes[parameter.role]
        if scheme is not None:
            with self.clock("solve"):
                outcome = quantize_stack(outer[parameter.key][None], None, None, scheme, self.recipe)
            self._note(result, parameter, parameter.role, outcome, None, slice(0, parameter.shape[0]), 0)
            outer[parameter.key] = dequantize(outcome.quantized, outer[parameter.key].dtype)[0]
        return result

    @torch.no_grad()
    def head(self, outer: LayerWeights, x_NLD: Tensor | None) -> QuantizedLayer:
        """Quantize the head, where the plan names it, on the normed output of the last layer."""
        result = QuantizedLayer()
        parameter = next((p for p in self.spec.outer_parameters() if p.source is Source.HEAD_IN), None)
        if parameter is None or self.schemes[parameter.role] is None:
            return result
        hessian = None
        if x_NLD is not None:
            hessian = HessianSum(1, self.spec.hidden_size, 1.0, x_NLD.device, self.recipe.backend)
            with self.clock("calibrate"):
                for cut in chunks(*x_NLD.shape[:2]):
                    hessian.add(head_input(x_NLD[cut], outer, self.spec).flatten(0, 1))
        with self.clock("solve"):
            self._solve(None, outer, self._stacks(None, [parameter]), range(1), hessian, result)
        return result

    def _tell(self, phase: str, layer: int, x_NLD: Tensor | None = None) -> None:
        tokens = 0 if x_NLD is None else x_NLD.shape[0] * x_NLD.shape[1]
        self.progress(phase, layer, self.spec.num_layers, tokens)

    def _names(self, layer: int | None, parameter: Parameter) -> list[str]:
        return [parameter.role] if layer is None else self.spec.module_names(layer, parameter)

    def _stacks(self, layer: int | None, parameters: Sequence[Parameter]) -> list[_Stack]:
        """Group what can be solved in one call: first rows that share source, expert and scheme, then experts."""
        rows: dict[tuple[Source, int, Scheme], list[Parameter]] = {}
        for parameter in parameters:
            if parameter.source is None:
                continue
            for expert, name in enumerate(self._names(layer, parameter)):
                scheme = self.schemes[name]
                if scheme is not None:
                    rows.setdefault((parameter.source, expert, scheme), []).append(parameter)
        stacks: dict[tuple[Source, Scheme, tuple[Parameter, ...]], list[int]] = {}
        for (source, expert, scheme), members in rows.items():
            stacks.setdefault((source, scheme, tuple(members)), []).append(expert)
        return [_Stack(source, scheme, members, tuple(e)) for (source, scheme, members), e in stacks.items()]

    def _solve(
        self,
        layer: int | None,
        weights: LayerWeights,
        stacks: Sequence[_Stack],
        collected: range,
        hessian: HessianSum | None,
        result: QuantizedLayer,
    ) -> None:
        """Solve the `collected` experts of all stacks that read one source, part by part.

        Their de-quantized weights are put in place.
        """
        for stack in stacks:
            experts = [expert for expert in stack.experts if expert in collected]
            rows = sum(parameter.shape[0] for parameter in stack.parameters)
            at_once = experts_a_part(rows, stack.parameters[0].shape[1], self.limits.workspace_weights)
            for start in range(0, len(experts), at_once):
                self._solve_part(layer, weights, stack, experts[start : start + at_once], collected, hessian, result)

    def _solve_part(
        self,
        layer: int | None,
        weights: LayerWeights,
        stack: _Stack,
        experts: list[int],
        collected: range,
        hessian: HessianSum | None,
        result: QuantizedLayer,
    ) -> None:
        stacked = [weights[p.key] if p.num_experts else weights[p.key][None] for p in stack.parameters]
        w_EOI = torch.cat([w[experts] for w in stacked], 1)
        h_EII, evidence = None, None
        if hessian is not None:
            places = [expert - collected.start for expert in experts]
            h_EII = hessian.normalized(places)
            evidence = Evidence(*(value[places] for value in hessian.evidence))
            if not bool(torch.isfinite(h_EII.sum())):
                raise NumericsError(
                    f"the Hessian of {stack.source.value} holds NaN or infinity",
                    where="head" if layer is None else f"layer {layer}",
                    remedy="run with --dtype fp32",
                )
        effective_E = None if evidence is None else evidence.effective_E
        outcome = quantize_stack(w_EOI, h_EII, effective_E, stack.scheme, self.recipe, self.limits.workspace_weights)
        new_EOI = dequantize(outcome.quantized, w_EOI.dtype)
        start = 0
        for parameter, target in zip(stack.parameters, stacked, strict=True):
            rows = slice(start, start + parameter.shape[0])
            target[experts] = new_EOI[:, rows]
            names = self._names(layer, parameter)
            for position, expert in enumerate(experts):
                self._note(result, parameter, names[expert], outcome, evidence, rows, position)
            start = rows.stop

    def _note(
        self,
        result: QuantizedLayer,
        parameter: Parameter,
        name: str,
        outcome: Outcome,
        evidence: Evidence | None,
        rows: slice,
        position: int,
    ) -> None:
        """Keep codes and record of one module: `rows` of the stack's matrix at `position`."""
        q = outcome.quantized
        result.quantized[name] = QuantizedTensor(
            codes=q.codes[position, rows].cpu(),
            scale=q.scale[position, rows].cpu(),
            zero=None if q.zero is None else q.zero[position, rows].cpu(),
            global_scale=None if q.global_scale is None else q.global_scale[position].cpu(),
            scheme=q.scheme,
        )
        loss = outcome.loss_EO[position, rows].sum().item()
        energy = outcome.energy_EO[position, rows].sum().item()
        fallback, retries = bool(outcome.fallback_E[position]), int(outcome.retries_E[position])
        rounded = fallback or evidence is None or self.recipe.method is Method.RTN
        effective = 0.0 if evidence is None else float(evidence.effective_E[position])
        event = None
        if fallback:
            event = f"rounded to nearest: {effective:.0f} effective samples for {parameter.shape[1]} inputs"
        elif retries:
            event = f"damping raised {retries} times to make the Hessian positive definite"
        result.record.modules.append(
            ModuleRecord(
                name=name,
                kind=parameter.kind.value,
                scheme=str(q.scheme),
                bits_per_weight=q.scheme.bits_per_weight(*parameter.shape),
                num_weights=parameter.shape[0] * parameter.shape[1],
                loss=loss,
                relative_loss=loss / energy if energy > 0 else 0.0,
                tokens=0 if evidence is None else int(evidence.tokens_E[position]),
                effective_samples=effective,
                damping=float(outcome.damping_E[position]),
                method=(Method.RTN if rounded else Method.GPTQ).value,
                event=event,
                sha256=result.quantized[name].sha256(),
            )
        )
