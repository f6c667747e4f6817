"""The strategies by name, and the table of each: made, or read again where it was saved."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from alphaquant.allocation.alpha import alpha_costs
from alphaquant.allocation.costs import Costs, fill_table, flat_costs, random_costs, subjects
from alphaquant.allocation.sensitivity import sensitivity_costs
from alphaquant.allocation.table import ErrorTable
from alphaquant.allocation.utilization import utilization_costs
from alphaquant.checkpoint import write_text
from alphaquant.errors import PlanError
from alphaquant.pipeline.run import calibration_facts, draw_tokens
from alphaquant.pipeline.stream import silent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from alphaquant.allocation.candidates import Candidate
    from alphaquant.pipeline import Calibration, Prepared, Progress
    from alphaquant.solver import Recipe

__all__ = ["Means", "Strategy", "error_table"]


class Strategy(Enum):
    """How a plan is found.

    `sensitivity` measures what each module's error does to the logits; `alpha` weights modules by the tails of their
    spectra, from the weights alone; `utilization` weights experts by their tokens; `uniform` gives all the same and
    `random` weights them at random, for comparison.
    """

    SENSITIVITY = "sensitivity"
    ALPHA = "alpha"
    UTILIZATION = "utilization"
    UNIFORM = "uniform"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Means:
    """What finding costs may use.

    Attributes:
        calibration: tokens, where the strategy needs a forward pass.
        recipe: how the plan will be carried out.
        device: where to compute.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        seed: of random costs.
        progress: is told what happens.
    """

    calibration: Calibration
    recipe: Recipe
    device: torch.device
    dtype: str = "auto"
    seed: int = 0
    progress: Progress = silent


def error_table(
    prepared: Prepared, strategy: Strategy, candidates: Sequence[Candidate], means: Means, saved: Path | None = None
) -> ErrorTable:
    """What each module costs in each candidate.

    Args:
        prepared: the model.
        strategy: how costs are found.
        candidates: the formats.
        means: what that may use.
        saved: file of a table: read where it exists, else written.

    Raises:
        PlanError: the saved table is none, lacks a candidate, or belongs to another checkpoint or strategy.
        CalibrationError: there are no tokens.
    """
    names = tuple(candidate.text for candidate in candidates)
    if saved is not None and saved.exists():
        table = ErrorTable.load(saved, prepared.checkpoint.header_digest(), strategy.value)
        if [row.name for row in table.rows] != [module.name for module in subjects(prepared)]:
            what = "the table's modules are not those of the model that can be quantized"
            raise PlanError(what, where=str(saved), remedy="delete the file, and it is made anew")
        return table.narrowed(names)
    begin = time.perf_counter()
    found = _costs(prepared, strategy, candidates, means)
    settings = {**found.settings, "seconds": round(time.perf_counter() - begin, 3)}
    table = fill_table(prepared, candidates, strategy.value, found._replace(settings=settings))
    if saved is not None:
        write_text(saved, table.to_json())
    return table


def _costs(prepared: Prepared, strategy: Strategy, candidates: Sequence[Candidate], means: Means) -> Costs:
    if strategy is Strategy.ALPHA:
        return alpha_costs(prepared, candidates, means.device, means.progress)
    if strategy is Strategy.RANDOM:
        return random_costs(prepared, candidates, means.seed)
    if strategy is Strategy.UNIFORM:
        return flat_costs(prepared, candidates)
    if strategy is Strategy.UTILIZATION:
        return utilization_costs(
            prepared,
            candidates,
            means.calibration,
            device=means.device,
            dtype=means.dtype,
            progress=means.progress,
        )
    tokens = draw_tokens(prepared, means.calibration)
    found = sensitivity_costs(
        prepared, candidates, tokens, means.recipe, device=means.device, dtype=means.dtype, progress=means.progress
    )
    seen = calibration_facts(means.calibration, tokens)
    return found._replace(settings={**found.settings, "calibration": seen})
