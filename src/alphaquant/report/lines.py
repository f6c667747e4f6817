"""Charts with a line for each of several things, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from alphaquant.report.axis import Axis, Tick, log_axis

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from alphaquant.pipeline.records import LayerRecord

__all__ = ["LayerChart", "layer_chart", "tuning_chart"]


class LayerPoint(NamedTuple):
    """A layer on one line: percent from the left and from the top, and all that is known of it."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, slots=True)
class LayerChart:
    """Lines by name over the layers."""

    x: Axis
    y: Axis
    lines: list[tuple[str, list[LayerPoint]]]


def layer_chart(lines: Mapping[str, Sequence[tuple[float, float, str]]], y: Axis, last: int) -> LayerChart:
    """Lines of layer, value and title; `last` is the number of the last layer."""
    step = next(step for step in (1, 2, 5, 10, 20, 50) if last / step <= 12)
    x = Axis(-0.5, last + 0.5, is_log=False, ticks=())
    x = x._replace(ticks=tuple(Tick(x.at(layer), str(layer)) for layer in range(0, last + 1, step)))
    points = [
        (name, [LayerPoint(x.at(layer), 100 - y.at(value), title) for layer, value, title in line])
        for name, line in lines.items()
    ]
    return LayerChart(x, y, points)


def tuning_chart(layers: Sequence[LayerRecord]) -> LayerChart | None:
    """Relative error of the stream behind each half-layer, before tuning it and after; None where none was tuned.

    Attention lies a quarter to the left of its layer, the feed-forward a quarter to the right.
    """
    found = [(record.layer, half) for record in layers for half in record.tuning if record.layer is not None]
    if not found:
        return None
    lines: dict[str, list[tuple[float, float, str]]] = {"before": [], "after": []}
    for layer, half in found:
        place = layer + (-0.25 if half.half.endswith("attention") else 0.25)
        change = f"{half.loss_before:.4%} to {half.loss_after:.4%}, {half.moved:.2%} of codes moved"
        title = f"{half.half}: {change}" + ("" if half.kept else "; not kept")
        lines["before"].append((place, 100 * half.loss_before, title))
        lines["after"].append((place, 100 * (half.loss_after if half.kept else half.loss_before), title))
    y = log_axis([value for line in lines.values() for _, value, _ in line], "{:,g}%")
    return layer_chart(lines, y, max(layer for layer, _ in found))
