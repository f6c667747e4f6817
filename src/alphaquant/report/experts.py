"""What the experts saw on the calibration tokens, and what it cost those that saw little."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from alphaquant.pipeline.records import STARVED_SHARE
from alphaquant.plan import ModuleKind
from alphaquant.report.axis import Axis, linear_axis, log_axis
from alphaquant.report.lines import LayerChart, layer_chart
from alphaquant.report.maps import mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alphaquant.pipeline.records import LayerRecord, ModuleRecord, RepairRecord
    from alphaquant.report.read import QualityRow

__all__ = ["Experts", "Scatter", "expert_scatter", "experts", "router_chart"]

_SHARES = (0.25, 0.5, 0.75, 4 / 3, 2.0, 3.0)
_LABELS = ("under ¼", "¼ to ½", "½ to ¾", "fair", "1⅓ to 2", "2 to 3", "over 3")
_MAP_WIDTH = 1020  # of a map where its cells need not be at their narrowest, in CSS pixels
_PALETTE = 4  # colours of the scatter; the last is for all other schemes


class ExpertCell(NamedTuple):
    """An expert: step of the ramp, its mark (`starved`, `dead` or none), and all that is known of it."""

    step: int
    mark: str
    title: str


class ExpertRow(NamedTuple):
    """A layer's experts by tokens and by score mass; shares are relative to the fair one."""

    layer: int | None
    tokens: list[ExpertCell]
    mass: list[ExpertCell]
    least: float
    most: float
    starved: int
    dead: int


@dataclass(frozen=True, slots=True)
class Experts:
    """Shares of tokens and of score mass by layer and expert, and the geometry of their maps in CSS pixels.

    `repairs` is what refitting did to the routers, by layer; empty where none was refitted.
    """

    rows: list[ExpertRow]
    repairs: list[tuple[int | None, RepairRecord]]
    width: int
    cell_width: int
    cell_height: int
    legend: tuple[str, ...] = _LABELS

    @property
    def count(self) -> int:
        """Experts of all layers."""
        return sum(len(row.tokens) for row in self.rows)

    @property
    def starved(self) -> int:
        """Experts that saw tokens, but under a quarter of the fair share."""
        return sum(row.starved for row in self.rows)

    @property
    def dead(self) -> int:
        """Experts that saw no token."""
        return sum(row.dead for row in self.rows)


def experts(layers: Sequence[LayerRecord]) -> Experts | None:
    """None for a model without experts; no rows where nothing was calibrated."""
    routed = [layer for layer in layers if layer.routing is not None and layer.routing.tokens]
    if not routed and not any(m.kind == ModuleKind.EXPERT.value for layer in layers for m in layer.modules):
        return None
    rows = [_row(record) for record in routed]
    width = max((len(row.tokens) for row in rows), default=1)
    # two maps stand side by side where they are narrow enough
    room = _MAP_WIDTH if width > 32 else _MAP_WIDTH // 2
    cell_width = min(28, max(8, room // width))
    repairs = [(layer.layer, layer.repair) for layer in layers if layer.repair is not None]
    return Experts(rows, repairs, width, cell_width, min(18, max(12, cell_width)))


def _row(record: LayerRecord) -> ExpertRow:
    assert record.routing is not None
    routing = record.routing
    shares, mass = _shares(routing.tokens), _shares(routing.score_mass)
    token_cells, mass_cells = [], []
    for expert, seen in enumerate(routing.tokens):
        where = f"layer {record.layer}, expert {expert}: "
        share = shares[expert]
        mark = "dead" if seen == 0 else "starved" if share < STARVED_SHARE else ""
        effective = routing.effective_samples[expert]
        title = f"{share / len(shares):.2%} of tokens, {share:.2f} × fair, {seen:,} tokens, {effective:,.0f} effective"
        token_cells.append(ExpertCell(bisect_right(_SHARES, share), mark, where + title))
        heavy = mass[expert]
        title = f"{heavy / len(mass):.2%} of score mass, {heavy:.2f} × fair"
        mass_cells.append(ExpertCell(bisect_right(_SHARES, heavy), mark if seen == 0 else "", where + title))
    marks = [cell.mark for cell in token_cells]
    return ExpertRow(
        record.layer, token_cells, mass_cells, min(shares), max(shares), marks.count("starved"), marks.count("dead")
    )


def _shares(values: Sequence[float]) -> list[float]:
    """Each value relative to the mean of all."""
    total = sum(values)
    return [value * len(values) / total if total else 0.0 for value in values]


class Point(NamedTuple):
    """An expert in the plane: place in percent from the left and from the top, number of its colour, marks, title."""

    x: float
    y: float
    colour: int
    fell_back: bool
    title: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """Relative loss against tokens, an expert a point; colours are schemes."""

    x: Axis
    y: Axis
    points: list[Point]
    colours: list[str]
    fell_back: int


def expert_scatter(layers: Sequence[LayerRecord]) -> Scatter | None:
    """None where no expert was quantized with calibration."""
    found: list[tuple[str, str, list[ModuleRecord]]] = []
    for layer in layers:
        groups: dict[str, list[ModuleRecord]] = {}
        for module in layer.modules:
            if module.kind == ModuleKind.EXPERT.value:
                groups.setdefault(module.name.rpartition(".")[0], []).append(module)
        for parent, modules in groups.items():
            schemes = sorted({m.scheme for m in modules})
            found.append((f"layer {layer.layer}, expert {parent.rpartition('.')[2]}", ", ".join(schemes), modules))
    if not any(module.tokens for _, _, modules in found for module in modules):
        return None
    schemes = list(dict.fromkeys(scheme for _, scheme, _ in found))
    colours = schemes if len(schemes) <= _PALETTE else [*schemes[: _PALETTE - 1], "other schemes"]
    losses = [mean(m.relative_loss for m in modules) for _, _, modules in found]
    x = log_axis(max(m.tokens for m in modules) for _, _, modules in found)
    y = log_axis(losses, "{:g}%", 100)
    points = []
    for (name, scheme, modules), loss in zip(found, losses, strict=True):
        tokens = max(m.tokens for m in modules)
        fell_back = any(m.event is not None for m in modules)
        title = f"{name}: {tokens:,} tokens, loss {loss:.3%}, {scheme}" + (", fell back" if fell_back else "")
        colour = min(schemes.index(scheme), len(colours) - 1)
        points.append(Point(x.at(tokens), 100 - y.at(loss), colour, fell_back, title))
    points.sort(key=lambda point: point.fell_back)
    return Scatter(x, y, points, colours, sum(point.fell_back for point in points))


def router_chart(rows: Sequence[QualityRow]) -> LayerChart | None:
    """Share of experts chosen as by the original; a line for each measurement. None where no routers were compared."""
    found = [row for row in rows if row.measured.router is not None][:_PALETTE]
    if not found:
        return None
    shares = [share for row in found for share in row.measured.router_by_layer if share is not None]
    y = linear_axis([100 * min(shares), 100.0], stop=100.0, unit="%")
    lines = {
        row.label: [
            (layer, 100 * share, f"{row.label}, layer {layer}: same experts {share:.2%}")
            for layer, share in enumerate(row.measured.router_by_layer)
            if share is not None
        ]
        for row in found
    }
    return layer_chart(lines, y, max(len(row.measured.router_by_layer) for row in found) - 1)
