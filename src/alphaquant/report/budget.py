"""What an error table says of a run's plan: the frontier of size and predicted cost, and the spectra's α."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from alphaquant.report.axis import Axis, linear_axis, log_axis
from alphaquant.report.maps import STEPS, Cell, LayerMap, mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alphaquant.report.read import Run, Table, TableRow

__all__ = ["Frontier", "alpha_map", "frontier"]

_POINTS = 120
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Mark(NamedTuple):
    """A plan in the plane of size and cost: percent from the left and from the top, and all that is known of it."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, slots=True)
class Frontier:
    """Bits a weight against predicted cost: the best plans, those of one format, and the run's own if known."""

    x: Axis
    y: Axis
    best: list[Mark]
    uniform: list[Mark]
    run: Mark | None


class _Plan(NamedTuple):
    bits: float
    cost: float
    name: str


def frontier(table: Table, run: Run) -> Frontier | None:
    """None where the table has fewer than two plans of different size."""
    rows = [row for row in table.rows if any(bits is not None for bits in row.bits)]
    weights = sum(row.num_weights for row in rows)
    best = _thinned(_hull_walk(rows, weights))
    if len(best) < 2:
        return None
    uniform = []
    for column, name in enumerate(table.candidates):
        plan = _chosen(rows, [column] * len(rows), weights, f"{name} everywhere")
        uniform += [] if plan is None else [plan]
    own = _own(table, rows, run, weights)
    shown = [*best, *uniform, *([] if own is None else [own])]
    x, y = linear_axis((plan.bits for plan in shown), count=6), log_axis(plan.cost for plan in shown)

    def mark(plan: _Plan) -> Mark:
        title = f"{plan.name}: {plan.bits:.3f} bits a weight, predicted cost {plan.cost:.4g}"
        return Mark(x.at(plan.bits), 100 - y.at(plan.cost), title)

    return Frontier(x, y, [mark(p) for p in best], [mark(p) for p in uniform], None if own is None else mark(own))


def _hull_walk(rows: Sequence[TableRow], weights: int) -> list[_Plan]:
    """From the smallest plan up, the step first that saves most for its bits: the plans on the convex hull."""
    bits, cost, steps = 0, 0.0, []
    for row in rows:
        options = sorted((b, c) for b, c in zip(row.bits, row.cost, strict=True) if b is not None and c is not None)
        at, size = options[0][1], options[0][0]
        bits, cost = bits + size, cost + at
        while ahead := [(b, c) for b, c in options if b > size and c < at]:
            b, c = max(ahead, key=lambda option: (at - option[1]) / (option[0] - size))
            steps.append(((at - c) / (b - size), b - size, c - at))
            size, at = b, c
    plans = [_Plan(bits / weights, cost, "the least")]
    for _, more, saved in sorted(steps, key=lambda step: -step[0]):
        bits, cost = bits + more, cost + saved
        plans.append(_Plan(bits / weights, cost, "best of its size"))
    return plans


def _thinned(plans: list[_Plan]) -> list[_Plan]:
    stride = max(1, math.ceil(len(plans) / _POINTS))
    return [plan for i, plan in enumerate(plans) if i % stride == 0 or i == len(plans) - 1]


def _chosen(rows: Sequence[TableRow], columns: Sequence[int | None], weights: int, name: str) -> _Plan | None:
    """The plan of one candidate a row; None where one does not fit."""
    bits, cost = 0, 0.0
    for row, column in zip(rows, columns, strict=True):
        b, c = (None, None) if column is None else (row.bits[column], row.cost[column])
        if b is None or c is None:
            return None
        bits, cost = bits + b, cost + c
    return _Plan(bits / weights, cost, name)


def _own(table: Table, rows: Sequence[TableRow], run: Run, weights: int) -> _Plan | None:
    schemes = {module.name: module.scheme for record in run.layers for module in record.modules}
    number = {name: i for i, name in enumerate(table.candidates)}

    def column(row: TableRow) -> int | None:
        scheme = schemes.get(row.name, "bf16").replace(" ", ":")
        return number.get(scheme, number.get(scheme.split(":")[0]))

    return _chosen(rows, [column(row) for row in rows], weights, "this run")


def alpha_map(table: Table) -> LayerMap | None:
    """α by layer and projection, the experts of a layer averaged; None where it was not computed."""
    found: dict[int, dict[tuple[str, str], list[float]]] = {}
    columns: dict[tuple[str, str], None] = {}
    for row in table.rows:
        layer = _LAYER.search(row.name)
        if layer is None or row.facts.get("alpha") is None:
            continue
        key = (row.kind, row.name.rpartition(".")[2])
        columns[key] = None
        found.setdefault(int(layer[1]), {}).setdefault(key, []).append(row.facts["alpha"])
    if not found:
        return None
    means = [mean(values) for cells in found.values() for values in cells.values()]
    low, high = math.log(min(means)), math.log(max(means))

    def cell(layer: int, key: tuple[str, str]) -> Cell | None:
        values = found[layer].get(key)
        if values is None:
            return None
        alpha = mean(values)
        # the heavier the tail, the smaller α, the stronger the colour
        step = 0 if high == low else min(STEPS - 1, int(STEPS * (high - math.log(alpha)) / (high - low)))
        title = f"layer {layer}, {key[0].replace('_', ' ')} {key[1]}: α {alpha:.3f}"
        if len(values) > 1:
            title += f"; mean of {len(values)}, {min(values):.3f} to {max(values):.3f}"
        return Cell(step, f"{alpha:.2f}", title)

    groups: dict[str, int] = {}
    for kind, _ in columns:
        groups[kind] = groups.get(kind, 0) + 1
    return LayerMap(
        "s",
        list(groups.items()),
        list(columns),
        [(layer, [cell(layer, key) for key in columns]) for layer in sorted(found)],
    )
