"""From a run's records to what the templates draw, and the two files: report.html and report.md."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from datetime import timezone
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from alphaquant.checkpoint import write_text
from alphaquant.errors import OutputError
from alphaquant.pipeline.rundir import FOLDER
from alphaquant.plan import ModuleKind
from alphaquant.report.read import read_quality, read_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from pathlib import Path

    from alphaquant.pipeline.records import LayerRecord, ModuleRecord
    from alphaquant.report.read import QualityRow, Run, RunReport

__all__ = ["human_bytes", "write_report"]

_STEPS = 8  # of the colour ramp: classes s0 … s7
_STARVED = 0.25  # of the fair share
_SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
_SHARE_LABELS = ("under ¼", "¼ to ½", "½ to ¾", "¾ to 1", "1 to 1½", "1½ to 2", "2 to 3", "3 and more")
_MAX_EVENT_ROWS = 500
_MAP_WIDTH = 1020  # of the expert map where its cells need not be at their narrowest, in CSS pixels
_KINDS = [kind.value for kind in ModuleKind]


def write_report(directory: Path, output: Path | None, quality: Sequence[Path]) -> list[Path]:
    """Write report.html and report.md of a run.

    Args:
        directory: what `quantize` made.
        output: directory to write to, made where it is missing; None: the run's own folder of notes.
        quality: files of `eval --json` to show.

    Returns:
        The two files.

    Raises:
        CheckpointError: the directory is none of ours, or a file is missing or malformed.
        OutputError: the output cannot be written.
    """
    run = read_run(directory)
    rows = read_quality(quality)
    folder = directory / FOLDER if output is None else output
    texts = {folder / name: text for name, text in _render(run, rows).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}", remedy="choose another -o") from error
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def _render(run: Run, quality: Sequence[QualityRow]) -> dict[str, str]:
    environment = Environment(
        loader=PackageLoader("alphaquant.report"),
        autoescape=select_autoescape(("html.jinja",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": human_bytes,
        "duration": _duration,
        "when": _when,
        "code": _markdown_code,
        "plain": _markdown_text,
        "short": _short,
        "setting": _setting,
        "words": lambda name: name.replace("_", " "),
    }
    experts = _experts(run.layers)
    context = {
        "report": run.report,
        "plan": json.dumps(run.plan, indent=2, ensure_ascii=False),
        "quality": quality,
        # where several were measured the verdict is on the first that knows the original
        "best": next((q for q in quality if q.measured.kl is not None), quality[0] if quality else None),
        "remarks": _remarks(run.report, experts),
        "loss": _loss_map(run),
        "experts": experts,
        "phases": _phases(run.report.seconds),
        "total_seconds": _total(run.report.seconds),
        "reasons": Counter(re.sub(r"\d+", "…", e.event) for e in run.report.events).most_common(),
        "events": (events := _events(run.report))[:_MAX_EVENT_ROWS],
        "events_left_out": max(0, len(events) - _MAX_EVENT_ROWS),
    }
    return {
        name: environment.get_template(f"{name}.jinja").render(context).strip() + "\n"
        for name in ("report.html", "report.md")
    }


class Remark(NamedTuple):
    """A sentence of the verdict; `fine` where there is nothing to look into, else the part of the page to look at."""

    text: str
    fine: bool
    section: str = ""


def _remarks(report: RunReport, experts: Experts | None) -> list[Remark]:
    audit, events = report.audit, len(report.events)
    kept = f"{audit.left:,} left as they are"
    remarks = [Remark(f"{audit.quantized:,} of {audit.targeted:,} targeted modules quantized, {kept}.", fine=True)]
    if report.calibration is None:
        remarks.append(Remark("Rounded to nearest, without calibration.", fine=True))
    if events:
        share = events / max(1, audit.quantized)
        remarks.append(
            Remark(
                f"{_count(events, 'module')} ({share:.1%}) fell back to rounding or to more damping.",
                fine=False,
                section="events",
            )
        )
    else:
        remarks.append(Remark("No module fell back.", fine=True))
    if experts is not None and experts.rows:
        if experts.starved or experts.dead:
            text = (
                f"Of {experts.count:,} experts, starved of tokens: {experts.starved:,}, without any: {experts.dead:,}."
            )
            remarks.append(Remark(text, fine=False, section="experts"))
        else:
            remarks.append(Remark(f"None of the {experts.count:,} experts is starved of tokens.", fine=True))
    if report.warnings:
        remarks.append(Remark(f"{_count(len(report.warnings), 'warning')}.", fine=False, section="warnings"))
    return remarks


class Cell(NamedTuple):
    """A cell of the loss map: step of the ramp, the figure, and all that is known of it."""

    step: int
    text: str
    title: str


@dataclass(frozen=True, slots=True)
class LossMap:
    """Relative loss by layer and projection; a cell is None where the layer has no such module."""

    groups: list[tuple[str, int]]
    columns: list[tuple[str, str]]
    rows: list[tuple[int | None, list[Cell | None]]]
    legend: list[str]
    outer: list[str]


def _loss_map(run: Run) -> LossMap | None:
    """Experts of a layer are averaged; colours follow the logarithm, for losses span orders of magnitude."""
    rows: list[tuple[int | None, dict[tuple[str, str], list[ModuleRecord]]]] = []
    columns: dict[tuple[str, str], None] = {}
    for layer in run.layers:
        cells: dict[tuple[str, str], list[ModuleRecord]] = {}
        for module in layer.modules:
            cells.setdefault((module.kind, module.name.rpartition(".")[2]), []).append(module)
        columns |= dict.fromkeys(cells)
        rows.append((layer.layer, cells))
    if not columns:
        return None
    order = sorted(columns, key=lambda column: _position(column[0]))
    means = [_mean(m.relative_loss for m in modules) for _, cells in rows for modules in cells.values()]
    high = max(means)
    # a narrow range is not stretched over the whole ramp: a factor of four at least, ten thousand at most
    low = max(min(*means, high / 4), high / 1e4)
    step = math.log(high / low) / _STEPS if high > 0 else 1.0
    bounds = [low * math.exp(step * i) for i in range(1, _STEPS)] if high > 0 else []

    def cell(layer: int | None, column: tuple[str, str], modules: list[ModuleRecord] | None) -> Cell | None:
        if modules is None:
            return None
        mean = _mean(m.relative_loss for m in modules)
        weights = sum(m.num_weights for m in modules)
        bits = sum(m.bits_per_weight * m.num_weights for m in modules) / max(1, weights)
        parts = [f"layer {layer}, {column[0].replace('_', ' ')} {column[1]}: loss {mean:.3%}"]
        if len(modules) > 1:
            parts.append(f"mean of {len(modules)}, worst {max(m.relative_loss for m in modules):.3%}")
        parts.append(f"{bits:.2f} bits ({', '.join(sorted({m.scheme for m in modules}))})")
        return Cell(bisect_right(bounds, mean), _percent(mean), "; ".join(parts))

    return LossMap(
        groups=list(Counter(kind for kind, _ in order).items()),
        columns=order,
        rows=[(layer, [cell(layer, c, cells.get(c)) for c in order]) for layer, cells in rows],
        legend=[_percent(b) for b in [low, *bounds]] if bounds else [],
        outer=[
            f"{m.name}: loss {m.relative_loss:.3%}, {m.bits_per_weight:.2f} bits ({m.scheme})"
            for record in run.outer
            for m in record.modules
        ],
    )


class ExpertCell(NamedTuple):
    """An expert: step of the ramp, its mark (`starved`, `dead` or none), and all that is known of it."""

    step: int
    mark: str
    title: str


class ExpertRow(NamedTuple):
    """A layer's experts; shares are relative to the fair one."""

    layer: int | None
    cells: list[ExpertCell]
    least: float
    most: float
    starved: int
    dead: int


@dataclass(frozen=True, slots=True)
class Experts:
    """Token shares by layer and expert, and the geometry of their map in CSS pixels."""

    rows: list[ExpertRow]
    width: int
    cell_width: int
    cell_height: int
    legend: tuple[str, ...] = _SHARE_LABELS

    @property
    def count(self) -> int:
        """Experts of all layers."""
        return sum(len(row.cells) for row in self.rows)

    @property
    def starved(self) -> int:
        """Experts that saw tokens, but under a quarter of the fair share."""
        return sum(row.starved for row in self.rows)

    @property
    def dead(self) -> int:
        """Experts that saw no token."""
        return sum(row.dead for row in self.rows)


def _experts(layers: Sequence[LayerRecord]) -> Experts | None:
    """None for a model without experts; no rows where nothing was calibrated."""
    routed = [layer for layer in layers if layer.routing is not None and layer.routing.tokens]
    if not routed and not any(m.kind == ModuleKind.EXPERT.value for layer in layers for m in layer.modules):
        return None
    rows = []
    for record in routed:
        assert record.routing is not None
        tokens, effective = record.routing.tokens, record.routing.effective_samples
        total, fair = sum(tokens), 1 / len(tokens)
        cells, shares = [], []
        for expert, (seen, samples) in enumerate(zip(tokens, effective, strict=True)):
            share = seen / total if total else 0.0
            relative = share / fair
            mark = "dead" if seen == 0 else "starved" if relative < _STARVED else ""
            title = f"layer {record.layer}, expert {expert}: "
            title += f"{share:.2%} of tokens, {relative:.2f} × fair, {seen:,} tokens, {samples:,.0f} effective"
            cells.append(ExpertCell(bisect_right(_SHARES, relative), mark, title))
            shares.append(relative)
        marks = Counter(cell.mark for cell in cells)
        rows.append(ExpertRow(record.layer, cells, min(shares), max(shares), marks["starved"], marks["dead"]))
    width = max((len(row.cells) for row in rows), default=1)
    cell_width = min(40, max(8, _MAP_WIDTH // width))
    return Experts(rows, width, cell_width, min(18, max(12, cell_width)))


class Phase(NamedTuple):
    """Seconds of a phase, their share of the whole, and their share of the longest phase."""

    name: str
    seconds: float
    share: float
    length: float


def _phases(seconds: dict[str, float]) -> list[Phase]:
    total = _total(seconds)
    parts = {name: value for name, value in seconds.items() if name != "total"}
    rest = total - sum(parts.values())
    if rest > 0.005 * total:
        parts["other"] = rest
    longest = max(parts.values(), default=0.0)
    return [
        Phase(name, value, value / total if total else 0.0, value / longest if longest else 0.0)
        for name, value in parts.items()
    ]


def _total(seconds: dict[str, float]) -> float:
    return seconds.get("total", sum(seconds.values()))


class EventRow(NamedTuple):
    """Modules of one parent that fell back for one reason."""

    parent: str
    modules: list[str]
    reason: str


def _events(report: RunReport) -> list[EventRow]:
    parents: dict[str, dict[str, list[str]]] = {}
    for event in report.events:
        parent, _, leaf = event.module.rpartition(".")
        parents.setdefault(parent, {}).setdefault(event.event, []).append(leaf)
    return [EventRow(parent, found, why) for parent, reasons in parents.items() for why, found in reasons.items()]


def _position(kind: str) -> int:
    return _KINDS.index(kind) if kind in _KINDS else len(_KINDS)


def _mean(values: Iterable[float]) -> float:
    figures = list(values)
    return sum(figures) / len(figures)


def _percent(share: float) -> str:
    """Percent to about three digits, without the sign."""
    percent = 100 * share
    if percent == 0:
        return "0"
    if percent < 0.01:
        return f"{percent:.2g}"
    return f"{percent:.{3 if percent < 1 else 2 if percent < 10 else 1}f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def human_bytes(size: float) -> str:
    """`1536` → `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _short(number: float) -> str:
    for unit in ("", " K", " M", " B"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _when(time: datetime) -> str:
    return f"{time.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def _markdown_code(text: str) -> str:
    """A code span that also holds in a table's cell."""
    text = " ".join(str(text).split()).replace("|", "\\|")
    if not text:
        return ""
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _markdown_text(text: str) -> str:
    """Free text with markdown's and HTML's own characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|&#~])", r"\\\1", " ".join(str(text).split()))
