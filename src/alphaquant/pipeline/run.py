"""A whole quantization: checkpoint and plan in, checkpoint directory and records out."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.calibration import TokenBatch, calibration_tokens, load_tokenizer, needs_tokenizer
from alphaquant.checkpoint import Checkpoint, unquantized
from alphaquant.errors import ConfigError
from alphaquant.models import detect, logical
from alphaquant.pipeline.balance import CANDIDATES, balanced, require_experts
from alphaquant.pipeline.closing import changed_sessions, describe, peak_memory_bytes, plain, session
from alphaquant.pipeline.convert import pick_layout, shard_names, shard_tensors
from alphaquant.pipeline.layer import LayerQuantizer, QuantizedLayer
from alphaquant.pipeline.records import KindSummary, LayerRecord, summarize
from alphaquant.pipeline.rundir import RunDir, check_output
from alphaquant.pipeline.stream import Clock, Progress, silent
from alphaquant.pipeline.walk import quantize_shards
from alphaquant.plan import ModuleKind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.layouts import Layout
    from alphaquant.models import ModelSpec, TensorSource
    from alphaquant.plan import Plan, ResolvedPlan
    from alphaquant.solver import Recipe

__all__ = [
    "Calibration",
    "Prepared",
    "QuantizeResult",
    "calibration_facts",
    "compute_dtype",
    "draw_tokens",
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

    `source` gives the checkpoint's tensors under the family's names, however they are stored.
    """

    checkpoint: Checkpoint
    source: TensorSource
    spec: ModelSpec
    plan: Plan
    resolved: ResolvedPlan

    @property
    def schemes(self) -> Mapping[str, Scheme | None]:
        """For every module its scheme; None is left as it is."""
        return self.resolved.schemes

    @property
    def notes(self) -> list[str]:
        """What a user should know of plan and checkpoint."""
        carried = [name for name in self.source.names() if self.spec.is_carried(name)]
        line = f"{len(carried)} tensors of layers for multi-token prediction go along unquantized"
        return [*self.resolved.notes, *([line] if carried else [])]


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a run reports; `report` is the content of `alphaquant/report.json`."""

    summary: list[KindSummary]
    records: list[LayerRecord]
    report: dict[str, Any] = field(default_factory=dict)


def prepare(model: Path, plan: Plan) -> Prepared:
    """Open a checkpoint and resolve a plan on it.

    Raises:
        CheckpointError, ConfigError, PlanError: what is wrong, before anything is computed.
    """
    checkpoint = Checkpoint.open(model)
    floats = unquantized(checkpoint)
    spec = detect(checkpoint.config, str(model / "config.json"))
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
class _Job:
    """Everything that a run is a function of, and what it computes with."""

    prepared: Prepared
    recipe: Recipe
    layout: Layout
    tokens: TokenBatch | None
    device: torch.device
    dtype: torch.dtype

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the result, as JSON; a stopped run goes on only with the same."""
        checkpoint, plan = self.prepared.checkpoint, self.prepared.plan
        table = {name: str(scheme) for name, scheme in self.prepared.schemes.items() if scheme is not None}
        ids = None if self.tokens is None else {"shape": list(self.tokens.ids.shape), "digest": self.tokens.digest}
        return {
            "checkpoint": {"headers": checkpoint.header_digest(), "weights": checkpoint.sample_digest()},
            "tokens": ids,
            "plan": plan.model_dump(mode="json", exclude={"comment", "schema_url"}, exclude_none=True),
            "formats": hashlib.sha256(json.dumps(table).encode()).hexdigest(),
            "layout": self.layout.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "recipe": plain(self.recipe),
            "alphaquant": ".".join(version("alphaquant-moe").split(".")[:2]),
        }


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
    progress: Progress = silent,
    command: str = "",
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
        progress: is told what happens.
        command: how the run was started, for the record.

    Raises:
        AlphaQuantError: nothing is left on disk, or all layers that were done, for the next call to go on from.
    """
    spec, device = prepared.spec, torch.device(device)
    work_dtype = compute_dtype(dtype, spec, device)
    check_output(out, prepared.checkpoint.path, overwrite=overwrite)
    chosen = planned_layout(prepared, layout)
    clock, begin = Clock(), time.perf_counter()
    with RunDir.create(out, spec.num_layers + 1, resumes=True, fresh=fresh) as run:
        with clock("tokenize"):
            tokens = None if calibration is None else draw_tokens(prepared, calibration)
        if calibration is not None and tokens is not None and calibration.balance:
            with clock("balance"):
                kept = calibration.num_samples
                tokens = balanced(prepared.source, spec, tokens, kept, work_dtype, device, progress)
        job = _Job(prepared, recipe, chosen, tokens, device, work_dtype)
        run.start(job.identity(), session(device, command))
        for phase, seconds in run.manifest.seconds.items():
            clock.seconds[phase] += seconds
        begin -= run.manifest.seconds.get("total", 0.0)
        records = _quantize(job, run, LayerQuantizer(spec, prepared.schemes, recipe, clock, progress), begin)
        clock.seconds["total"] = time.perf_counter() - begin
        report = {
            **describe(prepared, job.layout, run, records),
            "command": command,
            "recipe": plain(recipe),
            "calibration": None if calibration is None or tokens is None else calibration_facts(calibration, tokens),
            "device": str(device),
            "dtype": str(job.dtype).removeprefix("torch."),
            "warnings": [
                *prepared.resolved.warnings,
                *(tokens.warnings if tokens is not None else ()),
                *changed_sessions(run.manifest.sessions),
            ],
            "notes": prepared.notes,
            "seconds": {phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
            "memory": dict(clock.memory),
        }
        run.write_note("plan.json", json.loads(prepared.plan.to_json()))
        run.write_note("report.json", report)
        run.finish(prepared.checkpoint.config, prepared.checkpoint.path, spec, chosen, prepared.schemes)
    return QuantizeResult(summarize(records, list(ModuleKind)), records, report)


def _quantize(job: _Job, run: RunDir, quantizer: LayerQuantizer, begin: float) -> list[LayerRecord]:
    """Quantize and commit every shard that is not done yet; the records of all of them.

    `begin` is when the run would have begun had it not been stopped in between.
    """
    spec, source, clock = job.prepared.spec, job.prepared.source, quantizer.clock
    names = shard_names(spec, source)
    records = [LayerRecord.from_dict(run.read_note(_record_name(spec, index))) for index in range(len(run.shards))]
    if len(records) == len(names):
        return records

    def commit(result: QuantizedLayer, streams: Mapping[str, Tensor]) -> None:
        index = len(run.shards)
        with clock("pack"):
            tensors = shard_tensors(names[index], result.quantized, job.layout, source.read)
        with clock("write"):
            run.write_note(_record_name(spec, index), result.record.to_dict())
            run.add_shard(tensors)
            seconds = clock.seconds | {"total": time.perf_counter() - begin}
            run.commit(streams, seconds, peak_memory_bytes=peak_memory_bytes())
        records.append(result.record)

    ids_NL = None if job.tokens is None else job.tokens.ids
    walk = quantize_shards(
        quantizer,
        source,
        ids_NL,
        device=job.device,
        dtype=job.dtype,
        done=len(run.shards),
        streams=run.read_streams(),
    )
    for result, streams in walk:
        commit(result, streams)
        del result  # its codes would lie beside the next layer's
    return records


def _record_name(spec: ModelSpec, shard: int) -> str:
    return f"records/layer-{shard:05d}.json" if shard < spec.num_layers else "records/outer.json"


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
