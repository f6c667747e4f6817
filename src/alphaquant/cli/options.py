"""Options that several verbs share, and what they become."""

from __future__ import annotations

import json
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from alphaquant.engines import profile_of
from alphaquant.errors import ConfigError, PlanError
from alphaquant.pipeline import Serving, check_single_file
from alphaquant.plan import Plan

__all__ = [
    "CalibOpt",
    "ConfigOpt",
    "DType",
    "DTypeOpt",
    "DeviceOpt",
    "Engine",
    "EngineOpt",
    "Format",
    "GpuOpt",
    "JsonOpt",
    "LegalizeOpt",
    "ModelArg",
    "OverwriteOpt",
    "QuietOpt",
    "Rotate",
    "RotateOpt",
    "SamplesOpt",
    "SchemeOpt",
    "SeqlenOpt",
    "TpOpt",
    "check_single_file",
    "plan_from",
    "print_json",
    "serving_from",
]


class DType(str, Enum):
    """Type of weights and activations while they are worked on."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Engine(str, Enum):
    """The engine that is to serve the result; any: all of them."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    ANY = "any"


class Format(str, Enum):
    """Layout of the output directory."""

    AUTO = "auto"
    COMPRESSED_TENSORS = "compressed-tensors"
    HUMMING = "humming"
    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    DENSE = "dense"


class Rotate(str, Enum):
    """How the model is rotated before it is quantized."""

    NONE = "none"
    HADAMARD = "hadamard"
    BLOCK = "block"
    AUTO = "auto"


ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint directory, or a hub id such as allenai/OLMoE-1B-7B-0924.")
]
ConfigOpt = Annotated[Path | None, typer.Option("--config", help="Plan: a JSON file.")]
SchemeOpt = Annotated[str | None, typer.Option("--scheme", help="Plan in short: int4:g128, int3:g64:asym, mxfp4 …")]
DeviceOpt = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DTypeOpt = Annotated[DType, typer.Option(help="Type of weights and activations while they are worked on.")]
EngineOpt = Annotated[
    Engine | None, typer.Option("--engine", help="Hold the plan against what this engine takes; any: all engines.")
]
TpOpt = Annotated[int, typer.Option("--tp", min=1, help="GPUs of tensor parallelism in the engine.")]
GpuOpt = Annotated[
    str | None, typer.Option("--gpu", help="The engine's GPU by compute capability: 8.0, 8.9, 9.0, 10.0 …")
]
LegalizeOpt = Annotated[
    bool, typer.Option("--legalize", help="With --engine: raise what must share a format to the best of theirs.")
]
CalibOpt = Annotated[
    str | None,
    typer.Option(help="wikitext2, c4, bundled, a text, JSONL or token file, or A:0.4,B:0.6.", show_default="wikitext2"),
]
SamplesOpt = Annotated[int, typer.Option("--nsamples", min=1, help="Calibration windows.")]
SeqlenOpt = Annotated[int, typer.Option("--seqlen", min=1, help="Tokens in a window.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
RotateOpt = Annotated[
    Rotate, typer.Option("--rotate", help="Rotate the model first, exactly; block: for MX; auto: by a measured loss.")
]
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


def serving_from(engine: Engine | None, tp: int, gpu: str | None, *, legalize: bool = False) -> Serving | None:
    """Where the result is to be served; None where no engine is named."""
    if engine is None:
        for option, given in (("--tp", tp > 1), ("--gpu", gpu is not None), ("--legalize", legalize)):
            if given:
                raise ConfigError(f"{option} was given without an engine", remedy="add --engine vllm")
        return None
    found = None if gpu is None else re.fullmatch(r"(\d{1,2})\.(\d)", gpu)
    if gpu is not None and found is None:
        raise ConfigError(f"--gpu {gpu!r} is no compute capability", remedy="give one such as 8.0, 8.9 or 9.0")
    return Serving(profile_of(engine.value), tp, None if found is None else 10 * int(found[1]) + int(found[2]))


def print_json(content: Any) -> None:
    """Write JSON to standard output."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
