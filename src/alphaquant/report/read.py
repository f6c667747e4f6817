"""What a run left behind, checked on the way in: report, plan, records, and measurements of quality."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003  (pydantic reads it)
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from alphaquant.checkpoint import hub_id_of
from alphaquant.errors import CheckpointError
from alphaquant.pipeline.records import KindSummary, LayerRecord
from alphaquant.pipeline.rundir import FOLDER

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["QualityRow", "Run", "RunReport", "Table", "TableRow", "read_quality", "read_run", "read_table"]

_VERSION = 1
_T = TypeVar("_T")


class _Part(BaseModel):
    """A part of report.json; keys that a later version adds are passed over."""

    model_config = ConfigDict(frozen=True)


class ModelFacts(_Part):
    """The checkpoint that was quantized."""

    path: str
    family: str
    architecture: str
    digest: str

    @property
    def name(self) -> str:
        """The last part of its path, or the hub id where it lies in the hub's cache."""
        return hub_id_of(self.path) or PurePath(self.path).name or self.path


class CalibrationFacts(_Part):
    """The tokens that the run saw."""

    source: str
    num_samples: int
    seqlen: int
    seed: int
    digest: str


class Sizes(_Part):
    """Bytes of the weights before and after, and the bits of those that were quantized."""

    before_bytes: int = Field(ge=0)
    after_bytes: int = Field(gt=0)
    quantized_weights: int
    bits_per_weight: float | None


class Audit(_Part):
    """Numbers of modules: that the plan targets, that were quantized, that were left."""

    targeted: int
    quantized: int
    left: int


class Event(_Part):
    """A module that was not treated as asked for, and why."""

    module: str
    event: str


class RunReport(_Part):
    """The content of alphaquant/report.json; what has a default is missing from the reports of some versions."""

    alphaquant: str
    created: datetime
    model: ModelFacts
    layout: str
    sizes: Sizes
    audit: Audit
    torch: str = "unknown"
    command: str = ""
    recipe: dict[str, Any] = {}
    calibration: CalibrationFacts | None = None
    device: str = "unknown"
    dtype: str = "unknown"
    summary: list[KindSummary] = []
    events: list[Event] = []
    warnings: list[str] = []
    notes: list[str] = []
    seconds: dict[str, float] = {}
    memory: dict[str, int] = {}
    """By phase what the process held at its end, at most."""
    peak_memory_bytes: int | None = None
    engines: dict[str, list[str]] | None = None
    """For every engine what it would not take of this directory; None where that was not looked at."""


class Measured(_Part):
    """What `alphaquant eval --json` prints; from `kl` on only with --against."""

    perplexity: float
    stderr: float
    tokens: int
    windows: int
    weights: str | None = None
    data: str | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    original_perplexity: float | None = None
    router_by_layer: list[float | None] = []

    @property
    def router(self) -> float | None:
        """Share of the tokens' experts that are the original's, too: the mean over the layers that route."""
        found = [share for share in self.router_by_layer if share is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True, slots=True)
class QualityRow:
    """A measurement and what it is called: by what was measured, else by its file."""

    label: str
    measured: Measured

    @property
    def change(self) -> float | None:
        """Relative change of the perplexity from the original's."""
        original = self.measured.original_perplexity
        return self.measured.perplexity / original - 1 if original else None


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a report shows of a run; layers in order, embedding and head apart."""

    directory: Path
    report: RunReport
    plan: dict[str, Any]
    layers: list[LayerRecord]
    outer: list[LayerRecord]


def read_run(directory: Path) -> Run:
    """Read what `quantize` wrote into `directory`.

    Raises:
        CheckpointError: the directory is none of ours, or a file of it is missing, malformed or of another version.
    """
    folder = directory / FOLDER
    path = folder / "report.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not a directory that alphaquant made",
            where=str(path),
            remedy="give the directory that `alphaquant quantize -o` made",
        )
    remedy = "quantize again: the file was changed or damaged"
    data = _read_json(path, remedy)
    version = data.get("version") if isinstance(data, dict) else None
    if version != _VERSION:
        raise CheckpointError(
            f"report.json is of version {version!r}, not {_VERSION}",
            where=str(path),
            remedy="use the version of alphaquant that made the directory",
        )
    report = _check(data, TypeAdapter(RunReport), path, remedy)
    plan = _check(_read_json(folder / "plan.json", remedy), TypeAdapter(dict[str, Any]), folder / "plan.json", remedy)
    adapter = TypeAdapter(LayerRecord)
    records = []
    for file in sorted((folder / "records").glob("*.json")):
        record = _check(_read_json(file, remedy), adapter, file, remedy)
        if record.routing is not None and len(record.routing.tokens) != len(record.routing.effective_samples):
            raise CheckpointError("routing lists differ in length", where=str(file), remedy=remedy)
        records.append(record)
    found = sum(len(record.modules) for record in records)
    if records and found != report.audit.quantized:
        raise CheckpointError(
            f"the records hold {found} modules, report.json says {report.audit.quantized}",
            where=str(folder / "records"),
            remedy="quantize again: files of this folder are missing or of another run",
        )
    layers = sorted((r for r in records if r.layer is not None), key=lambda r: r.layer or 0)
    return Run(directory, report, plan, layers, [r for r in records if r.layer is None])


def read_quality(paths: Sequence[Path]) -> list[QualityRow]:
    """Read measurements that `eval` made.

    Raises:
        CheckpointError: a file is missing or malformed.
    """
    remedy = "give a file that `alphaquant eval --json` wrote"
    rows = []
    for path in paths:
        # a broken model's perplexity is infinite, and says so
        measured = _check(_read_json(path, remedy, allow_nan=True), TypeAdapter(Measured), path, remedy)
        rows.append(QualityRow(measured.weights or path.stem.encode(errors="replace").decode(), measured))
    return rows


class TableRow(_Part):
    """A module of an error table: by candidate the bits it takes and the cost it has; None where one does not fit."""

    name: str
    kind: str
    num_weights: int = Field(gt=0)
    bits: list[int | None]
    cost: list[float | None]
    facts: dict[str, float] = {}


class Table(_Part):
    """What `plan --table` wrote."""

    method: str
    checkpoint: str
    candidates: list[str]
    rows: list[TableRow]


def read_table(path: Path, run: Run) -> Table:
    """Read an error table of the model that a run quantized.

    Raises:
        CheckpointError: it is missing, malformed, or of another checkpoint.
    """
    remedy = "give the file that `alphaquant plan --table` wrote for this model"
    table = _check(_read_json(path, remedy), TypeAdapter(Table), path, remedy)
    if table.checkpoint != run.report.model.digest:
        raise CheckpointError("the table is of another checkpoint than the run", where=str(path), remedy=remedy)
    if any(len(row.bits) != len(table.candidates) or len(row.cost) != len(row.bits) for row in table.rows):
        raise CheckpointError("rows and candidates differ in length", where=str(path), remedy=remedy)
    return table


def _read_json(path: Path, remedy: str, *, allow_nan: bool = False) -> Any:
    try:
        return from_json(path.read_bytes(), allow_inf_nan=allow_nan)
    except OSError as error:
        what = f"{path.name} cannot be read: {error.strerror}"
        raise CheckpointError(what, where=str(path), remedy=remedy) from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}", where=str(path), remedy=remedy) from error


def _check(data: Any, adapter: TypeAdapter[_T], path: Path, remedy: str) -> _T:
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        what = f"{path.name} is malformed: {place}: {first['msg']}"
        raise CheckpointError(what, where=str(path), remedy=remedy) from error
