"""From a run's records to the two files: report.html and report.md."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from alphaquant.checkpoint import write_text
from alphaquant.engines import serve
from alphaquant.errors import OutputError
from alphaquant.pipeline.quality import COSTS, QUALITY
from alphaquant.pipeline.rundir import FOLDER
from alphaquant.report.budget import alpha_map, frontier
from alphaquant.report.charts import event_rows, phases, quality_chart, remarks, total_seconds
from alphaquant.report.compare import comparison
from alphaquant.report.experts import expert_scatter, experts, router_chart
from alphaquant.report.lines import tuning_chart
from alphaquant.report.maps import layer_maps
from alphaquant.report.read import read_quality, read_run, read_table
from alphaquant.wording import FILTERS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from alphaquant.report.read import QualityRow, Run, Table

__all__ = ["write_comparison", "write_page", "write_report"]

_MAX_EVENT_ROWS = 500


def write_report(
    directory: Path, output: Path | None = None, quality: Sequence[Path] = (), *, table: Path | None = None
) -> list[Path]:
    """Write report.html and report.md of a run.

    Args:
        directory: what `quantize` made; measurements that `eval` left there are shown.
        output: directory to write to, made where it is missing; None: the run's own folder of notes.
        quality: more files of `eval --json` to show.
        table: costs that `plan --table` wrote: the frontier of size and cost is drawn, and α where it was computed.
            None: those by which the run found its plan, if it did.

    Returns:
        The two files.

    Raises:
        CheckpointError: the directory is none of ours, or a file is missing or malformed.
        OutputError: the output cannot be written.
    """
    run, kept = read_run(directory), directory / FOLDER / COSTS
    if table is None and kept.is_file():
        table = kept
    costs = None if table is None else read_table(table, run)
    context = _context(run, read_quality([*_kept(directory), *quality]), costs)
    return _write("report", context, directory / FOLDER if output is None else output)


def write_comparison(directories: Sequence[Path], output: Path) -> list[Path]:
    """Write comparison.html and comparison.md of several runs, side by side.

    Args:
        directories: what `quantize` made, two or more; measurements that `eval` left there are shown.
        output: directory to write to, made where it is missing.

    Returns:
        The two files.

    Raises:
        CheckpointError: a directory is none of ours, or a file is missing or malformed.
        OutputError: the output cannot be written.
    """
    runs = [(read_run(directory), read_quality(_kept(directory))) for directory in directories]
    return _write("comparison", {"comparison": comparison(runs), "version": version("alphaquant-moe")}, output)


def _kept(directory: Path) -> list[Path]:
    return sorted((directory / FOLDER / QUALITY).glob("*.json"), key=lambda path: path.stem)


def _context(run: Run, quality: list[QualityRow], table: Table | None) -> dict[str, Any]:
    used = experts(run.layers)
    rows, reasons = event_rows(run.report)
    seconds = run.report.seconds
    return {
        "report": run.report,
        "plan": json.dumps(run.plan, indent=2, ensure_ascii=False),
        "quality": quality,
        "chart": quality_chart(quality),
        # where several were measured the verdict is on the first that knows the original
        "best": next((q for q in quality if q.measured.kl is not None), quality[0] if quality else None),
        "serve": serve(run.report.engines, run.report.layout, str(run.directory)),
        "remarks": remarks(run.report, used, has_records=bool(run.layers or run.outer)),
        "maps": layer_maps(run),
        "outer": [module for record in run.outer for module in record.modules],
        "experts": used,
        "scatter": expert_scatter(run.layers),
        "routers": router_chart(quality),
        "tuning": tuning_chart(run.layers),
        "layers": run.layers,
        "table": table,
        "frontier": None if table is None else frontier(table, run),
        "alphas": None if table is None else alpha_map(table),
        "phases": phases(seconds, run.report.memory),
        "total_seconds": total_seconds(seconds),
        "reasons": reasons,
        "events": rows[:_MAX_EVENT_ROWS],
        "events_left_out": max(0, len(rows) - _MAX_EVENT_ROWS),
    }


def write_page(name: str, context: dict[str, Any], path: Path) -> None:
    """Write the template of that name to a file."""
    found = {"version": version("alphaquant-moe"), **context}
    write_text(path, _environment().get_template(f"{name}.jinja").render(found).strip() + "\n")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("alphaquant.report"),
        autoescape=select_autoescape(("html.jinja",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment


def _write(name: str, context: dict[str, Any], folder: Path) -> list[Path]:
    environment, texts = _environment(), {}
    for file in (f"{name}.html", f"{name}.md"):
        texts[folder / file] = environment.get_template(f"{file}.jinja").render(context).strip() + "\n"
    _make(folder)
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}", remedy="choose another -o") from error
