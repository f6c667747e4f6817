"""The verb that quantizes."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alphaquant.allocation import Means
from alphaquant.checkpoint import open_model, resolve_model
from alphaquant.cli.allocation import (
    BitsOpt,
    FormatsOpt,
    SizeOpt,
    TableOpt,
    ValidateOpt,
    base_plan,
    proposal_for,
    refuse_with,
    request_from,
)
from alphaquant.cli.options import (
    CalibOpt,
    ConfigOpt,
    DeviceOpt,
    DType,
    DTypeOpt,
    EngineOpt,
    Format,
    GpuOpt,
    JsonOpt,
    LegalizeOpt,
    ModelArg,
    OverwriteOpt,
    QuietOpt,
    Rotate,
    RotateOpt,
    SamplesOpt,
    SchemeOpt,
    SeqlenOpt,
    TpOpt,
    check_single_file,
    print_json,
    serving_from,
)
from alphaquant.errors import OutputError
from alphaquant.numerics import give_back_freed_memory
from alphaquant.pipeline import (
    Calibration,
    Forecast,
    Prepared,
    check_run_output,
    foretell,
    join,
    json_log,
    keep_costs,
    parse_bytes,
    plan_sizes,
    planned_layout,
    prepare,
    quantize_checkpoint,
    save_single_file,
    torch_device,
    turned,
)
from alphaquant.solver import Backend, Effort, Method, Permute, Recipe
from alphaquant.terminal import out, print_forecast, print_notes, print_result, print_sizes, progress_bar

if TYPE_CHECKING:
    from alphaquant.allocation import ErrorTable

__all__ = ["quantize"]


def quantize(
    context: typer.Context,
    model: ModelArg,
    *,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Checkpoint directory to make.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also, or instead, write one .pt file of tensors.")] = None,
    config: ConfigOpt = None,
    scheme: SchemeOpt = None,
    bits: BitsOpt = None,
    size: SizeOpt = None,
    formats: FormatsOpt = None,
    table: TableOpt = None,
    validate: ValidateOpt = None,
    method: Annotated[Method, typer.Option(help="GPTQ, or round to nearest.")] = Method.GPTQ,
    effort: Annotated[Effort, typer.Option(help="Spent on scales and refinement.")] = Effort.DEFAULT,
    calib: CalibOpt = None,
    nsamples: SamplesOpt = 128,
    seqlen: SeqlenOpt = 2048,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Draws the windows.")] = 0,
    balance: Annotated[
        bool, typer.Option("--balance", help="Draw more windows; keep those that reach the least-used experts.")
    ] = False,
    routing_weight: Annotated[float, typer.Option(min=0, help="Routed rows weigh their score to this power.")] = 1.0,
    repair_router: Annotated[
        bool,
        typer.Option(
            "--repair-router/--no-repair-router", help="Refit routers to the original's choices; one pass more."
        ),
    ] = False,
    tune_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Tune each half-layer by gradient; 96 by --effort best, else 0."),
    ] = None,
    asymmetric_target: Annotated[
        float,
        typer.Option(min=0, max=1, help="Move weights toward the original's outputs first: .2 is a good strength."),
    ] = 0.0,
    permute: Annotated[
        Permute, typer.Option(help="Sort hidden channels of feed-forward blocks: which of them share a group.")
    ] = Permute.NONE,
    rotate: RotateOpt = Rotate.NONE,
    kernels: Annotated[Backend, typer.Option(help="Inner loops; auto: Triton on a GPU, C on a CPU.")] = Backend.AUTO,
    layout: Annotated[Format, typer.Option("--format", help="Layout; auto: the most widely served.")] = Format.AUTO,
    engine: EngineOpt = None,
    tp: TpOpt = 1,
    gpu: GpuOpt = None,
    legalize: LegalizeOpt = False,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = DType.AUTO,
    overwrite: OverwriteOpt = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop what a stopped run has left; start anew.")] = False,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Stay below this: 4GiB, 16GB …; of the device on a GPU.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything; show sizes, peak memory and time; compute nothing.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Make an error of every fallback and of every sample left out.")
    ] = False,
    log_json: Annotated[
        Path | None, typer.Option("--log-json", metavar="FILE", help="Append a line of JSON for every event.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every event.")] = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Quantize a checkpoint into a directory that engines load.

    Plan by --config FILE or --scheme S, or found for --bits or --size as `plan` finds it. GPTQ calibrates on --calib;
    --method rtn does without it unless it is given.
    A run that was stopped goes on when the same command is given again; `alphaquant status OUT` tells where it is.
    Several processes: torchrun --nproc-per-node N -m alphaquant quantize ...
    """
    if output is None and save is None:
        raise OutputError("there is nothing to write to", remedy="give -o DIR, or --save FILE.pt, or both")
    # until the command ends
    team, run_device = context.with_resource(join(torch_device(device)))
    serving = serving_from(engine, tp, gpu, legalize=legalize)
    layout_name = None if layout is Format.AUTO else layout.value
    request = request_from(
        bits, size, validate=validate, formats=formats, table=table, serving=serving, layout=layout_name, seed=seed
    )
    refuse_with(
        request,
        {
            "--scheme": scheme is not None,
            "--legalize": legalize,
            "--dry-run": dry_run,
            "--rotate auto": rotate is Rotate.AUTO,
        },
    )
    prepared = prepare(open_model(model) if dry_run else resolve_model(model), base_plan(request, config, scheme))
    target = _output_directory(output, save, prepared, overwrite=overwrite, fresh=fresh)
    recipe = Recipe(
        method=method,
        effort=effort,
        routing_power=routing_weight,
        repair_router=repair_router,
        asymmetric_target=asymmetric_target,
        permute=permute,
        tune_steps=tune_steps,
        backend=kernels,
    )
    calibration = Calibration("wikitext2" if calib is None else calib, nsamples, seqlen, seed, balance)
    is_quiet = quiet or as_json or team.rank > 0
    used = None if method is Method.RTN and calib is None else calibration
    with progress_bar("rotating", quiet=is_quiet) as progress:
        prepared = turned(
            prepared,
            rotate.value,
            seed=seed,
            calibration=None if dry_run else used,
            recipe=recipe,
            device=run_device,
            dtype=dtype.value,
            progress=progress,
        )
    means = Means(calibration, recipe, run_device, dtype.value, seed)
    prepared, _, changes, costs = proposal_for(request, prepared, means, serving, legalize=legalize, quiet=is_quiet)
    if team.rank == 0:
        print_notes(prepared.resolved.warnings, [*prepared.notes, *changes])
    if serving is not None:
        layout_name = serving.layout(prepared, layout_name)
    max_bytes = _limit(max_memory)
    if dry_run:
        planned_layout(prepared, layout_name)
        forecast = foretell(prepared, recipe, used, run_device, dtype.value, max_bytes)
        _show_forecast(prepared, forecast, as_json=as_json)
        return
    with json_log(log_json) as log, progress_bar("quantizing", quiet=is_quiet) as progress:
        result = quantize_checkpoint(
            prepared,
            target,
            recipe=recipe,
            calibration=used,
            layout=layout_name,
            device=run_device,
            dtype=dtype.value,
            overwrite=overwrite,
            fresh=fresh,
            strict=strict,
            max_memory=max_bytes,
            progress=progress,
            log=log,
            command=shlex.join(["alphaquant", *sys.argv[1:]]),
            team=team,
        )
    if team.rank > 0:
        return
    _finish(target, output, save, costs)
    if as_json:
        print_json(result.report)
        return
    _show(result.report, verbose=verbose, known=(len(prepared.resolved.warnings), len(prepared.notes)))
    said = "written to" if result.is_new else "already complete, nothing was computed:"
    out.print(f"{said} {', '.join(str(path) for path in (output, save) if path is not None)}", soft_wrap=True)


def _finish(target: Path, output: Path | None, save: Path | None, costs: ErrorTable | None) -> None:
    """Leave the costs for the report, and the single file where it was asked for."""
    if costs is not None:
        keep_costs(target, costs.to_json())
    if save is not None:
        save_single_file(target, save, remove_source=output is None)


def _show(report: dict[str, Any], *, verbose: bool, known: tuple[int, int]) -> None:
    """What the run says of itself; `known` warnings and notes were shown before it."""
    print_notes(report["warnings"][known[0] :], report["notes"][known[1] :])
    print_result(report)
    if verbose:
        for event in report["events"]:
            out.print(f"  {event['module']}: {event['event']}", soft_wrap=True)


def _limit(max_memory: str | None) -> int | None:
    """Bytes of --max-memory; with it, freed memory is given back."""
    if max_memory is None:
        return None
    give_back_freed_memory()
    return parse_bytes(max_memory, "--max-memory")


def _show_forecast(prepared: Prepared, forecast: Forecast, *, as_json: bool) -> None:
    sizes = plan_sizes(prepared)
    if as_json:
        print_json({"sizes": [asdict(s) for s in sizes], **forecast.to_dict()})
    else:
        print_sizes(sizes)
        print_forecast(forecast)


def _output_directory(
    output: Path | None, save: Path | None, prepared: Prepared, *, overwrite: bool, fresh: bool
) -> Path:
    """Where the directory is made: the asked-for one, or one beside the single file that vanishes again."""
    if save is not None:
        if save.suffix != ".pt":
            raise OutputError(f"--save {save} does not end in .pt", remedy="give a file name such as quantized.pt")
        if output is not None and save.resolve() == output.resolve():
            raise OutputError(f"-o and --save are both {save}", remedy="give the file another name")
        check_single_file(save, overwrite=overwrite)
    target = output if output is not None else save.with_name(f".{save.name}.parts") if save is not None else Path()
    check_run_output(target, prepared.checkpoint.path, overwrite=overwrite, fresh=fresh)
    return target
