"""Several runs side by side: figures, what they differ in, and where each lies between size and divergence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.report.axis import Axis, linear_axis
from alphaquant.report.charts import total_seconds
from alphaquant.report.experts import experts
from alphaquant.wording import duration, human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from alphaquant.report.read import Measured, QualityRow, Run

__all__ = ["Comparison", "comparison"]

_Pair = tuple["Run", "list[QualityRow]"]


class Line(NamedTuple):
    """A figure of every run; `best` is the position of the best, where one is better than all others."""

    name: str
    values: list[str]
    best: int | None = None


class Place(NamedTuple):
    """A run in the plane of size and KL: percent from the left and from the top, and its number."""

    x: float
    y: float
    number: int
    title: str


@dataclass(frozen=True, slots=True)
class Plane:
    """Size against KL."""

    x: Axis
    y: Axis
    unit: str
    places: list[Place]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison shows.

    Attributes:
        names: of the runs.
        figures: size, quality, cost.
        kinds: relative loss and scheme by kind of module.
        settings: those that differ.
        plane: None where fewer than two runs know their KL.
        remark: why figures may not be compared; empty where they may.
    """

    names: list[str]
    figures: list[Line]
    kinds: list[Line]
    settings: list[Line]
    plane: Plane | None
    remark: str


def comparison(runs: Sequence[_Pair]) -> Comparison:
    """Of two runs or more."""
    names = _names([run for run, _ in runs])
    digests = {run.report.model.digest for run, _ in runs}
    remark = "" if len(digests) == 1 else "These runs quantized different models: their losses cannot be compared."
    return Comparison(names, _figures(runs), _kinds(runs), _settings(runs), _plane(runs, names), remark)


def _names(runs: Sequence[Run]) -> list[str]:
    """The directories' last parts; whole paths where these are not enough to tell them apart."""
    short = [run.directory.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.directory) for run in runs]


def _measured(pair: _Pair) -> Measured | None:
    rows = pair[1]
    best = next((row for row in rows if row.measured.kl is not None), rows[0] if rows else None)
    return None if best is None else best.measured


def _figures(runs: Sequence[_Pair]) -> list[Line]:
    def line(name: str, value: Callable[[_Pair], float | None], show: Callable[[float], str], sign: int = 1) -> Line:
        values = [value(pair) for pair in runs]
        known = [sign * v for v in values if v is not None]
        best = None
        if len(known) == len(values) and sign and known.count(min(known)) == 1:
            best = known.index(min(known))
        return Line(name, ["" if v is None else show(v) for v in values], best)

    def quality(field: str) -> Callable[[_Pair], float | None]:
        return lambda pair: None if (m := _measured(pair)) is None else getattr(m, field)

    lines = [
        line("size", lambda p: p[0].report.sizes.after_bytes, human_bytes),
        line("bits a quantized weight", lambda p: p[0].report.sizes.bits_per_weight, "{:.3f}".format),
        line("perplexity", quality("perplexity"), "{:.4f}".format),
        line("± (one standard error)", quality("stderr"), "{:.4f}".format, 0),
        line("KL to the original, nats a token", quality("kl"), "{:.5f}".format),
        line("± (one standard error)", quality("kl_stderr"), "{:.5f}".format, 0),
        line("same top token", quality("top1_agreement"), "{:.2%}".format, -1),
        line("same experts", quality("router"), "{:.2%}".format, -1),
        line("modules that fell back", lambda p: len(p[0].report.events), "{:,.0f}".format),
        line("starved experts", lambda p: _starved(p[0]), "{:,.0f}".format),
        line("time", lambda p: total_seconds(p[0].report.seconds) or None, duration),
        line("memory at the peak", lambda p: p[0].report.peak_memory_bytes, human_bytes),
    ]
    return [found for found in lines if any(found.values)]


def _starved(run: Run) -> int | None:
    found = experts(run.layers)
    return None if found is None or not found.rows else found.starved + found.dead


def _kinds(runs: Sequence[_Pair]) -> list[Line]:
    cells: dict[str, list[str]] = {}
    for position, (run, _) in enumerate(runs):
        for row in run.report.summary:
            line = cells.setdefault(row.kind.replace("_", " "), [""] * len(runs))
            text = f"{row.scheme}: {100 * row.relative_loss:.3f}%"
            line[position] = f"{line[position]}, {text}" if line[position] else text
    return [Line(kind, values) for kind, values in cells.items()]


def _settings(runs: Sequence[_Pair]) -> list[Line]:
    tables = [_flat(run) for run, _ in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    lines = [Line(name, [table.get(name, "") for table in tables]) for name in names]
    return [line for line in lines if len(set(line.values)) > 1]


def _flat(run: Run) -> dict[str, str]:
    report = run.report
    calibration: dict[str, Any] = {} if report.calibration is None else report.calibration.model_dump()
    if "digest" in calibration:
        calibration["digest"] = calibration["digest"][:12]
    facts: dict[str, Any] = {
        "model": report.model.name,
        "digest of the model": report.model.digest[:12],
        "layout": report.layout,
        **{key.replace("_", " "): value for key, value in report.recipe.items()},
        **{f"calibration {key.replace('_', ' ')}": value for key, value in calibration.items()},
        "device": report.device,
        "alphaquant": report.alphaquant,
        "torch": report.torch,
    }
    default = run.plan.get("default")
    if isinstance(default, dict):
        facts |= {f"plan default {key}": value for key, value in default.items()}
    overrides = run.plan.get("overrides")
    for rule in overrides if isinstance(overrides, list) else []:
        if isinstance(rule, dict):
            keys = {key: value for key, value in rule.items() if key not in ("pattern", "comment")}
            facts[f"plan {rule.get('pattern')}"] = json.dumps(keys, ensure_ascii=False)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def _plane(runs: Sequence[_Pair], names: Sequence[str]) -> Plane | None:
    found = [
        (position, run.report.sizes.after_bytes, m.kl)
        for position, (run, quality) in enumerate(runs)
        if (m := _measured((run, quality))) is not None and m.kl is not None
    ]
    if len(found) < 2:
        return None
    power = min(size for _, size, _ in found).bit_length() // 10
    unit = 1024 ** min(power, 4)
    x = linear_axis(size / unit for _, size, _ in found)
    y = linear_axis([0.0, *(kl for _, _, kl in found)], start=0.0)
    places = [
        Place(x.at(size / unit), 100 - y.at(kl), number + 1, f"{names[number]}: {human_bytes(size)}, KL {kl:.5f}")
        for number, size, kl in found
    ]
    return Plane(x, y, ("B", "KiB", "MiB", "GiB", "TiB")[min(power, 4)], places)
