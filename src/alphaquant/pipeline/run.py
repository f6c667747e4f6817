"""A whole quantization: checkpoint and plan in, checkpoint directory and records out."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.calibration import TokenBatch, calibration_tokens, is_tokenised, load_tokenizer
from alphaquant.checkpoint import Checkpoint
from alphaquant.engines import engine_notes
from alphaquant.errors import AlphaQuantError, CheckpointError, NumericsError
from alphaquant.models import detect, logical, read_layer, read_outer
from alphaquant.pipeline.convert import pick_layout, shard_names, shard_tensors
from alphaquant.pipeline.layer import LayerQuantizer, QuantizedLayer
from alphaquant.pipeline.records import KindSummary, LayerRecord, summarize
from alphaquant.pipeline.rundir import RunDir, check_output
from alphaquant.pipeline.stream import Clock, Progress, embed, silent
from alphaquant.plan import ModuleKind

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
    "Prepared",
    "QuantizeResult",
    "compute_dtype",
    "peak_memory_bytes",
    "planned_layout",
    "prepare",
    "quantize_checkpoint",
    "resolve_plan",
]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Which tokens to calibrate on: `num_samples` windows of `seqlen` tokens of a source, drawn by `seed`."""

    source: str = "wikitext2"
    num_samples: int = 128
    seqlen: int = 2048
    seed: int = 0


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
    if checkpoint.config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{model} is quantized already", where="config.json, quantization_config", remedy="give the original model"
        )
    spec = detect(checkpoint.config, str(model / "config.json"))
    source = logical(checkpoint, spec)
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
    """
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    return torch.float32 if spec.dtype is torch.float16 and device.type == "cpu" else spec.dtype


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
    progress: Progress = silent,
    command: str = "",
) -> QuantizeResult:
    """Quantize a checkpoint into a directory, layer by layer.

    Args:
        prepared: from `prepare`.
        out: directory to make; it appears only when it is complete.
        recipe: settings of the method.
        calibration: tokens to calibrate on; None rounds to nearest without any.
        layout: name of how modules are stored; None: the most widely served one that can express the plan.
        device: where to compute.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        overwrite: replace `out` if it holds something.
        progress: is told what happens.
        command: how the run was started, for the record.

    Raises:
        AlphaQuantError: and nothing is left on disk.
    """
    checkpoint, spec, schemes = prepared.checkpoint, prepared.spec, prepared.schemes
    device = torch.device(device)
    check_output(out, checkpoint.path, overwrite=overwrite)
    chosen = planned_layout(prepared, layout)
    clock, begin = Clock(), time.perf_counter()
    tokens: TokenBatch | None = None
    if calibration is not None:
        with clock("tokenize"):
            tokens = _tokens(prepared, calibration)
    work_dtype = compute_dtype(dtype, spec, device)
    quantizer = LayerQuantizer(spec, schemes, recipe, clock, progress)
    *layer_names, outer_names = shard_names(spec)

    def write(run: RunDir, names: list[str], result: QuantizedLayer) -> None:
        _require_finite(result.record)
        with clock("pack"):
            tensors = shard_tensors(names, result.quantized, chosen, prepared.source.read)
        with clock("write"):
            run.add_shard(tensors)

    with RunDir.create(out, spec.num_layers + 1) as run:
        with clock("read"):
            outer = read_outer(prepared.source, spec, work_dtype, device)
        embedding = quantizer.embedding(outer)
        x_NLD = None if tokens is None else embed(tokens.ids, outer["model.embed_tokens.weight"])
        records: list[LayerRecord] = []
        for layer in range(spec.num_layers):
            progress("read", layer, spec.num_layers)
            with clock("read"):
                weights = read_layer(prepared.source, spec, layer, work_dtype, device)
            result = quantizer.layer(layer, weights, x_NLD)
            del weights
            write(run, layer_names[layer], result)
            run.write_note(f"records/layer-{layer:05d}.json", result.record.to_dict())
            records.append(result.record)
            del result  # its codes would lie beside the next layer's
        head = quantizer.head(outer, x_NLD)
        ends = QuantizedLayer(
            embedding.quantized | head.quantized,
            LayerRecord(None, embedding.record.modules + head.record.modules),
        )
        write(run, outer_names, ends)
        run.write_note("records/outer.json", ends.record.to_dict())
        records.append(ends.record)

        audit = _audit(prepared, records, chosen, run.tensor_names)
        run.write_note("plan.json", json.loads(prepared.plan.to_json()))
        summary = summarize(records, list(ModuleKind))
        clock.seconds["total"] = time.perf_counter() - begin
        report = {
            "version": 1,
            "alphaquant": version("alphaquant-moe"),
            "torch": torch.__version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "model": {
                "path": str(checkpoint.path),
                "family": spec.family,
                "architecture": spec.architecture,
                "digest": checkpoint.header_digest(),
            },
            "layout": chosen.name,
            "recipe": _plain(asdict(recipe)),
            "calibration": None if calibration is None or tokens is None else _describe(calibration, tokens),
            "device": str(device),
            "dtype": str(work_dtype).removeprefix("torch."),
            "sizes": _sizes(checkpoint, run, records),
            "summary": [asdict(row) for row in summary],
            "audit": audit,
            "engines": engine_notes(schemes, list(spec.modules()), chosen.name),
            "events": [{"module": m.name, "event": m.event} for r in records for m in r.modules if m.event is not None],
            "warnings": [*prepared.resolved.warnings, *(tokens.warnings if tokens is not None else ())],
            "notes": list(prepared.resolved.notes),
            "seconds": {phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
            "peak_memory_bytes": peak_memory_bytes(),
        }
        run.write_note("report.json", report)
        run.finish(checkpoint.config, checkpoint.path, spec, chosen, schemes)
    return QuantizeResult(summary, records, report)


def _tokens(prepared: Prepared, calibration: Calibration) -> TokenBatch:
    source = calibration.source
    tokenizer = None if is_tokenised(source) else load_tokenizer(prepared.checkpoint.path)
    seqlen = min(calibration.seqlen, prepared.spec.max_positions)
    tokens = calibration_tokens(
        source,
        tokenizer,
        num_samples=calibration.num_samples,
        seqlen=seqlen,
        seed=calibration.seed,
        vocab_size=prepared.spec.vocab_size,
    )
    if seqlen == calibration.seqlen:
        return tokens
    warning = f"windows have {seqlen} tokens, the most that the model takes, where {calibration.seqlen} were asked for"
    return replace(tokens, warnings=(*tokens.warnings, warning))


def _require_finite(record: LayerRecord) -> None:
    """Weights so large that their squares overflow have no loss that could be told.

    Raises:
        NumericsError: names the first module.
    """
    for module in record.modules:
        if not math.isfinite(module.loss) or not math.isfinite(module.relative_loss):
            raise NumericsError(
                f"the loss is {module.loss}", where=module.name, remedy="look at these weights: they are too large"
            )


def _audit(prepared: Prepared, records: list[LayerRecord], layout: Layout, stored: set[str]) -> dict[str, Any]:
    """Every module that the plan targets was quantized and written so, and nothing else.

    Raises:
        AlphaQuantError: names the difference.
    """
    targeted = {name: scheme for name, scheme in prepared.schemes.items() if scheme is not None}
    names = [m.name for record in records for m in record.modules]
    quantized = {
        name for name in names if name not in targeted or stored.issuperset(layout.tensor_names(name, targeted[name]))
    }
    difference = sorted(targeted.keys() ^ quantized)
    if difference:
        raise AlphaQuantError(
            f"{len(difference)} modules differ between plan and result: {', '.join(difference[:5])}",
            remedy="this is a fault of alphaquant: please report it with the plan and config.json",
        )
    return {"targeted": len(targeted), "quantized": len(quantized), "left": len(prepared.schemes) - len(targeted)}


def _sizes(checkpoint: Checkpoint, run: RunDir, records: list[LayerRecord]) -> dict[str, Any]:
    modules = [m for record in records for m in record.modules]
    weights = sum(m.num_weights for m in modules)
    bits = sum(m.bits_per_weight * m.num_weights for m in modules)
    return {
        "before_bytes": checkpoint.total_bytes,
        "after_bytes": run.num_bytes,
        "quantized_weights": weights,
        "bits_per_weight": bits / weights if weights else None,
    }


def _describe(calibration: Calibration, tokens: TokenBatch) -> dict[str, Any]:
    num_samples, seqlen = tokens.ids.shape
    return {
        "source": tokens.source,
        "num_samples": num_samples,
        "seqlen": seqlen,
        "seed": calibration.seed,
        "digest": tokens.digest,
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: getattr(value, "value", value) for key, value in settings.items()}


def peak_memory_bytes() -> int:
    """Peak resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
