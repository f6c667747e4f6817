"""Options that several verbs share, and what they become."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from alphaquant.errors import ConfigError, OutputError, PlanError
from alphaquant.pipeline import check_writable
from alphaquant.plan import Plan

__all__ = [
    "ConfigOpt",
    "DType",
    "DTypeOpt",
    "DeviceOpt",
    "Format",
    "JsonOpt",
    "ModelArg",
    "OverwriteOpt",
    "QuietOpt",
    "SchemeOpt",
    "check_single_file",
    "plan_from",
    "print_json",
    "torch_device",
]


class DType(str, Enum):
    """Type of weights and activations while they are worked on."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Format(str, Enum):
    """Layout of the output directory."""

    AUTO = "auto"
    COMPRESSED_TENSORS = "compressed-tensors"
    HUMMING = "humming"
    DENSE = "dense"


ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint directory, or a hub id such as allenai/OLMoE-1B-7B-0924.")
]
ConfigOpt = Annotated[Path | None, typer.Option("--config", help="Plan: a JSON file.")]
SchemeOpt = Annotated[str | None, typer.Option("--scheme", help="Plan in short: int4:g128, int3:g64:asym, mxfp4 …")]
DeviceOpt = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DTypeOpt = Annotated[DType, typer.Option(help="Type of weights and activations while they are worked on.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it holds something.")]


def plan_from(config: Path | None, scheme: str | None, default: str | None = None) -> Plan:
    """The plan of a file or of a shorthand; `default` where neither is given."""
    if config is not None and scheme is not None:
        raise PlanError("--config and --scheme were both given", remedy="give one of them")
    if config is not None:
        return Plan.load(config)
    if scheme is None and default is None:
        raise PlanError("there is no plan", remedy="give --config FILE, or --scheme such as int4:g128")
    return Plan.from_shorthand(scheme or default or "")


def torch_device(name: str) -> torch.device:
    """The device of that name; for `auto` a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is not a device", remedy="give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name!r} is not supported", remedy="give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"--device {name!r} is not there: {found} CUDA devices found", remedy="give --device cpu")
    return device


def check_single_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that is there already, or that cannot be made, before any work is done."""
    check_writable(path)
    if path.is_dir() or (path.exists() and not overwrite):
        remedy = "choose another file" if path.is_dir() else "choose another file, or pass --overwrite"
        raise OutputError(f"{path} already exists", remedy=remedy)


def print_json(content: Any) -> None:
    """Write JSON to standard output."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
