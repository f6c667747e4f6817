"""What every router does on a text, and the gates of shared experts: one pass through the model as it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.errors import ConfigError
from alphaquant.models import MoESpec, read_outer
from alphaquant.pipeline.closing import model_facts
from alphaquant.pipeline.collect import Collector
from alphaquant.pipeline.run import calibration_facts, compute_dtype, draw_tokens
from alphaquant.pipeline.stream import Progress, embed, feed, silent, through

if TYPE_CHECKING:
    from alphaquant.pipeline.records import RoutingRecord
    from alphaquant.pipeline.run import Calibration, Prepared

__all__ = ["LayerRouting", "RoutingReport", "measure_routing"]


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """One MoE layer: its number, experts of a token, inputs of an expert, and what the router did."""

    layer: int
    top_k: int
    inputs: int
    record: RoutingRecord

    @property
    def coverage(self) -> list[float]:
        """Effective samples of each expert for each of its inputs: below 1 its Hessian cannot have full rank."""
        return [effective / self.inputs for effective in self.record.effective_samples]

    @property
    def covered(self) -> float:
        """Share of experts whose coverage is 1 or more."""
        return sum(value >= 1 for value in self.coverage) / len(self.coverage)

    @property
    def gate(self) -> float | None:
        """Mean of the shared expert's gate over the tokens; None where there is none."""
        shared = self.record.shared
        return None if shared is None else shared.score_mass[0] / shared.tokens[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        facts = asdict(self.record)
        shared = facts.pop("shared")
        return {
            "layer": self.layer,
            "experts": len(self.record.tokens),
            "top_k": self.top_k,
            "entropy": self.record.entropy,
            "covered": self.covered,
            "starved": self.record.starved,
            "dead": self.record.dead,
            **facts,
            "expert_entropy": self.record.expert_entropy,
            "coverage": self.coverage,
            "shared_gate": None
            if shared is None
            else {"mean": self.gate, **{key: value[0] for key, value in shared.items() if value is not None}},
        }


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Routing of all MoE layers on a text; `model` and `calibration` say of what, as in the report of a run."""

    model: dict[str, Any]
    calibration: dict[str, Any]
    layers: list[LayerRouting]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        layers = [layer.to_dict() for layer in self.layers]
        return {"version": 1, "model": self.model, "calibration": self.calibration, "layers": layers}


@torch.no_grad()
def measure_routing(
    prepared: Prepared,
    calibration: Calibration,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    progress: Progress = silent,
) -> RoutingReport:
    """Run a text through the unquantized model, and count what its routers choose.

    Args:
        prepared: from `prepare`.
        calibration: the tokens that a run would calibrate on.
        device: where to compute.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        progress: is told what happens.

    Raises:
        ConfigError: the model is dense.
        CalibrationError, NumericsError: the text cannot be had; weights or activations hold NaN or infinity.
    """
    spec, device = prepared.spec, torch.device(device)
    if not spec.has_experts:
        raise ConfigError(
            f"{spec.family} is dense: no token is routed",
            where=str(prepared.checkpoint.path),
            remedy="ask for the routing of a Mixture-of-Experts model",
        )
    tokens = draw_tokens(prepared, calibration)
    work_dtype = compute_dtype(dtype, spec, device)
    x_NLD = embed(tokens.ids, read_outer(prepared.source, spec, work_dtype, device)["model.embed_tokens.weight"])
    found = []
    last = max(layer for layer in range(spec.num_layers) if isinstance(spec.layers[layer].mlp, MoESpec))
    for layer, weights in through(x_NLD, prepared.source, spec, work_dtype, "route", progress):
        mlp = spec.layers[layer].mlp
        if isinstance(mlp, MoESpec):
            collector = Collector(spec.parameters(layer), {}, 1.0)
            feed(x_NLD, weights, spec, layer, tap=collector)
            record = collector.routing()
            assert record is not None
            found.append(LayerRouting(layer, mlp.top_k, spec.hidden_size, record))
        if layer == last:
            break
    return RoutingReport(model_facts(prepared), calibration_facts(calibration, tokens), found, tokens.warnings)
