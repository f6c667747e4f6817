"""What a run writes down: a record for every quantized module, and the routing of every layer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from alphaquant.errors import NumericsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alphaquant.plan import ModuleKind

__all__ = [
    "STARVED_SHARE",
    "KindSummary",
    "LayerRecord",
    "ModuleRecord",
    "RepairRecord",
    "RoutingRecord",
    "TuningRecord",
    "require_finite",
    "require_quiet",
    "summarize",
]

STARVED_SHARE = 0.25
"""Of the fair share of a layer's rows: an expert with less is starved."""


@dataclass(frozen=True, slots=True)
class ModuleRecord:
    """How one module was quantized.

    Attributes:
        name: checkpoint name.
        kind: its part in the model.
        scheme: number format and groups, such as `int4 g64`.
        bits_per_weight: stored bits a weight, scales and zero points counted.
        num_weights: rows times columns.
        loss: `tr(E H Eᵀ)` under the damped mean Hessian, before any tuning; the squared error without calibration.
        relative_loss: the loss over that of leaving the weights out, `tr(W H Wᵀ)`.
        tokens: rows that its inputs' Hessian saw; 0 without calibration.
        effective_samples: `(Σc)² / Σc²` of their weights.
        damping: relative damping used; 0 where rounded to nearest.
        method: `gptq` or `rtn`.
        event: why the method or the damping differs from what was asked for; None where it does not.
        sha256: of codes, scales and zero points, in whatever layout; empty in records of older versions.
    """

    name: str
    kind: str
    scheme: str
    bits_per_weight: float
    num_weights: int
    loss: float
    relative_loss: float
    tokens: int
    effective_samples: float
    damping: float
    method: str
    event: str | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class RoutingRecord:
    """What a layer's router did on the calibration tokens, a value for each expert.

    Attributes:
        tokens: rows, that is tokens which chose it.
        score_mass: the sum of their scores.
        effective_samples: `(Σc)² / Σc²` of their weights.
        shared: the same of the shared expert's gate, whose scores are those that it is multiplied with; None where
            there is no such gate.
    """

    tokens: list[int]
    score_mass: list[float]
    effective_samples: list[float]
    shared: RoutingRecord | None = None

    @property
    def load(self) -> list[float]:
        """Rows of each expert relative to the fair share; zero where there are none at all."""
        total = sum(self.tokens)
        return [count * len(self.tokens) / total if total else 0.0 for count in self.tokens]

    @property
    def entropy(self) -> float:
        """Shannon entropy of the rows over the experts, relative to that of an even load: 1 where all see as many."""
        return sum(self.expert_entropy) if len(self.tokens) > 1 else 1.0

    @property
    def expert_entropy(self) -> list[float]:
        """What each expert adds to `entropy`: `-p ln p / ln E` of its share p of the rows; none where it has none."""
        total, unit = sum(self.tokens), math.log(max(len(self.tokens), 2))
        return [-count / total * math.log(count / total) / unit if count else 0.0 for count in self.tokens]

    @property
    def dead(self) -> list[int]:
        """Experts that no token chose."""
        return [expert for expert, count in enumerate(self.tokens) if count == 0]

    @property
    def starved(self) -> list[int]:
        """Experts that some tokens chose, but fewer than `STARVED_SHARE` of the fair share."""
        return [expert for expert, share in enumerate(self.load) if 0 < share < STARVED_SHARE]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RoutingRecord:
        """The inverse of `dataclasses.asdict`; records of older versions know no shared gate."""
        shared = data.get("shared")
        return cls(**data | {"shared": None if shared is None else cls.from_dict(shared)})


@dataclass(frozen=True, slots=True)
class RepairRecord:
    """What refitting a layer's router to the original's logits does, on calibration tokens that it was not fitted on.

    Attributes:
        tokens: so many they are.
        agreement_before: share of their experts that the original chooses, too, by the router as it was.
        agreement_after: the same by the refitted one.
        kl_before: divergence of the original's scores of all experts from the router's, nats a token.
        kl_after: the same by the refitted one.
        kept: whether the refitted one is kept: where this divergence fell.
    """

    tokens: int
    agreement_before: float
    agreement_after: float
    kl_before: float
    kl_after: float
    kept: bool


@dataclass(frozen=True, slots=True)
class TuningRecord:
    """What tuning a half-layer's codes and scales does, on calibration tokens that it was not tuned on.

    Attributes:
        half: which, by name.
        tokens: so many they are.
        loss_before: squared error of the stream behind it, relative to the original's square, a token.
        loss_after: the same with what was tuned.
        moved: share of the codes that changed.
        kept: whether it is kept: where this error fell.
    """

    half: str
    tokens: int
    loss_before: float
    loss_after: float
    moved: float
    kept: bool


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """Everything that a run notes of one layer; `layer` is None for embedding and head.

    `repair` is there where the run was to refit routers, and the layer has one. `tuning` has an entry for each
    half-layer that was tuned. `events` are those that are not of one
    module: samples and inputs that were left out, memory that ran out.
    """

    layer: int | None
    modules: list[ModuleRecord] = field(default_factory=list)
    routing: RoutingRecord | None = None
    events: list[str] = field(default_factory=list)
    repair: RepairRecord | None = None
    tuning: list[TuningRecord] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerRecord:
        """The inverse of `to_dict`."""
        routing, repair = data["routing"], data.get("repair")
        return cls(
            data["layer"],
            [ModuleRecord(**m) for m in data["modules"]],
            None if routing is None else RoutingRecord.from_dict(routing),
            data["events"],
            None if repair is None else RepairRecord(**repair),
            [TuningRecord(**half) for half in data.get("tuning", ())],
        )

    def all_events(self) -> list[dict[str, str]]:
        """Every departure from what was asked for: of which module or layer, and what."""
        of_layer = [{"module": f"layer {self.layer}", "event": event} for event in self.events]
        return of_layer + [{"module": m.name, "event": m.event} for m in self.modules if m.event is not None]


def require_quiet(record: LayerRecord) -> None:
    """Nothing was done otherwise than asked for.

    Raises:
        NumericsError: names the first that was.
    """
    for event in record.all_events():
        raise NumericsError(
            f"--strict: {event['event']}",
            where=event["module"],
            remedy="give more calibration (--nsamples, --calib), skip the module in the plan, or leave --strict out",
        )


def require_finite(record: LayerRecord) -> None:
    """Weights so large that their squares overflow have no loss that could be told.

    Raises:
        NumericsError: names the first module.
    """
    for module in record.modules:
        if not math.isfinite(module.loss) or not math.isfinite(module.relative_loss):
            raise NumericsError(
                f"the loss is {module.loss}", where=module.name, remedy="look at these weights: they are too large"
            )


@dataclass(frozen=True, slots=True)
class KindSummary:
    """All modules of one kind and scheme."""

    kind: str
    scheme: str
    modules: int
    weights: int
    bits_per_weight: float
    relative_loss: float
    fallbacks: int


def summarize(records: Sequence[LayerRecord], order: Sequence[ModuleKind]) -> list[KindSummary]:
    """One row for each kind and scheme; losses are means over modules, bits are weighted by size."""
    groups: dict[tuple[str, str], list[ModuleRecord]] = {}
    for record in records:
        for module in record.modules:
            groups.setdefault((module.kind, module.scheme), []).append(module)
    position = {kind.value: index for index, kind in enumerate(order)}
    rows = []
    for (kind, scheme), modules in sorted(groups.items(), key=lambda item: (position[item[0][0]], item[0][1])):
        weights = sum(m.num_weights for m in modules)
        rows.append(
            KindSummary(
                kind=kind,
                scheme=scheme,
                modules=len(modules),
                weights=weights,
                bits_per_weight=sum(m.bits_per_weight * m.num_weights for m in modules) / weights,
                relative_loss=sum(m.relative_loss for m in modules) / len(modules),
                fallbacks=sum(m.event is not None for m in modules),
            )
        )
    return rows
