"""What a plan makes of a model's size, known before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alphaquant.plan import ModuleKind

if TYPE_CHECKING:
    from alphaquant.pipeline.run import Prepared

__all__ = ["KindSize", "plan_sizes"]


@dataclass(frozen=True, slots=True)
class KindSize:
    """All modules of one kind under one scheme: how many, how many weights, and their bytes before and after."""

    kind: str
    scheme: str
    modules: int
    weights: int
    before_bytes: int
    after_bytes: int


def plan_sizes(prepared: Prepared) -> list[KindSize]:
    """One row for each kind and scheme, in the model's order of kinds; scales and zero points are counted."""
    rows: dict[tuple[ModuleKind, str], list[int]] = {}
    for module in prepared.spec.modules():
        scheme = prepared.schemes[module.name]
        info = prepared.source.info(f"{module.name}.weight")
        weights = module.out_features * module.in_features
        after = info.num_bytes
        if scheme is not None:
            after = round(scheme.bits_per_weight(module.out_features, module.in_features) * weights / 8)
        label = str(scheme) if scheme is not None else str(info.dtype).removeprefix("torch.")
        row = rows.setdefault((module.kind, label), [0, 0, 0, 0])
        for position, value in enumerate((1, weights, info.num_bytes, after)):
            row[position] += value
    order = list(ModuleKind)
    keys = sorted(rows, key=lambda key: (order.index(key[0]), key[1]))
    return [KindSize(kind.value, scheme, *rows[kind, scheme]) for kind, scheme in keys]
