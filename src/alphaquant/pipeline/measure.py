"""Measuring a checkpoint, beside plain rounding at its plan where that is asked for, and keeping what is found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from alphaquant.errors import ConfigError
from alphaquant.pipeline.evaluate import evaluate_checkpoint
from alphaquant.pipeline.quality import keep_quality, plan_of, quality_facts, rounded_quality
from alphaquant.pipeline.run import prepare
from alphaquant.pipeline.stream import Progress, silent

if TYPE_CHECKING:
    import torch

    from alphaquant.evaluation import Quality

__all__ = ["Measured", "measure_quality"]


class Measured(NamedTuple):
    """Quality of a checkpoint, and that of plain rounding at its plan where it was asked for."""

    found: Quality
    rounded: Quality | None


def measure_quality(
    directory: Path,
    *,
    data: str,
    seqlen: int,
    windows: int | None = None,
    against: Path | None = None,
    rtn: bool = False,
    device: torch.device,
    dtype: str = "auto",
    progress: Progress = silent,
) -> Measured:
    """Measure a checkpoint, and keep what is found where the report finds it, if a run made the directory.

    Args:
        directory: checkpoint directory.
        data: name or file of the text.
        seqlen: tokens in a window.
        windows: at most so many of them.
        against: the original, to compare with token for token.
        rtn: also measure plain rounding of the original at the plan of the directory.
        device: where to compute.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        progress: is told what happens.

    Raises:
        AlphaQuantError: what is wrong with checkpoint, text or plan.
    """

    def measure(path: Path) -> Quality:
        return evaluate_checkpoint(
            path,
            data=data,
            seqlen=seqlen,
            max_windows=windows,
            against=against,
            device=device,
            dtype=dtype,
            progress=progress,
        )

    if rtn and against is None:
        raise ConfigError("rtn was asked for without an original", remedy="add --against MODEL")
    plan = plan_of(directory) if rtn else None
    found, rounded = measure(directory), None
    if plan is not None and against is not None:
        prepared = prepare(against, plan)
        rounded = rounded_quality(prepared, measure, device=str(device), dtype=dtype, progress=progress)
    for quality, name, weights in ((found, "", "quantized"), (rounded, "-rtn", "round to nearest")):
        if quality is not None:
            facts = quality_facts(quality) | {"weights": weights, "data": data}
            keep_quality(directory, f"{Path(data).stem}{name}", facts)
    return Measured(found, rounded)
