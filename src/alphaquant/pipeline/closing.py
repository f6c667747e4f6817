"""What a run says of itself when it is done: the audit, the sizes and the report."""

from __future__ import annotations

import itertools
import resource
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.engines import engine_notes
from alphaquant.errors import AlphaQuantError
from alphaquant.pipeline.records import summarize
from alphaquant.plan import ModuleKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alphaquant.checkpoint import Checkpoint
    from alphaquant.layouts import Layout
    from alphaquant.pipeline.records import LayerRecord
    from alphaquant.pipeline.run import Prepared
    from alphaquant.pipeline.rundir import RunDir
    from alphaquant.solver import Backend, Recipe

__all__ = ["changed_sessions", "describe", "model_facts", "peak_memory_bytes", "plain", "session"]

# what of a session may change the last bits of a result
_MACHINE = ("alphaquant", "torch", "device", "cpu", "threads", "kernels")


def session(device: torch.device, kernels: Backend, command: str, processes: int) -> dict[str, Any]:
    """What is recorded of one start of a run."""
    return {
        "started": _now(),
        "alphaquant": version("alphaquant-moe"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": kernels.value,
        "processes": processes,
        "command": command,
    }


def changed_sessions(sessions: Sequence[dict[str, Any]]) -> list[str]:
    """A warning for every change of the machine between starts that made a part of the result."""
    ends = [after["from_shard"] for after in sessions[1:]]
    productive = [s for s, end in itertools.zip_longest(sessions, ends) if end is None or end > s["from_shard"]]
    warnings = []
    for before, after in itertools.pairwise(productive):
        changes = [f"{key} {before[key]} → {after[key]}" for key in _MACHINE if before.get(key) != after.get(key)]
        if changes:
            shard = after["from_shard"] + 1
            warnings.append(
                f"from shard {shard} on the run went on with {', '.join(changes)}: "
                "its bytes may differ from those of a run that was not stopped"
            )
    return warnings


def describe(prepared: Prepared, layout: Layout, run: RunDir, records: list[LayerRecord]) -> dict[str, Any]:
    """The part of `report.json` that follows from what was written.

    Raises:
        AlphaQuantError: what was written is not what the plan says.
    """
    checkpoint, spec = prepared.checkpoint, prepared.spec
    sessions = run.manifest.sessions
    return {
        "version": 1,
        "alphaquant": version("alphaquant-moe"),
        "torch": torch.__version__,
        "created": _now(),
        "model": model_facts(prepared),
        "layout": layout.name,
        "sizes": _sizes(checkpoint, run, records),
        "summary": [asdict(row) for row in summarize(records, list(ModuleKind))],
        "routers": _routers(records),
        "tuning": _tuning(records),
        "audit": _audit(prepared, records, layout, run.tensor_names),
        "engines": engine_notes(prepared.schemes, list(spec.modules()), layout.name, spec.family),
        "events": [event for record in records for event in record.all_events()],
        "sessions": sessions,
        "peak_memory_bytes": max(peak_memory_bytes(), *(s.get("peak_memory_bytes", 0) for s in sessions)),
    }


def model_facts(prepared: Prepared) -> dict[str, Any]:
    """Which model it is, as JSON."""
    return {
        "path": str(prepared.checkpoint.path),
        "family": prepared.spec.family,
        "architecture": prepared.spec.architecture,
        "digest": prepared.checkpoint.header_digest(),
    }


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


def _routers(records: list[LayerRecord]) -> dict[str, Any] | None:
    """What refitting did to the routers, the mean over layers of what is now in place; None where none was refitted."""
    found = [record.repair for record in records if record.repair is not None]
    if not found:
        return None
    after = [repair.agreement_after if repair.kept else repair.agreement_before for repair in found]
    return {
        "layers": len(found),
        "kept": sum(repair.kept for repair in found),
        "agreement_before": sum(repair.agreement_before for repair in found) / len(found),
        "agreement_after": sum(after) / len(found),
    }


def _tuning(records: list[LayerRecord]) -> dict[str, Any] | None:
    """What tuning did, the mean over layers behind their last half of what is in place; None where none was tuned."""
    found = [record.tuning for record in records if record.tuning]
    if not found:
        return None
    halves = [half for layer in found for half in layer]
    last = [layer[-1] for layer in found]
    return {
        "halves": len(halves),
        "kept": sum(half.kept for half in halves),
        "loss_before": sum(half.loss_before for half in last) / len(last),
        "loss_after": sum(half.loss_after if half.kept else half.loss_before for half in last) / len(last),
    }


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


def plain(settings: Recipe) -> dict[str, Any]:
    """Settings as JSON."""
    return {key: getattr(value, "value", value) for key, value in asdict(settings).items()}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def peak_memory_bytes() -> int:
    """Peak resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
