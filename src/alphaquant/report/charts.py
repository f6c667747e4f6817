"""The small charts of a report: quality with error bars, time by phase, events by reason."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from alphaquant.report.axis import Axis, linear_axis
from alphaquant.wording import count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alphaquant.report.experts import Experts
    from alphaquant.report.read import QualityRow, RunReport

__all__ = [
    "EventRow",
    "Remark",
    "event_rows",
    "phases",
    "quality_chart",
    "remarks",
    "total_seconds",
]


class Bar(NamedTuple):
    """A value and its error bar, in percent of the axis."""

    low: float
    at: float
    high: float


class QualityBars(NamedTuple):
    """One measurement: its name, and where perplexity and KL lie."""

    label: str
    perplexity: Bar
    kl: Bar | None


@dataclass(frozen=True, slots=True)
class QualityChart:
    """Measurements on common axes; `original` is the place of the original's perplexity."""

    perplexity: Axis
    kl: Axis
    original: float | None
    rows: list[QualityBars]


def quality_chart(rows: Sequence[QualityRow]) -> QualityChart | None:
    """None where there is nothing to compare with."""
    originals = [r.measured.original_perplexity for r in rows if r.measured.original_perplexity is not None]
    if not originals:
        return None
    found = [r.measured for r in rows]
    perplexity = linear_axis([*originals, *(m.perplexity + sign * m.stderr for m in found for sign in (-1, 1))])
    kls = [m.kl + (m.kl_stderr or 0.0) for m in found if m.kl is not None]
    kl = linear_axis([0.0, *kls], start=0.0)

    def bar(axis: Axis, value: float, error: float) -> Bar:
        return Bar(axis.at(value - error), axis.at(value), axis.at(value + error))

    bars = [
        QualityBars(
            row.label,
            bar(perplexity, row.measured.perplexity, row.measured.stderr),
            None if row.measured.kl is None else bar(kl, row.measured.kl, row.measured.kl_stderr or 0.0),
        )
        for row in rows
    ]
    # a line for the original is only right where all were measured on one text
    original = perplexity.at(originals[0]) if max(originals) - min(originals) < 1e-6 * max(originals) else None
    return QualityChart(perplexity, kl, original, bars)


class Remark(NamedTuple):
    """A sentence of the verdict; `fine` where there is nothing to look into, else the part of the page to look at."""

    text: str
    fine: bool
    section: str = ""


def remarks(report: RunReport, used: Experts | None, *, has_records: bool) -> list[Remark]:
    """What went as asked for, and what to look into."""
    audit, events = report.audit, len(report.events)
    kept = f"{audit.left:,} left as they are"
    found = [Remark(f"{audit.quantized:,} of {audit.targeted:,} targeted modules quantized, {kept}.", fine=True)]
    if not has_records and audit.quantized:
        found.append(Remark("The records of the modules are missing: no maps are drawn.", fine=False))
    if report.calibration is None:
        found.append(Remark("Rounded to nearest, without calibration.", fine=True))
    if events:
        share = events / max(1, audit.quantized)
        text = f"{count(events, 'module')} ({share:.1%}) fell back to rounding or to more damping."
        found.append(Remark(text, fine=False, section="events"))
    else:
        found.append(Remark("No module fell back.", fine=True))
    if used is not None and used.rows:
        if used.starved or used.dead:
            text = f"Of {used.count:,} experts, starved of tokens: {used.starved:,}, without any: {used.dead:,}."
            found.append(Remark(text, fine=False, section="experts"))
        else:
            found.append(Remark(f"None of the {used.count:,} experts is starved of tokens.", fine=True))
    if report.warnings:
        found.append(Remark(f"{count(len(report.warnings), 'warning')}.", fine=False, section="warnings"))
    return found


class Phase(NamedTuple):
    """Seconds of a phase, their share of the whole and of the longest phase, and bytes held at its end, if known."""

    name: str
    seconds: float
    share: float
    length: float
    memory: int | None


def phases(seconds: dict[str, float], memory: dict[str, int]) -> list[Phase]:
    """In the order of the run; what the clock missed is `other`."""
    total = total_seconds(seconds)
    parts = {name: value for name, value in seconds.items() if name != "total"}
    rest = total - sum(parts.values())
    if rest > 0.005 * total:
        parts["other"] = rest
    longest = max(parts.values(), default=0.0)
    return [
        Phase(
            name,
            value,
            value / total if total else 0.0,
            value / longest if longest else 0.0,
            memory.get(name) or None,
        )
        for name, value in parts.items()
    ]


def total_seconds(seconds: dict[str, float]) -> float:
    """Of the whole run."""
    return seconds.get("total", sum(seconds.values()))


class EventRow(NamedTuple):
    """Modules of one parent that fell back for one reason."""

    parent: str
    modules: list[str]
    reason: str


def event_rows(report: RunReport) -> tuple[list[EventRow], list[tuple[str, int]]]:
    """Events by parent, and the reasons with their numbers, figures left out."""
    parents: dict[str, dict[str, list[str]]] = {}
    for event in report.events:
        parent, _, leaf = event.module.rpartition(".")
        parents.setdefault(parent, {}).setdefault(event.event, []).append(leaf)
    rows = [EventRow(parent, found, why) for parent, reasons in parents.items() for why, found in reasons.items()]
    general = Counter(re.sub(r"\d+", "…", event.event) for event in report.events)
    return rows, general.most_common()
