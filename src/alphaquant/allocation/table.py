"""The error table: what each module would cost in each candidate format, and the bits it would take there."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from alphaquant.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ErrorTable", "Row"]

_VERSION = 1
_ANEW = "make it anew: leave --table out, or name a file that does not exist yet"


@dataclass(frozen=True, slots=True)
class Row:
    """One module that can be quantized.

    Attributes:
        name: checkpoint name.
        kind: its role in the decoder.
        num_weights: weights.
        bits: stored bits in each candidate, scales and zero points counted; None where the format does not fit.
        cost: predicted cost in each candidate; None where the format does not fit.
        facts: what the estimator found, for the report.
    """

    name: str
    kind: str
    num_weights: int
    bits: tuple[int | None, ...]
    cost: tuple[float | None, ...]
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ErrorTable:
    """Modules by candidate formats, of one checkpoint.

    Attributes:
        method: the estimator that filled it.
        checkpoint: digest of the checkpoint it belongs to.
        candidates: formats in shorthand, in the order of the rows' columns.
        rows: every module that can be quantized, in the model's order.
        settings: how it was made.
    """

    method: str
    checkpoint: str
    candidates: tuple[str, ...]
    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def narrowed(self, candidates: tuple[str, ...]) -> ErrorTable:
        """The same table with only these candidates, in their order.

        Raises:
            PlanError: it lacks one of them.
        """
        missing = [text for text in candidates if text not in self.candidates]
        if missing:
            raise PlanError(
                f"the table lacks {', '.join(missing)}; it holds {', '.join(self.candidates)}",
                where="--formats",
                remedy=f"ask for formats that it holds, or {_ANEW}",
            )
        columns = [self.candidates.index(text) for text in candidates]
        rows = tuple(
            Row(
                r.name,
                r.kind,
                r.num_weights,
                tuple(r.bits[c] for c in columns),
                tuple(r.cost[c] for c in columns),
                r.facts,
            )
            for r in self.rows
        )
        return ErrorTable(self.method, self.checkpoint, candidates, rows, self.settings)

    def to_json(self) -> str:
        """The file's text."""
        head = {k: v for k, v in asdict(self).items() if k != "rows"}
        rows = ",\n  ".join(json.dumps(asdict(row)) for row in self.rows)
        return json.dumps({"version": _VERSION, **head})[:-1] + f', "rows": [\n  {rows}\n]}}\n'

    def to_csv(self) -> str:
        """A line for each module: what the estimator found of it (α, or slope and share), its bits and its costs."""
        facts = sorted({fact for row in self.rows for fact in row.facts})
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        columns = [f"{what} {candidate}" for candidate in self.candidates for what in ("bits", "cost")]
        lines.writerow(["module", "kind", "weights", *facts, *columns])
        for row in self.rows:
            pairs = [value for pair in zip(row.bits, row.cost, strict=True) for value in pair]
            lines.writerow([row.name, row.kind, row.num_weights, *(row.facts.get(fact) for fact in facts), *pairs])
        return text.getvalue()

    @classmethod
    def load(cls, path: Path, checkpoint: str, method: str) -> ErrorTable:
        """Read a saved table.

        Raises:
            PlanError: it cannot be read, is no such table, or belongs to another checkpoint or method.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != _VERSION:
                raise PlanError(f"the table has version {data['version']!r}", where=str(path), remedy=_ANEW)
            rows = tuple(_row(row, len(data["candidates"])) for row in data["rows"])
            table = cls(data["method"], data["checkpoint"], tuple(data["candidates"]), rows, data["settings"])
        except OSError as error:
            raise PlanError(f"the table cannot be read: {error.strerror}", where=str(path), remedy=_ANEW) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"this is no error table: {type(error).__name__}: {error}"
            raise PlanError(what, where=str(path), remedy=_ANEW) from None
        if table.checkpoint != checkpoint:
            what = f"the table belongs to another checkpoint ({table.checkpoint[:12]}…, this one is {checkpoint[:12]}…)"
            raise PlanError(what, where=str(path), remedy=_ANEW)
        if table.method != method:
            what = f"the table was made by --method {table.method}, not {method}"
            raise PlanError(what, where=str(path), remedy=f"give --method {table.method}, or {_ANEW}")
        return table


def _row(data: dict[str, Any], width: int) -> Row:
    row = Row(data["name"], data["kind"], data["num_weights"], tuple(data["bits"]), tuple(data["cost"]), data["facts"])
    if not (isinstance(row.name, str) and len(row.bits) == len(row.cost) == width and row.num_weights > 0):
        raise ValueError(f"row {row.name!r} does not fit {width} candidates")
    for bits, cost in zip(row.bits, row.cost, strict=True):
        if (bits is None) != (cost is None) or (bits is not None and bits <= 0):
            raise ValueError(f"row {row.name!r} has {bits!r} bits at a cost of {cost!r}")
        if cost is not None and not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"row {row.name!r} has a cost of {cost!r}")
    return row
