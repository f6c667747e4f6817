"""Measured quality kept beside a run's records, and plain rounding at the same plan to hold it against."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from alphaquant.checkpoint import write_json, write_text
from alphaquant.errors import ConfigError, OutputError
from alphaquant.pipeline.card import QUALITY, refresh_card
from alphaquant.pipeline.run import quantize_checkpoint
from alphaquant.pipeline.rundir import FOLDER
from alphaquant.pipeline.stream import Progress, silent
from alphaquant.plan import Plan
from alphaquant.solver import Effort, Method, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from alphaquant.evaluation import Quality
    from alphaquant.pipeline.run import Prepared

__all__ = ["COSTS", "QUALITY", "is_run", "keep_costs", "keep_quality", "plan_of", "quality_facts", "rounded_quality"]

COSTS = "costs.json"
"""File beside the records in which the table of costs is kept that a plan was found by; the report draws it."""


def quality_facts(quality: Quality) -> dict[str, Any]:
    """Plain JSON of a measurement, flat."""
    facts = asdict(quality)
    return facts | (facts.pop("agreement") or {})


def is_run(directory: Path) -> bool:
    """Whether a run made the directory."""
    return (directory / FOLDER / "report.json").is_file()


def plan_of(directory: Path) -> Plan:
    """The plan that a run's directory was quantized by.

    Raises:
        ConfigError: no run made the directory.
        PlanError: the plan is malformed.
    """
    if not is_run(directory):
        raise ConfigError(
            f"{directory} holds no plan",
            where=str(directory),
            remedy="give a directory that `alphaquant quantize` made",
        )
    return Plan.load(directory / FOLDER / "plan.json")


def keep_quality(directory: Path, name: str, facts: dict[str, Any]) -> bool:
    """Keep a measurement of a run's directory where report and card find it; False where that cannot be written to."""
    if not is_run(directory):
        return False
    folder = directory / FOLDER / QUALITY
    try:
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{name}.json", facts)
    except (OSError, OutputError):
        return False
    refresh_card(directory)
    return True


def keep_costs(directory: Path, table: str) -> bool:
    """Keep the error table that a run's plan was found by; False where that cannot be written to."""
    try:
        write_text(directory / FOLDER / COSTS, table)
    except (OSError, OutputError):
        return False
    return True


def rounded_quality(
    prepared: Prepared,
    measure: Callable[[Path], Quality],
    *,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress = silent,
) -> Quality:
    """Quality of plain rounding to nearest with absmax scales at a plan: the least that any method must beat.

    Args:
        prepared: the original with the plan.
        measure: is given the rounded checkpoint, which vanishes afterwards.
        device: where to round.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        progress: is told what happens.
    """
    with TemporaryDirectory() as scratch:
        out = Path(scratch) / "rtn"
        quantize_checkpoint(
            prepared,
            out,
            recipe=Recipe(method=Method.RTN, effort=Effort.FAST),
            calibration=None,
            device=device,
            dtype=dtype,
            progress=progress,
        )
        return measure(out)
