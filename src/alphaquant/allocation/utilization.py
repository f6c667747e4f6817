"""Costs by use: an expert's weights count as often as tokens are sent to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.allocation.costs import Costs, flat_costs
from alphaquant.pipeline import measure_routing
from alphaquant.pipeline.stream import silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from alphaquant.allocation.candidates import Candidate
    from alphaquant.pipeline import Calibration, Prepared, Progress

__all__ = ["utilization_costs"]


def utilization_costs(
    prepared: Prepared,
    candidates: Sequence[Candidate],
    calibration: Calibration,
    *,
    device: torch.device,
    dtype: str = "auto",
    progress: Progress = silent,
) -> Costs:
    """Flat costs times the share of the tokens that a module sees: all of them, but for routed experts.

    Raises:
        ConfigError: the model is dense.
        CalibrationError: there are no tokens.
    """
    report = measure_routing(prepared, calibration, device=device, dtype=dtype, progress=progress)
    num_tokens = report.calibration["num_samples"] * report.calibration["seqlen"]
    facts: dict[str, dict[str, float]] = {}
    for found in report.layers:
        for parameter in prepared.spec.parameters(found.layer):
            if parameter.num_experts:
                names = prepared.spec.module_names(found.layer, parameter)
                facts |= {n: {"share": t / num_tokens} for n, t in zip(names, found.record.tokens, strict=True)}
    cost = {
        name: tuple(value * facts.get(name, {}).get("share", 1.0) for value in values)
        for name, values in flat_costs(prepared, candidates).cost.items()
    }
    return Costs(cost, facts, {"calibration": report.calibration})
