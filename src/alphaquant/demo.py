"""The demo: the bundled model quantized in mixed precision, beside plain rounding at the same plan."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.checkpoint import write_json
from alphaquant.pipeline import FOLDER, Calibration, check_output, evaluate_checkpoint, prepare, quantize_checkpoint
from alphaquant.plan import Plan
from alphaquant.report import QUALITY, write_report
from alphaquant.solver import Effort, Method, Recipe

if TYPE_CHECKING:
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
    with as_file(files("alphaquant") / "data") as data, TemporaryDirectory() as scratch:
        model = data / "demo-model"
        prepared = prepare(model, Plan.load(data / "demo-plan.json"))
        check_output(out, model, overwrite=overwrite)
        calibration = Calibration("bundled", num_samples=128, seqlen=_SEQLEN, seed=0)

        def quantize(target: Path, recipe: Recipe) -> tuple[dict[str, Any], Quality]:
            result = quantize_checkpoint(
                prepared,
                target,
                recipe=recipe,
                calibration=calibration if recipe.method is Method.GPTQ else None,
                overwrite=overwrite,
                progress=progress,
                command=f"alphaquant demo -o {out}",
            )
            quality = evaluate_checkpoint(
                target, data="bundled", seqlen=_SEQLEN, max_windows=_WINDOWS, against=model, progress=progress
            )
            return result.report, quality

        _, rounded = quantize(Path(scratch) / "rtn", Recipe(method=Method.RTN, effort=Effort.FAST))
        report, quantized = quantize(out, Recipe())
        for name, quality in (("GPTQ", quantized), ("round-to-nearest", rounded)):
            facts = asdict(quality) | {"weights": name.replace("-", " "), "data": "bundled"}
            path = out / FOLDER / QUALITY / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            write_json(path, facts | (facts.pop("agreement") or {}))
    written = write_report(out)
    assert quantized.agreement is not None
    return DemoResult(quantized.agreement.original_perplexity, rounded, quantized, report, written)
