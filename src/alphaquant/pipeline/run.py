"""A whole quantization: checkpoint and plan in, checkpoint directory and records out."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.calibration import TokenBatch, calibration_tokens, load_tokenizer, needs_tokenizer
from alphaquant.checkpoint import Checkpoint, unquantized
from alphaquant.errors import ConfigError
from alphaquant.models import Rotation, RotationKind, detect, logical
from alphaquant.pipeline.balance import CANDIDATES, balanced, require_experts
from alphaquant.pipeline.budget import MemoryPlan, common_limits, plan_memory
from alphaquant.pipeline.closing import changed_sessions, describe, peak_memory_bytes, plain, session
from alphaquant.pipeline.convert import pick_layout
from alphaquant.pipeline.course import Course, Job, Watch, require_equal
from alphaquant.pipeline.distributed import SOLO, Team
from alphaquant.pipeline.duration import foretell_seconds
from alphaquant.pipeline.layer import LayerQuantizer
from alphaquant.pipeline.log import Log, unlogged
from alphaquant.pipeline.records import KindSummary, LayerRecord, summarize
from alphaquant.pipeline.repair import require_routers
from alphaquant.pipeline.rundir import RunDir, check_run_output
from alphaquant.pipeline.stream import Clock, Progress, silent
from alphaquant.plan import ModuleKind
from alphaquant.solver import backend_for

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from alphaquant.formats import Scheme
    from alphaquant.layouts import Layout
    from alphaquant.models import ModelSpec, TensorSource
    from alphaquant.plan import Plan, ResolvedPlan
    from alphaquant.solver import Recipe

__all__ = [
    "Calibration",
    "Forecast",
    "Prepared",
    "QuantizeResult",
    "calibration_facts",
    "compute_dtype",
    "draw_tokens",
    "foretell",
    "peak_memory_bytes",
    "planned_layout",
    "prepare",
    "quantize_checkpoint",
    "resolve_plan",
]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which tokens to calibrate on: `num_samples` windows of `seqlen` tokens of a source, drawn by `seed`.

    With `balance` more are drawn, and those are kept that raise the tokens of the least-used experts.
    """

    source: str = "wikitext2"
    num_samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    balance: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checkpoint that was opened and checked, with its plan resolved: all that can fail without computing.

    `source` gives the checkpoint's tensors under the family's names, however they are stored, and as `rotation` turns
    them; `rotation_note` says why it does.
    """

    checkpoint: Checkpoint
    source: TensorSource
    spec: ModelSpec
    plan: Plan
    resolved: ResolvedPlan
    rotation: Rotation = field(default_factory=Rotation)
    rotation_note: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """What the result's config.json says of the model."""
        return self.checkpoint.config | ({"tie_word_embeddings": False} if self._unties else {})

    @property
    def total_bytes(self) -> int:
        """Bytes of the model unquantized: the checkpoint's, and a head that is the embedding no more."""
        return self.checkpoint.total_bytes + (self.source.info("lm_head.weight").num_bytes if self._unties else 0)

    @property
    def _unties(self) -> bool:
        return bool(self.checkpoint.config.get("tie_word_embeddings")) and not self.spec.tie_embeddings

    @property
    def schemes(self) -> Mapping[str, Scheme | None]:
        """For every module its scheme; None is left as it is."""
        return self.resolved.schemes

    @property
    def notes(self) -> list[str]:
        """What a user should know of plan and checkpoint."""
        carried = [name for name in self.source.names() if self.spec.is_carried(name)]
        notes = list(self.resolved.notes)
        if carried:
            notes.append(f"{len(carried)} tensors of layers for multi-token prediction go along unquantized")
        if self.rotation.kind is not RotationKind.NONE:
            head = ", and the head is stored beside the embedding" if self._unties else ""
            notes.append(f"rotated: {self.rotation.kind.value}, seed {self.rotation.seed}{head}")
        return [*notes, *([self.rotation_note] if self.rotation_note else [])]


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a run reports; `report` is the content of `alphaquant/report.json`, and `is_new` False if it was there."""

    summary: list[KindSummary]
    records: list[LayerRecord]
    report: dict[str, Any] = field(default_factory=dict)
    is_new: bool = True


def prepare(model: Path | Checkpoint, plan: Plan) -> Prepared:
    """Open a checkpoint, where it is not open yet, and resolve a plan on it.

    Raises:
        CheckpointError, ConfigError, PlanError: what is wrong, before anything is computed.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    floats = unquantized(checkpoint)
    spec = detect(checkpoint.config, str(checkpoint.path / "config.json"))
    source = logical(floats, spec)
    return Prepared(checkpoint, source, spec, plan, resolve_plan(plan, spec))


def resolve_plan(plan: Plan, spec: ModelSpec) -> ResolvedPlan:
    """The plan's table for this model, scales being stored in the model's own 16 bits.

    Raises:
        PlanError: it does not fit the model.
    """
    scale_dtype = torch.float16 if spec.dtype is torch.float16 else torch.bfloat16
    return plan.resolve(list(spec.modules()), scale_dtype=scale_dtype)


def planned_layout(prepared: Prepared, name: str | None) -> Layout:
    """The layout of that name, checked against the plan; the most widely served one for None.

    Raises:
        OutputError, PlanError: it cannot hold a scheme of the plan.
    """
    shapes = {m.name: (m.out_features, m.in_features) for m in prepared.spec.modules()}
    return pick_layout(name, prepared.spec, prepared.schemes, shapes)


def compute_dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The type that weights and activations have while they are worked on; `auto` is that of the checkpoint.

    On a CPU float16 becomes float32: its products there are slow, and overflow.

    Raises:
        ConfigError: there is no type of that name.
    """
    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name in known:
        return known[name]
    if name != "auto":
        raise ConfigError(f"dtype is {name!r}", remedy=f"give auto, {', '.join(known)}")
    return torch.float32 if spec.dtype is torch.float16 and device.type == "cpu" else spec.dtype


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will take, foretold: memory at its peak, and seconds by phase."""

    memory: MemoryPlan
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"memory": self.memory.to_dict(), "seconds": self.seconds}


def foretell(
    prepared: Prepared,
    recipe: Recipe,
    calibration: Calibration | None,
    device: torch.device,
    dtype: str = "auto",
    max_memory: int | None = None,
) -> Forecast:
    """Peak memory and time of a run, from its shapes; the machine is timed for a moment.

    Raises:
        ConfigError: no plan is within `max_memory`.
    """
    spec, schemes = prepared.spec, prepared.schemes
    require_routers(recipe, spec, calibrated=calibration is not None)
    tokens = None
    if calibration is not None:
        tokens = (calibration.num_samples, min(calibration.seqlen, spec.max_positions))
    work_dtype = compute_dtype(dtype, spec, device)
    memory = plan_memory(
        spec,
        schemes,
        tokens,
        work_dtype,
        device,
        max_memory,
        recipe=recipe,
    )
    passes = memory.passes / max(1, memory.least_passes)
    return Forecast(memory, foretell_seconds(spec, schemes, tokens, work_dtype, device, recipe, passes))


def quantize_checkpoint(
    prepared: Prepared,
    out: Path,
    *,
    recipe: Recipe,
    calibration: Calibration | None,
    layout: str | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    strict: bool = False,
    max_memory: int | None = None,
    progress: Progress = silent,
    log: Log = unlogged,
    command: str = "",
    team: Team = SOLO,
) -> QuantizeResult:
    """Quantize a checkpoint into a directory, layer by layer; a run that was stopped goes on where it was.

    Args:
        prepared: from `prepare`.
        out: directory to make; it appears only when it is complete.
        recipe: settings of the method.
        calibration: tokens to calibrate on; None rounds to nearest without any.
        layout: name of how modules are stored; None: the most widely served one that can express the plan.
        device: where to compute.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        overwrite: replace `out` if it holds something.
        fresh: drop what a stopped run has left, and start anew.
        strict: make an error of every fallback and of everything left out.
        max_memory: bytes that may be taken, of the device where that is a GPU; None: most of what is free.
        progress: is told what happens.
        log: is told what happened.
        command: how the run was started, for the record.
        team: the processes that share the work, of which the first writes. The others return no report.

    Raises:
        AlphaQuantError: nothing is left on disk, or all layers that were done, for the next call to go on from.
    """
    spec, device = prepared.spec, torch.device(device)
    require_routers(recipe, spec, calibrated=calibration is not None)
    work_dtype = compute_dtype(dtype, spec, device)
    chosen = planned_layout(prepared, layout)
    untold = Job(prepared, recipe, chosen, None, device, work_dtype)
    check_run_output(
        out, prepared.checkpoint.path, overwrite=overwrite, fresh=fresh, identity=untold.identity_without_tokens
    )
    watch = Watch(log, progress, team)
    clock, begin = Clock(watch.spent), time.perf_counter()
    # the first process of a team keeps the directory; the others only compute
    keeper = RunDir.create(out, spec.num_layers + 1, resumes=True, fresh=fresh) if team.rank == 0 else nullcontext()
    with keeper as run:
        team.tell(None)  # the directory may be refused: the others do not begin before
        with clock("tokenize"):
            tokens = None if calibration is None else draw_tokens(prepared, calibration)
        if calibration is not None and tokens is not None and calibration.balance:
            with clock("balance"):
                kept = calibration.num_samples
                tokens = balanced(prepared.source, spec, tokens, kept, work_dtype, device, watch)
        job = Job(prepared, recipe, chosen, tokens, device, work_dtype)
        identity = job.identity()
        require_equal(team, identity)
        if run is not None and (fresh or not run.find_ended(out, identity, overwrite=overwrite)):
            run.start(identity, session(device, backend_for(device.type, recipe.backend), command, team.size))
            for phase, seconds in run.manifest.seconds.items():
                clock.seconds[phase] += seconds
            begin -= run.manifest.seconds.get("total", 0.0)
        log("start", processes=team.size, shards=spec.num_layers + 1, command=command)
        shape = None if tokens is None else (tokens.ids.shape[0], tokens.ids.shape[1])
        memory = plan_memory(
            spec,
            prepared.schemes,
            shape,
            work_dtype,
            device,
            max_memory,
            team.size,
            recipe=recipe,
        )
        limits = common_limits(team, memory.limits)
        quantizer = LayerQuantizer(spec, prepared.schemes, recipe, clock, watch, limits, team)
        records = Course(job, run, quantizer, begin, watch.log, strict).end()
        summary = summarize(records, list(ModuleKind))
        if run is None:
            return QuantizeResult(summary, records)
        if run.has_ended:
            result = QuantizeResult(summary, records, run.read_note("report.json"), is_new=False)
            _log_end(log, result.report)
            return result
        clock.seconds["total"] = time.perf_counter() - begin
        report = {
            **describe(prepared, job.layout, run, records),
            "command": command,
            "recipe": plain(recipe),
            "rotation": prepared.rotation.to_dict(),
            "calibration": None if calibration is None or tokens is None else calibration_facts(calibration, tokens),
            "device": str(device),
            "dtype": str(job.dtype).removeprefix("torch."),
            "warnings": [
                *prepared.resolved.warnings,
                *(tokens.warnings if tokens is not None else ()),
                *changed_sessions(run.manifest.sessions),
            ],
            "notes": [*prepared.notes, *memory.notes()],
            "memory_plan": memory.to_dict(),
            "seconds": {phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
            "memory": dict(clock.memory),
        }
        run.write_note("plan.json", json.loads(prepared.plan.to_json()))
        run.write_note("report.json", report)
        run.finish(prepared.config, prepared.checkpoint.path, spec, chosen, prepared.schemes)
    _log_end(log, report)
    return QuantizeResult(summary, records, report)


def _log_end(log: Log, report: dict[str, Any]) -> None:
    log("end", seconds=report["seconds"]["total"], bytes=report["sizes"]["after_bytes"], events=len(report["events"]))


def draw_tokens(prepared: Prepared, calibration: Calibration) -> TokenBatch:
    """The windows to calibrate on, cut to what the model takes; to be balanced, those to choose from.

    Raises:
        CalibrationError: the text cannot be had, or is shorter than one window.
    """
    if calibration.balance:
        require_experts(prepared.spec)
    source = calibration.source
    tokenizer = load_tokenizer(prepared.checkpoint.path) if needs_tokenizer(source) else None
    seqlen = min(calibration.seqlen, prepared.spec.max_positions)
    tokens = calibration_tokens(
        source,
        tokenizer,
        num_samples=calibration.num_samples * (CANDIDATES if calibration.balance else 1),
        seqlen=seqlen,
        seed=calibration.seed,
        vocab_size=prepared.spec.vocab_size,
    )
    if calibration.balance and len(tokens.ids) >= calibration.num_samples:
        tokens = replace(tokens, warnings=())  # there was less to choose from, but enough to keep
    if seqlen == calibration.seqlen:
        return tokens
    warning = f"windows have {seqlen} tokens, the most that the model takes, where {calibration.seqlen} were asked for"
    return replace(tokens, warnings=(*tokens.warnings, warning))


def calibration_facts(calibration: Calibration, tokens: TokenBatch) -> dict[str, Any]:
    """What was calibrated on, as JSON."""
    num_samples, seqlen = tokens.ids.shape
    return {
        "source": tokens.source,
        "num_samples": num_samples,
        "seqlen": seqlen,
        "seed": calibration.seed,
        "digest": tokens.digest,
        **({} if tokens.coverage is None else {"coverage": tokens.coverage}),
    }
