"""Heat maps of the layers: bits, loss and other figures by layer and projection."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from alphaquant.plan import ModuleKind
from alphaquant.wording import percent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from alphaquant.pipeline.records import ModuleRecord
    from alphaquant.report.read import Run

__all__ = ["STEPS", "Cell", "LayerMap", "layer_maps", "log_bounds", "mean"]

STEPS = 8  # of a colour ramp
_BITS = (2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.6)  # absolute, so that two reports can be compared by eye
_KINDS = [kind.value for kind in ModuleKind]


class Cell(NamedTuple):
    """A cell: step of the ramp, the figure, and all that is known of it."""

    step: int
    text: str
    title: str


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Figures by layer and projection; a cell is None where no such module was quantized.

    Attributes:
        ramp: letter of the colour ramp.
        groups: kinds, and how many columns each has.
        columns: kind and projection.
        rows: layer and its cells.
    """

    ramp: str
    groups: list[tuple[str, int]]
    columns: list[tuple[str, str]]
    rows: list[tuple[int | None, list[Cell | None]]]


_Key = tuple[str, str]


def layer_maps(run: Run) -> tuple[LayerMap, LayerMap] | None:
    """Bits and relative loss; the experts of a layer are averaged. None where no layer was quantized."""
    rows: list[tuple[int | None, dict[_Key, list[ModuleRecord]]]] = []
    found: dict[_Key, None] = {}
    for layer in run.layers:
        cells: dict[_Key, list[ModuleRecord]] = {}
        for module in layer.modules:
            cells.setdefault((module.kind, module.name.rpartition(".")[2]), []).append(module)
        found |= dict.fromkeys(cells)
        rows.append((layer.layer, cells))
    if not found:
        return None
    columns = sorted(found, key=lambda column: _position(column[0]))
    bounds = log_bounds([mean(m.relative_loss for m in modules) for _, cells in rows for modules in cells.values()])

    def bits_cell(modules: Sequence[ModuleRecord], where: str) -> Cell:
        weights = sum(m.num_weights for m in modules)
        bits = sum(m.bits_per_weight * m.num_weights for m in modules) / max(1, weights)
        schemes = Counter(m.scheme for m in modules)
        parts = ", ".join(name if len(schemes) == 1 else f"{number} × {name}" for name, number in schemes.items())
        return Cell(bisect_right(_BITS, bits), f"{bits:.2f}", f"{where}: {bits:.2f} bits ({parts})")

    def loss_cell(modules: Sequence[ModuleRecord], where: str) -> Cell:
        loss = mean(m.relative_loss for m in modules)
        title = f"{where}: loss {loss:.3%}"
        if len(modules) > 1:
            title += f"; mean of {len(modules)}, worst {max(m.relative_loss for m in modules):.3%}"
        return Cell(bisect_right(bounds, loss), percent(loss), title)

    def draw(ramp: str, cell: Callable[[Sequence[ModuleRecord], str], Cell]) -> LayerMap:
        table = []
        for layer, cells in rows:
            line = []
            for kind, projection in columns:
                modules = cells.get((kind, projection))
                where = f"layer {layer}, {kind.replace('_', ' ')} {projection}"
                line.append(None if modules is None else cell(modules, where))
            table.append((layer, line))
        return LayerMap(ramp, list(Counter(kind for kind, _ in columns).items()), columns, table)

    return draw("g", bits_cell), draw("s", loss_cell)


def log_bounds(values: Sequence[float]) -> list[float]:
    """Where the steps of a ramp over the values' logarithm begin, but for the first.

    A narrow range is not stretched over the whole ramp: it is a factor of four at least, of ten thousand at most.
    """
    high = max(values)
    if high <= 0:
        return []
    low = max(min(*values, high / 4), high / 1e4)
    return [low * math.exp(math.log(high / low) * step / STEPS) for step in range(1, STEPS)]


def mean(values: Iterable[float]) -> float:
    """Of at least one value."""
    figures = list(values)
    return sum(figures) / len(figures)


def _position(kind: str) -> int:
    return _KINDS.index(kind) if kind in _KINDS else len(_KINDS)
