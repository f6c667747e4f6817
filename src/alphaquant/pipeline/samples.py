"""Calibration samples that are left out because their activations are no numbers, and rows that are left out with them.

One sample in a hundred may go: a text that drives a model out of the range of its type is no reason to lose a run of
hours. More is a fault of the model or of the type, and an error.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.errors import NumericsError
from alphaquant.pipeline.collect import Shown
from alphaquant.pipeline.stream import chunks, is_finite, no_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from alphaquant.models import LayerWeights, ModelSpec, Source
    from alphaquant.pipeline.distributed import Team

__all__ = ["MOST", "Samples", "culprit", "rows_left_out"]

MOST = 0.01
"""The largest share of the samples, and of the rows of a source, that may be left out."""


@dataclass(slots=True)
class Samples:
    """Which calibration samples are left out, and since when.

    Attributes:
        left_out: their numbers.
        found: those of this half-layer that the team does not know yet: sample, and which module made it so.
    """

    left_out: set[int] = field(default_factory=set)
    found: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def of(cls, kept: Iterable[int]) -> Samples:
        """Those that a run which goes on had left out."""
        return cls(set(kept))

    def cuts(self, num_samples: int, length: int) -> list[slice | Tensor | None]:
        """The chunks of a stream without the samples that are left out; None where none is left of one."""
        cuts: list[slice | Tensor | None] = []
        for cut in chunks(num_samples, length):
            rest = [sample for sample in range(cut.start, cut.stop) if sample not in self.left_out]
            if len(rest) == cut.stop - cut.start:
                cuts.append(cut)
            else:
                cuts.append(torch.tensor(rest) if rest else None)
        return cuts

    def kept(self, num_samples: int) -> Tensor:
        """The numbers of all others."""
        return torch.tensor([sample for sample in range(num_samples) if sample not in self.left_out])

    def settle(self, num_samples: int, where: str, team: Team) -> list[str]:
        """Leave out what any process of the team has found in this half-layer; returns what to note of it.

        Raises:
            NumericsError: it is more than one in a hundred.
        """
        found = sorted((int(sample), str(module)) for part in team.tell(self.found) for sample, module in part)
        self.found.clear()
        self.left_out.update(sample for sample, _ in found)
        if found and len(self.left_out) > MOST * num_samples:
            raise no_number(found[0][0], where, found[0][1])
        modules: defaultdict[str, list[int]] = defaultdict(list)
        for sample, module in found:
            modules[module].append(sample)
        return [
            f"{where}, {module}: sample {', '.join(map(str, numbers))} left out, NaN or infinite from here on"
            for module, numbers in modules.items()
        ]


def culprit(half: Callable[..., None], x_1LD: Tensor, weights: LayerWeights, spec: ModelSpec, layer: int) -> str:
    """Where in a half-layer a sample becomes NaN or infinite: the input or the output of a module."""
    shown = Shown()
    half(x_1LD, weights, spec, layer, tap=shown)
    for source, (x_RI, routing, _) in shown.rows.items():
        counts = [x_RI.shape[0]] if routing is None else routing.counts_E.tolist()
        for parameter in spec.parameters(layer):
            if parameter.source is not source:
                continue
            for expert, (rows_RI, name) in enumerate(
                zip(x_RI.split(counts), spec.module_names(layer, parameter), strict=True)
            ):
                if not is_finite(rows_RI):
                    return f"input of {name}"
                weight_OI = weights[parameter.key][expert] if parameter.num_experts else weights[parameter.key]
                if not is_finite(F.linear(rows_RI, weight_OI)):
                    return f"output of {name}"
    return "sum with the residual"


def rows_left_out(seen: Mapping[Source, tuple[int, int]], spec: ModelSpec, layer: int, where: str) -> list[str]:
    """What to note of inputs that are no numbers, which the Hessians do without.

    Args:
        seen: of each source the rows that are no numbers, and all.
        spec: the model.
        layer: which.
        where: which half of it.

    Raises:
        NumericsError: they are more than one in a hundred.
    """
    notes = []
    for source, (bad, total) in seen.items():
        if not bad:
            continue
        reader = next(p for p in spec.parameters(layer) if p.source is source)
        what = f"{bad} of {total} inputs of {reader.role} are NaN or infinite"
        if bad > MOST * total:
            raise NumericsError(
                f"activations become NaN or infinite: {what}",
                where=where,
                remedy="run with --dtype fp32, or look at the weights of this layer",
            )
        notes.append(f"{where}: {what}, and left out of the Hessian")
    return notes
