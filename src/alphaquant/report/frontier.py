"""The frontier of budgets as a page: size against divergence, the knee marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.report.axis import linear_axis, log_axis
from alphaquant.report.render import write_page
from alphaquant.wording import human_bytes

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_frontier"]

_SERIES = (("measured", "measured KL"), ("uniform", "uniform plan, measured"), ("predicted", "predicted KL"))


class _Mark(NamedTuple):
    x: float
    y: float
    title: str
    is_knee: bool


def write_frontier(facts: dict[str, Any], path: Path) -> None:
    """Write one page.

    Args:
        facts: a frontier's `to_dict`.
        path: the file.

    Raises:
        OutputError: it cannot be written.
    """
    points = facts["points"]
    has_unit = facts["method"] == "sensitivity"
    shown = [(key, label) for key, label in _SERIES if points[0][key] is not None and (key != "predicted" or has_unit)]
    shown = shown or [("predicted", "predicted cost")]
    power = max(0, (max(p["num_bytes"] for p in points).bit_length() - 1) // 10)
    unit = 1024 ** min(power, 4)
    x = linear_axis(p["num_bytes"] / unit for p in points)
    y = log_axis(p[key] for p in points for key, _ in shown)
    series = [
        (
            label,
            [
                _Mark(
                    x.at(p["num_bytes"] / unit),
                    100 - y.at(p[key]),
                    f"{p['bits']:.3f} bits, {human_bytes(p['num_bytes'])}: {label} {p[key]:.4g}",
                    number == facts["knee"],
                )
                for number, p in enumerate(points)
                if p[key] > 0
            ],
        )
        for key, label in shown
    ]
    names = ("bytes", "KiB", "MiB", "GiB", "TiB")
    context = {"facts": facts, "series": series, "x": x, "y": y, "unit": names[min(power, 4)], "bytes": human_bytes}
    write_page("frontier.html", context, path)
