"""Solving the linears of a layer: which go together in one call, and what is kept of each.

Shapes: E experts, O out, I in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.errors import NumericsError
from alphaquant.formats import Inputs, QuantizedTensor, dequantize
from alphaquant.pipeline.collect import Reading
from alphaquant.pipeline.records import LayerRecord, ModuleRecord
from alphaquant.solver import Evidence, HessianSum, Method, Moves, experts_a_part, quantize_stack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.models import LayerWeights, ModelSpec, Parameter, Source
    from alphaquant.solver import Outcome, Recipe

__all__ = ["LayerSolver", "QuantizedLayer", "Stack"]

_DOWN = "down_proj"


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """Codes of a layer's quantized modules by checkpoint name, the record of it, and tensors that were refitted.

    `leanings` of those that are to be tuned go along until they are; None where none will be.
    """

    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    record: LayerRecord = field(default_factory=lambda: LayerRecord(None))
    refitted: dict[str, Tensor] = field(default_factory=dict)
    leanings: dict[str, Tensor] | None = None


class Stack(NamedTuple):
    """Matrices that one call solves: some experts of linears that read one source and share a scheme."""

    source: Source
    scheme: Scheme
    parameters: tuple[Parameter, ...]
    experts: tuple[int, ...]

    @property
    def reading(self) -> Reading:
        """Whose Hessian they share."""
        return Reading(self.source, self.scheme.inputs)


@dataclass(frozen=True, slots=True)
class LayerSolver:
    """Solves linears of one model, given the Hessians of their inputs.

    Attributes:
        spec: the model.
        schemes: for every module its scheme, None to leave it.
        recipe: settings of the method.
        workspace_weights: weights solved together.
    """

    spec: ModelSpec
    schemes: Mapping[str, Scheme | None]
    recipe: Recipe
    workspace_weights: int

    def names(self, layer: int | None, parameter: Parameter) -> list[str]:
        """Checkpoint names of a parameter's modules; without a layer it is the head or the embedding."""
        return [parameter.role] if layer is None else self.spec.module_names(layer, parameter)

    def stacks(self, layer: int | None, parameters: Sequence[Parameter]) -> list[Stack]:
        """Group what can be solved in one call: first rows that share source, expert and scheme, then experts.

        Matrices that are no whole number of blocks tall stay alone: no block reaches from one into the next.
        """
        rows: dict[tuple[Source, int, Scheme, str], list[Parameter]] = {}
        for parameter in parameters:
            if parameter.source is None:
                continue
            for expert, name in enumerate(self.names(layer, parameter)):
                scheme = self.schemes[name]
                if scheme is not None:
                    alone = parameter.key if parameter.shape[0] % scheme.format.block_rows else ""
                    rows.setdefault((parameter.source, expert, scheme, alone), []).append(parameter)
        stacks: dict[tuple[Source, Scheme, tuple[Parameter, ...]], list[int]] = {}
        for (source, expert, scheme, _), members in rows.items():
            stacks.setdefault((source, scheme, tuple(members)), []).append(expert)
        return [Stack(source, scheme, members, tuple(e)) for (source, scheme, members), e in stacks.items()]

    def feeders(self, layer: int | None, stack: Stack) -> list[Parameter]:
        """`up` and gate, whose rows make up for moves of the columns of a stack of `down`; none where these must stay.

        All must be quantized, for what is kept in bf16 would lose by scales and is not written. Inputs must not be
        rounded.
        """
        role = stack.parameters[0].role
        if layer is None or not self.recipe.moves or not role.endswith(_DOWN) or stack.scheme.inputs != Inputs():
            return []
        parameters = {(p.role, p.leaf): p for p in self.spec.parameters(layer)}
        roles = [role.removesuffix(_DOWN) + part for part in ("up_proj", "gate_proj")]
        found = [parameters[role, "weight"] for role in roles]
        names = [self.names(layer, parameter)[expert] for parameter in found for expert in stack.experts]
        has_bias = any((role, "bias") in parameters for role in roles)
        return [] if has_bias or any(self.schemes[name] is None for name in names) else found

    def solve(
        self,
        layer: int | None,
        weights: LayerWeights,
        stacks: Sequence[Stack],
        collected: range,
        hessian: HessianSum | None,
        result: QuantizedLayer,
    ) -> Moves:
        """Solve the `collected` experts of all stacks that read one source alike, part by part.

        Their de-quantized weights are put in place.

        Returns:
            How their columns moved: not at all where there are no `feeders`.
        """
        first = stacks[0].parameters[0]
        moves = Moves.none(len(collected), first.shape[1], weights[first.key].device)
        for stack in stacks:
            experts = [expert for expert in stack.experts if expert in collected]
            rows = sum(parameter.shape[0] for parameter in stack.parameters)
            at_once = experts_a_part(rows, stack.parameters[0].shape[1], self.workspace_weights)
            for start in range(0, len(experts), at_once):
                part = experts[start : start + at_once]
                outcome = self._solve_part(layer, weights, stack, part, collected, hessian, result)
                places = [expert - collected.start for expert in part]
                moves.channel_EI[places], moves.scale_EI[places] = outcome.channel_EI, outcome.scale_EI
        return moves

    def round(self, weights: LayerWeights, parameter: Parameter, scheme: Scheme, result: QuantizedLayer) -> None:
        """Round one matrix that has no input to calibrate on, and put another in its place."""
        outcome = quantize_stack(weights[parameter.key][None], None, None, scheme, self.recipe)
        self._note(result, parameter, parameter.role, outcome, None, slice(0, parameter.shape[0]), 0)
        weights[parameter.key] = dequantize(outcome.quantized, weights[parameter.key].dtype)[0]

    def _solve_part(
        self,
        layer: int | None,
        weights: LayerWeights,
        stack: Stack,
        experts: list[int],
        collected: range,
        hessian: HessianSum | None,
        result: QuantizedLayer,
    ) -> Outcome:
        stacked = [weights[p.key] if p.num_experts else weights[p.key][None] for p in stack.parameters]
        w_EOI = torch.cat([w[experts] for w in stacked], 1)
        h_EII, shift_EII, evidence = None, None, None
        if hessian is not None:
            places = [expert - collected.start for expert in experts]
            h_EII, shift_EII = hessian.normalized(places), hessian.shift(places)
            evidence = Evidence(*(value[places] for value in hessian.evidence))
            if not bool(torch.isfinite(h_EII.sum())):
                first = experts[int((~torch.isfinite(h_EII.sum((1, 2)))).nonzero()[0])]
                raise NumericsError(
                    f"the Hessian of {self.names(layer, stack.parameters[0])[first]} holds NaN or infinity",
                    where="head" if layer is None else f"layer {layer}",
                    remedy="run with --dtype fp32",
                )
        effective_E = None if evidence is None else evidence.effective_E
        outcome = quantize_stack(
            w_EOI,
            h_EII,
            effective_E,
            stack.scheme,
            self.recipe,
            self.workspace_weights,
            shift_EII=shift_EII,
            moves=bool(self.feeders(layer, stack)),
            leans=result.leanings is not None,
        )
        new_EOI = dequantize(outcome.quantized, w_EOI.dtype)
        start = 0
        for parameter, target in zip(stack.parameters, stacked, strict=True):
            rows = slice(start, start + parameter.shape[0])
            target[experts] = new_EOI[:, rows]
            names = self.names(layer, parameter)
            for position, expert in enumerate(experts):
                self._note(result, parameter, names[expert], outcome, evidence, rows, position)
            start = rows.stop
        return outcome

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
        if result.leanings is not None and outcome.leaning_EOI is not None:
            result.leanings[name] = outcome.leaning_EOI[position, rows].cpu()
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
