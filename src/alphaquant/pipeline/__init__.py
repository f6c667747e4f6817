"""Runs: the streaming loop, quantizing, evaluating, exporting, and what they leave on disk."""

from alphaquant.pipeline.budget import parse_bytes
from alphaquant.pipeline.convert import check_single_file, export_checkpoint, save_single_file
from alphaquant.pipeline.device import torch_device
from alphaquant.pipeline.distributed import Team, join
from alphaquant.pipeline.evaluate import evaluate_checkpoint, load
from alphaquant.pipeline.log import json_log
from alphaquant.pipeline.manifest import Problem, check_shards
from alphaquant.pipeline.measure import measure_quality
from alphaquant.pipeline.memory import HeldModel, QuantizedModule, export_held, hold, quantize_held
from alphaquant.pipeline.quality import (
    COSTS,
    QUALITY,
    keep_costs,
    keep_quality,
    quality_facts,
    rounded_quality,
)
from alphaquant.pipeline.records import KindSummary, LayerRecord, ModuleRecord, RoutingRecord
from alphaquant.pipeline.routing import LayerRouting, RoutingReport, measure_routing
from alphaquant.pipeline.run import (
    Calibration,
    Forecast,
    Prepared,
    QuantizeResult,
    compute_dtype,
    foretell,
    peak_memory_bytes,
    planned_layout,
    prepare,
    quantize_checkpoint,
    resolve_plan,
)
from alphaquant.pipeline.rundir import FOLDER, check_output, check_run_output, check_writable
from alphaquant.pipeline.serving import Serving
from alphaquant.pipeline.size import KindSize, plan_sizes
from alphaquant.pipeline.status import RunStatus, run_status
from alphaquant.pipeline.stream import Progress, silent
from alphaquant.pipeline.tasks import Metric, evaluate_tasks
from alphaquant.pipeline.turning import ROTATIONS, turned

__all__ = [
    "COSTS",
    "FOLDER",
    "QUALITY",
    "ROTATIONS",
    "Calibration",
    "Forecast",
    "HeldModel",
    "KindSize",
    "KindSummary",
    "LayerRecord",
    "LayerRouting",
    "Metric",
    "ModuleRecord",
    "Prepared",
    "Problem",
    "Progress",
    "QuantizeResult",
    "QuantizedModule",
    "RoutingRecord",
    "RoutingReport",
    "RunStatus",
    "Serving",
    "Team",
    "check_output",
    "check_run_output",
    "check_shards",
    "check_single_file",
    "check_writable",
    "compute_dtype",
    "evaluate_checkpoint",
    "evaluate_tasks",
    "export_checkpoint",
    "export_held",
    "foretell",
    "hold",
    "join",
    "json_log",
    "keep_costs",
    "keep_quality",
    "load",
    "measure_quality",
    "measure_routing",
    "parse_bytes",
    "peak_memory_bytes",
    "plan_sizes",
    "planned_layout",
    "prepare",
    "quality_facts",
    "quantize_checkpoint",
    "quantize_held",
    "resolve_plan",
    "rounded_quality",
    "run_status",
    "save_single_file",
    "silent",
    "torch_device",
    "turned",
]
