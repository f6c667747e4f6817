"""The demo: the bundled model quantized in mixed precision, beside plain rounding at the same plan."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.pipeline import (
    Calibration,
    check_output,
    evaluate_checkpoint,
    keep_quality,
    prepare,
    quality_facts,
    quantize_checkpoint,
    rounded_quality,
)
from alphaquant.plan import Plan
from alphaquant.report import write_report
from alphaquant.solver import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from alphaquant.evaluation import Quality
    from alphaquant.pipeline import Progress

__all__ = ["DemoResult", "run_demo"]

_SEQLEN = 256
_WINDOWS = 200


class DemoResult(NamedTuple):
    """Quality of the original, of rounding with absmax scales and of GPTQ, the run's report, and the files of it."""

    original: float
    rounded: Quality
    quantized: Quality
    report: dict[str, Any]
    files: list[Path]


def run_demo(out: Path, *, overwrite: bool, progress: Progress) -> DemoResult:
    """Quantize the bundled model by the bundled plan into `out`, evaluate it against the original, write the report.

    Raises:
        OutputError: `out` holds something else, or cannot be written.
    """
    with as_file(files("alphaquant") / "data") as data:
        model = data / "demo-model"
        prepared = prepare(model, Plan.load(data / "demo-plan.json"))
        check_output(out, model, overwrite=overwrite)

        def measure(directory: Path) -> Quality:
            return evaluate_checkpoint(
                directory, data="bundled", seqlen=_SEQLEN, max_windows=_WINDOWS, against=model, progress=progress
            )

        rounded = rounded_quality(prepared, measure, progress=progress)
        result = quantize_checkpoint(
            prepared,
            out,
            recipe=Recipe(),
            calibration=Calibration("bundled", num_samples=128, seqlen=_SEQLEN, seed=0),
            overwrite=overwrite,
            progress=progress,
            command=f"alphaquant demo -o {out}",
        )
        quantized = measure(out)
    for name, quality in (("GPTQ", quantized), ("round to nearest", rounded)):
        facts = quality_facts(quality) | {"weights": name, "data": "bundled"}
        keep_quality(out, name.replace(" ", "-"), facts)
    written = write_report(out)
    assert quantized.agreement is not None
    return DemoResult(quantized.agreement.original_perplexity, rounded, quantized, result.report, written)
