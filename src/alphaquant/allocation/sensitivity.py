"""Measured sensitivity: what GPTQ's error in each module would cost in the divergence of the logits.

One pass of the calibration tokens over the original model collects every Hessian; from its factor the loss of each
candidate format is told without quantizing. What a loss costs is measured: a few sequences go through the model once
more for every linear of every layer with that linear's weights off by the error that GPTQ would make, all of them side
by side in the same pass, and the divergence of their logits over that loss is the linear's slope. The watched streams
are fp32 whatever the rest is: in bf16 two that hardly differ are a thousandth of a nat apart, as far as most linears
put them.

Shapes: E experts, O out, I in; N sequences, L positions, D hidden; S streams of N sequences, the first the original's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.allocation.costs import Costs, relative_errors, scale_dtype
from alphaquant.allocation.predict import Inputs, predict
from alphaquant.models import head_input, head_weight, read_layer, read_outer
from alphaquant.pipeline.collect import Collector, Reading, widths
from alphaquant.pipeline.run import compute_dtype
from alphaquant.pipeline.stream import attend, embed, feed, silent
from alphaquant.plan import ModuleKind
from alphaquant.solver import is_thin, trusted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from alphaquant.allocation.candidates import Candidate
    from alphaquant.calibration import TokenBatch
    from alphaquant.formats import Scheme
    from alphaquant.models import LayerWeights, ModelSpec, Parameter
    from alphaquant.pipeline import Prepared, Progress
    from alphaquant.solver import Evidence, HessianSum, Recipe

    Half = Callable[[Tensor, LayerWeights, ModelSpec, int], None]

__all__ = ["sensitivity_costs"]

_PROBE = (2, 128)  # sequences whose logits are watched, and their tokens
_PROBE_ERROR = 0.05  # relative: what is measured should be far above rounding noise, and not break the model
_ROWS = 256  # of a matrix that tell its loss; only what is probed needs them all
_KINDS = (ModuleKind.ATTENTION, ModuleKind.MLP, ModuleKind.EXPERT, ModuleKind.SHARED_EXPERT)


class _Unit(NamedTuple):
    """One linear of a layer, with all its experts: its modules, their losses in each candidate, their shares.

    `probe` is the candidate whose error was tried.
    """

    names: list[str]
    loss_EF: Tensor
    share_E: Tensor
    probe: int


class _Probes:
    """The residual streams of the watched sequences: the original's, then one for each unit that is off."""

    def __init__(self, ids_NL: Tensor, outer: LayerWeights, spec: ModelSpec, num_units: int) -> None:
        original_NLD = embed(ids_NL, outer["model.embed_tokens.weight"]).float()
        self._spec, self._size, self._used = spec, len(original_NLD), len(original_NLD)
        self._streams_SLD = original_NLD.new_empty(((1 + num_units) * self._size, *original_NLD.shape[1:]))
        self._streams_SLD[: self._size] = original_NLD
        self._branched: list[Tensor] = []

    def branch(self, half: Half, weights: LayerWeights, layer: int) -> None:
        """A new stream leaves the original's in this half-layer, through weights of its own."""
        x_NLD = self._streams_SLD[: self._size].clone()
        half(x_NLD, weights, self._spec, layer)
        self._branched.append(x_NLD)

    def advance(self, half: Half, weights: LayerWeights, layer: int) -> None:
        """All streams that were there before go through the half-layer; those that branched in it join them."""
        half(self._streams_SLD[: self._used], weights, self._spec, layer)
        for x_NLD in self._branched:
            self._streams_SLD[self._used : self._used + self._size] = x_NLD
            self._used += self._size
        self._branched.clear()

    def divergences(self, outer: LayerWeights) -> list[float]:
        """KL(original ‖ stream) in nats a token, of every stream that branched, in order."""
        exact = _exact(outer)
        head = head_weight(exact)

        def log_probs(x_NLD: Tensor) -> Tensor:
            return F.linear(head_input(x_NLD, exact, self._spec), head).log_softmax(-1)

        original, *others = self._streams_SLD[: self._used].split(self._size)
        target = log_probs(original)
        mean = 1 / target[..., 0].numel()
        return [float(F.kl_div(log_probs(x), target, reduction="sum", log_target=True)) * mean for x in others]


@torch.no_grad()
def sensitivity_costs(
    prepared: Prepared,
    candidates: Sequence[Candidate],
    tokens: TokenBatch,
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: str = "auto",
    progress: Progress = silent,
) -> Costs:
    """Costs of every module in nats a token, from one pass over the layers.

    Args:
        prepared: the model.
        candidates: formats.
        tokens: to calibrate on; the first of them are watched.
        recipe: how the plan will be carried out: damping and routing weights of the Hessians.
        device: where to compute.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        progress: is told what happens.
    """
    spec, work_dtype = prepared.spec, compute_dtype(dtype, prepared.spec, device)
    outer = read_outer(prepared.source, spec, work_dtype, device)
    linears = [[p for p in spec.parameters(layer) if p.kind in _KINDS and p.source] for layer in range(spec.num_layers)]
    probes = _Probes(tokens.ids[: _PROBE[0], : _PROBE[1]], outer, spec, sum(map(len, linears)))
    errors = relative_errors(candidates)
    x_NLD = embed(tokens.ids, outer["model.embed_tokens.weight"])
    units: list[_Unit] = []
    for layer in range(spec.num_layers):
        progress("read", layer, spec.num_layers)
        weights = read_layer(prepared.source, spec, layer, work_dtype, device)
        exact = _exact(weights)
        for half, in_half in ((attend, True), (feed, False)):
            found = [p for p in linears[layer] if (p.kind is ModuleKind.ATTENTION) == in_half]
            wanted = {Reading(source): range(experts) for source, (experts, _) in widths(found).items()}
            collector = Collector(spec.parameters(layer), wanted, recipe.routing_power, recipe.backend)
            progress("calibrate", layer, spec.num_layers, tokens.ids.numel())
            half(x_NLD, weights, spec, layer, tap=collector)
            progress("predict", layer, spec.num_layers)
            for reading in list(collector.hessians):
                hessian = collector.hessians.pop(reading)
                share_E = _shares(hessian.evidence, tokens.ids.numel())
                inputs = _inputs(hessian, recipe)
                for parameter in (p for p in found if p.source is reading.source):
                    schemes = [_scheme(c, parameter, scale_dtype(prepared)) for c in candidates]
                    probe = _probe(schemes, errors)
                    loss_EF, off = _losses(exact[parameter.key], inputs, schemes, probe)
                    units.append(_Unit(spec.module_names(layer, parameter), loss_EF, share_E, probe))
                    probes.branch(half, {**exact, parameter.key: off}, layer)
            probes.advance(half, exact, layer)
            if layer + 1 < spec.num_layers or half is attend:
                progress("propagate", layer, spec.num_layers, tokens.ids.numel())
                half(x_NLD, weights, spec, layer)
    progress("logits", spec.num_layers - 1, spec.num_layers)
    return _costs(units, probes.divergences(outer), candidates)


def _exact(weights: LayerWeights) -> LayerWeights:
    return {key: weight.float() for key, weight in weights.items()}


def _scheme(candidate: Candidate, parameter: Parameter, dtype: torch.dtype) -> Scheme | None:
    """The candidate's scheme; None where it leaves the weight, or does not fit it."""
    try:
        return candidate.scheme(parameter.shape[1], dtype)
    except ValueError:
        return None


def _probe(schemes: Sequence[Scheme | None], errors: Sequence[float]) -> int:
    """The coarsest candidate whose relative error is no more than `_PROBE_ERROR`, or else the finest."""
    fitting = [f for f, scheme in enumerate(schemes) if scheme is not None] or [0]
    small = [f for f in fitting if errors[f] <= _PROBE_ERROR]
    return max(small, key=errors.__getitem__) if small else min(fitting, key=errors.__getitem__)


def _inputs(hessian: HessianSum, recipe: Recipe) -> list[Inputs]:
    """What the inputs of each expert amount to; one that saw nothing is taken to be like the others."""
    h_EII, evidence = hessian.normalized(), hessian.evidence
    unseen_E = evidence.tokens_E == 0
    if bool(unseen_E.any()):
        weight_E = evidence.score_mass_E.to(h_EII)
        h_EII[unseen_E] = torch.einsum("e,eij->ij", weight_E / weight_E.sum().clamp_min(1e-30), h_EII)
    h_EII, damping_E = trusted(h_EII, evidence.effective_E, recipe)
    rounded_E = is_thin(evidence.effective_E, h_EII.shape[1], recipe)
    return [Inputs.of(h_EII[e : e + 1], damping_E[e : e + 1], rounded_E[e : e + 1]) for e in range(len(h_EII))]


def _shares(evidence: Evidence, num_tokens: int) -> Tensor:
    """What an expert's loss counts for in the output: `Σ c²` over all tokens; half a token for one that saw none."""
    square_E = evidence.score_mass_E.square() / evidence.effective_E.clamp_min(1e-30)
    mean = square_E.sum() / evidence.tokens_E.sum().clamp_min(1)
    return torch.where(evidence.tokens_E > 0, square_E, mean / 2) / num_tokens


def _losses(w: Tensor, inputs: Sequence[Inputs], schemes: Sequence[Scheme | None], probe: int) -> tuple[Tensor, Tensor]:
    """Losses of each expert in each scheme, and the weights in the probe's scheme as GPTQ would leave them."""
    w_EOI = w if w.ndim == 3 else w[None]
    loss_EF, off_EOI = torch.zeros(len(w_EOI), len(schemes), dtype=torch.float64), w_EOI.clone()
    for expert, of_expert in enumerate(inputs):
        part_EOI = w_EOI[expert : expert + 1]
        for f, scheme in enumerate(schemes):
            if scheme is None:
                continue
            step = 1 if f == probe else max(1, part_EOI.shape[1] // _ROWS)
            sample_EOI = part_EOI[:, ::step]
            found = predict(sample_EOI, of_expert, scheme)
            loss_EF[expert, f] = found.loss_E.double().item() * part_EOI.shape[1] / sample_EOI.shape[1]
            if f == probe:
                off_EOI[expert] = (part_EOI - found.error(of_expert))[0]
    return loss_EF, off_EOI.view_as(w)


def _costs(units: Sequence[_Unit], divergences: Sequence[float], candidates: Sequence[Candidate]) -> Costs:
    """Losses times shares times what a unit of loss costs in nats, by checkpoint name."""
    least = min((kl for kl in divergences if kl > 0), default=0.0)
    cost: dict[str, tuple[float, ...]] = {}
    facts: dict[str, dict[str, float]] = {}
    for unit, kl in zip(units, divergences, strict=True):
        part_EF = unit.loss_EF * unit.share_E[:, None]
        slope = max(kl, least) / max(float(part_EF[:, unit.probe].sum()), 1e-30)
        for name, share, row_F in zip(unit.names, unit.share_E.tolist(), (slope * part_EF).tolist(), strict=True):
            cost[name] = tuple(row_F)
            facts[name] = {"slope": slope, "share": share, "unit_kl": kl}
    return Costs(cost, facts, {"probes": sorted({candidates[unit.probe].text for unit in units})})
