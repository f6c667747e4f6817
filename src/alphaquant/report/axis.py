"""Axes: where a value lies between two ends, in percent, and the ticks that a reader can count by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Axis", "Tick", "linear_axis", "log_axis"]


class Tick(NamedTuple):
    """A mark of an axis: its place in percent, and what it says."""

    at: float
    label: str


class Axis(NamedTuple):
    """A scale from `low` (0%) to `high` (100%), of a value or of its logarithm."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[Tick, ...]

    def at(self, value: float) -> float:
        """The place of a value in percent, within the axis."""
        return _place(value, self.low, self.high, is_log=self.is_log)


def _place(value: float, low: float, high: float, *, is_log: bool) -> float:
    if is_log:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    if not math.isfinite(value):
        return 100.0
    return min(100.0, max(0.0, 100 * (value - low) / (high - low)))


def linear_axis(
    values: Iterable[float], *, start: float | None = None, stop: float | None = None, unit: str = "", count: int = 4
) -> Axis:
    """An axis around finite values, from `start` to `stop` where these are given, with about `count` round ticks."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin if start is None else start, high + margin if stop is None else stop
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first = math.ceil(low / step)
    marks = [i * step for i in range(first, first + 3 * count) if i * step <= high]
    return Axis(
        low,
        high,
        is_log=False,
        ticks=tuple(Tick(_place(v, low, high, is_log=False), f"{v:,.{digits}f}{unit}") for v in marks),
    )


def log_axis(values: Iterable[float], label: str = "{:,g}", scale: float = 1.0) -> Axis:
    """An axis around positive values, with ticks at 1, 2 and 5 of every power of ten; at more or fewer by its span.

    Args:
        values: what must fit; those that are not positive lie at the low end.
        label: how a tick is written.
        scale: by which a value is multiplied before it is written.
    """
    positive = [v for v in values if 0 < v < math.inf] or [1.0]
    low, high = min(positive) / 1.25, max(positive) * 1.25
    powers = range(math.floor(math.log10(low * scale)) - 1, math.ceil(math.log10(high * scale)) + 1)
    marks: list[float] = []
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1,)):
        marks = [m * 10.0**p for p in powers for m in steps if low * scale <= m * 10.0**p <= high * scale]
        if len(marks) <= 7:
            break
    return Axis(
        low,
        high,
        is_log=True,
        ticks=tuple(Tick(_place(v / scale, low, high, is_log=True), label.format(v)) for v in marks),
    )
