"""The command: parse, call, show. Nothing imports this file."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from alphaquant import __version__
from alphaquant.checkpoint import resolve_model
from alphaquant.demo import run_demo
from alphaquant.errors import AlphaQuantError, ConfigError, OutputError, PlanError
from alphaquant.models import MoESpec
from alphaquant.numerics import keep_freed_memory
from alphaquant.pipeline import (
    Calibration,
    Prepared,
    check_output,
    check_writable,
    evaluate_checkpoint,
    export_checkpoint,
    plan_sizes,
    planned_layout,
    prepare,
    quantize_checkpoint,
    save_single_file,
)
from alphaquant.plan import Plan
from alphaquant.report import human_bytes, write_report
from alphaquant.solver import Effort, Method, Recipe
from alphaquant.terminal import (
    err,
    out,
    print_comparison,
    print_error,
    print_notes,
    print_quality,
    print_result,
    print_sizes,
    progress_bar,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="alphaquant",
    help="Quantize Mixture-of-Experts and dense language models with GPTQ in mixed precision.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


def _version(value: bool) -> None:  # noqa: FBT001  (typer's callback signature)
    if value:
        out.print(f"alphaquant {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,  # noqa: FBT002
) -> None:
    pass


@app.command()
def inspect(
    model: ModelArg,
    *,
    config: ConfigOpt = None,
    scheme: SchemeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Show a model's architecture, modules and sizes, and what a plan would make of them."""
    prepared = prepare(resolve_model(model), _plan(config, scheme, default="bf16"))
    sizes = plan_sizes(prepared)
    spec = prepared.spec
    moe = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoESpec)]
    if as_json:
        facts = {
            "family": spec.family,
            "architecture": spec.architecture,
            "layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "moe_layers": len(moe),
            "experts": moe[0].num_experts if moe else 0,
            "top_k": moe[0].top_k if moe else 0,
            "parameters": sum(s.weights for s in sizes),
            "kinds": [asdict(s) for s in sizes],
        }
        _print_json(facts)
        return
    out.print(
        f"{spec.family} ({spec.architecture}): {spec.num_layers} layers, hidden size {spec.hidden_size}, "
        f"vocabulary {spec.vocab_size:,}, {sum(s.weights for s in sizes):,} parameters"
    )
    if moe:
        out.print(f"{len(moe)} MoE layers of {moe[0].num_experts} experts, top-{moe[0].top_k}")
    print_sizes(sizes)
    print_notes(prepared.resolved.warnings, prepared.resolved.notes)


@app.command()
def plan(
    model: ModelArg,
    *,
    config: ConfigOpt = None,
    scheme: SchemeOpt = None,
    explain: Annotated[str | None, typer.Option(help="Show which rules bear on this module.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Resolve a plan on a model: which module gets which format, and why."""
    prepared = prepare(resolve_model(model), _plan(config, scheme))
    if explain is not None:
        explanation = prepared.resolved.explain(explain)
        if as_json:
            steps = [{"rule": s.rule, "pattern": s.pattern, "sets": dict(s.keys)} for s in explanation.steps]
            found = None if explanation.scheme is None else str(explanation.scheme)
            _print_json({"module": explanation.module.name, "scheme": found, "steps": steps})
        else:
            out.print(str(explanation), soft_wrap=True)
        return
    if as_json:
        _print_json({name: None if s is None else str(s) for name, s in prepared.schemes.items()})
        return
    print_sizes(plan_sizes(prepared))
    print_notes(prepared.resolved.warnings, prepared.resolved.notes)


@app.command()
def quantize(
    model: ModelArg,
    *,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Checkpoint directory to make.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also, or instead, write one .pt file of tensors.")] = None,
    config: ConfigOpt = None,
    scheme: SchemeOpt = None,
    method: Annotated[Method, typer.Option(help="GPTQ, or round to nearest.")] = Method.GPTQ,
    effort: Annotated[Effort, typer.Option(help="Spent on scales and refinement.")] = Effort.DEFAULT,
    calib: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, bundled, or a text, JSONL or token file.", show_default="wikitext2"),
    ] = None,
    nsamples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Draws the windows.")] = 0,
    routing_weight: Annotated[float, typer.Option(min=0, help="Routed rows weigh their score to this power.")] = 1.0,
    layout: Annotated[Format, typer.Option("--format", help="Layout; auto: the most widely served.")] = Format.AUTO,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = DType.AUTO,
    overwrite: OverwriteOpt = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show sizes; compute nothing.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every event.")] = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Quantize a checkpoint into a directory that engines load.

    Plan by --config FILE or --scheme S. GPTQ calibrates on --calib; --method rtn does without it unless it is given.
    """
    if output is None and save is None:
        raise OutputError("there is nothing to write to", remedy="give -o DIR, or --save FILE.pt, or both")
    prepared = prepare(resolve_model(model), _plan(config, scheme))
    print_notes(prepared.resolved.warnings, prepared.resolved.notes)
    target = _output_directory(output, save, prepared, overwrite=overwrite)
    layout_name = None if layout is Format.AUTO else layout.value
    torch_device = _device(device)
    if dry_run:
        planned_layout(prepared, layout_name)
        sizes = plan_sizes(prepared)
        _print_json([asdict(s) for s in sizes]) if as_json else print_sizes(sizes)
        return
    if method is Method.RTN and calib is None:
        calibration = None
    else:
        calibration = Calibration("wikitext2" if calib is None else calib, nsamples, seqlen, seed)
    with progress_bar("quantizing", quiet=quiet or as_json) as progress:
        result = quantize_checkpoint(
            prepared,
            target,
            recipe=Recipe(method=method, effort=effort, routing_power=routing_weight),
            calibration=calibration,
            layout=layout_name,
            device=torch_device,
            dtype=dtype.value,
            overwrite=overwrite,
            progress=progress,
            command=shlex.join(["alphaquant", *sys.argv[1:]]),
        )
    if save is not None:
        save_single_file(target, save, remove_source=output is None)
    report = result.report
    if as_json:
        _print_json(report)
        return
    known = len(prepared.resolved.warnings)
    print_notes(report["warnings"][known:])
    print_result(report)
    if verbose:
        for event in report["events"]:
            out.print(f"  {event['module']}: {event['event']}", soft_wrap=True)
    out.print(f"written to {', '.join(str(path) for path in (output, save) if path is not None)}", soft_wrap=True)


@app.command(name="eval")
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint directory, original or quantized.")],
    *,
    data: Annotated[str, typer.Option(help="wikitext2, c4, bundled, or a text, JSONL or token file.")] = "wikitext2",
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="At most so many windows; all by default.")] = None,
    against: Annotated[Path | None, typer.Option(help="Original to compare with, token for token.")] = None,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = DType.AUTO,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure perplexity ± standard error; with --against also KL and top-1 agreement."""
    with progress_bar("evaluating", quiet=quiet or as_json) as progress:
        quality = evaluate_checkpoint(
            resolve_model(directory),
            data=data,
            seqlen=seqlen,
            max_windows=windows,
            against=None if against is None else resolve_model(against),
            device=_device(device),
            dtype=dtype.value,
            progress=progress,
        )
    if as_json:
        facts = asdict(quality)
        agreement = facts.pop("agreement")
        _print_json(facts | (agreement or {}))
    else:
        print_quality(str(directory), quality)


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="Directory that `quantize` made.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory, or .pt file, to make.")],
    layout: Annotated[
        Format | None, typer.Option("--format", help="Layout to convert to.", show_default="dense")
    ] = None,
    overwrite: OverwriteOpt = False,
) -> None:
    """Convert a quantized directory to another layout, losslessly from its codes, or gather it in one .pt file."""
    if output.suffix == ".pt":
        if layout is not None:
            raise OutputError(
                f"--format {layout.value} with {output}: a .pt file keeps the layout of its directory",
                remedy="convert into a directory first, and export that one",
            )
        _check_single_file(output, overwrite=overwrite)
        save_single_file(directory, output)
        size = output.stat().st_size
    else:
        name = Format.DENSE.value if layout is None else layout.value
        size = export_checkpoint(directory, output, None if layout is Format.AUTO else name, overwrite=overwrite)
    out.print(f"written to {output} ({human_bytes(size)})", soft_wrap=True)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="Directory that `quantize` made.")],
    *,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where to write; OUT/alphaquant.")] = None,
    quality: Annotated[list[Path] | None, typer.Option(help="JSON of `eval --json` to show; may be repeated.")] = None,
) -> None:
    """Write report.html and report.md of a quantized directory."""
    for path in write_report(directory, output, quality or []):
        out.print(f"written to {path}", soft_wrap=True)


@app.command()
def demo(
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to make.")] = Path("demo-output"),
    overwrite: OverwriteOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Quantize the small model that comes with alphaquant, compare it with the original, write the report."""
    with progress_bar("demo", quiet=quiet) as progress:
        result = run_demo(output, overwrite=overwrite, progress=progress)
    print_result(result.report)
    print_comparison(result.original, {"round to nearest, absmax": result.rounded, "GPTQ": result.quantized})
    for path in (output, *result.files):
        out.print(f"written to {path}", soft_wrap=True)


def _plan(config: Path | None, scheme: str | None, default: str | None = None) -> Plan:
    if config is not None and scheme is not None:
        raise PlanError("--config and --scheme were both given", remedy="give one of them")
    if config is not None:
        return Plan.load(config)
    if scheme is None and default is None:
        raise PlanError("there is no plan", remedy="give --config FILE, or --scheme such as int4:g128")
    return Plan.from_shorthand(scheme or default or "")


def _device(name: str) -> torch.device:
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


def _output_directory(output: Path | None, save: Path | None, prepared: Prepared, *, overwrite: bool) -> Path:
    """Where the directory is made: the asked-for one, or one beside the single file that vanishes again."""
    if save is not None:
        if save.suffix != ".pt":
            raise OutputError(f"--save {save} does not end in .pt", remedy="give a file name such as quantized.pt")
        if output is not None and save.resolve() == output.resolve():
            raise OutputError(f"-o and --save are both {save}", remedy="give the file another name")
        _check_single_file(save, overwrite=overwrite)
    target = output if output is not None else save.with_name(f".{save.name}.parts") if save is not None else Path()
    check_output(target, prepared.checkpoint.path, overwrite=overwrite)
    return target


def _check_single_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that is there already, or that cannot be made, before any work is done."""
    check_writable(path)
    if path.is_dir() or (path.exists() and not overwrite):
        remedy = "choose another file" if path.is_dir() else "choose another file, or pass --overwrite"
        raise OutputError(f"{path} already exists", remedy=remedy)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Entry point: our own errors become a message and exit code 2."""
    keep_freed_memory()
    try:
        app(prog_name="alphaquant")
    except AlphaQuantError as error:
        print_error(error)
        sys.exit(2)
    except SystemExit as stop:  # typer makes this of Ctrl-C
        if stop.code == 130:
            err.print("interrupted; nothing was left behind")
        raise


if __name__ == "__main__":
    main()
