"""The verb that resolves plans, and finds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alphaquant.allocation import Means, frontier
from alphaquant.checkpoint import open_model, resolve_model, write_json, write_text
from alphaquant.cli.allocation import (
    BitsOpt,
    CeilingOpt,
    CsvOpt,
    FloorOpt,
    FormatsOpt,
    HeldOutOpt,
    SizeOpt,
    StrategyOpt,
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
    SamplesOpt,
    SchemeOpt,
    SeqlenOpt,
    TpOpt,
    check_single_file,
    print_json,
    serving_from,
)
from alphaquant.pipeline import Calibration, Prepared, plan_sizes, prepare, torch_device
from alphaquant.report import write_frontier
from alphaquant.solver import Recipe
from alphaquant.terminal import out, print_frontier, print_notes, print_sizes, print_violations, progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alphaquant.allocation import Frontier, Proposal
    from alphaquant.engines import Violation
    from alphaquant.pipeline import Serving

__all__ = ["plan"]


def plan(
    model: ModelArg,
    *,
    config: ConfigOpt = None,
    scheme: SchemeOpt = None,
    bits: BitsOpt = None,
    size: SizeOpt = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Find the smallest plan that loses no more: nats a token of KL.")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--frontier", help="Sweep budgets: size against loss, the knee marked.")
    ] = False,
    method: StrategyOpt = None,
    formats: FormatsOpt = None,
    floor: FloorOpt = None,
    ceiling: CeilingOpt = None,
    table: TableOpt = None,
    csv: CsvOpt = None,
    validate: ValidateOpt = None,
    held_out: HeldOutOpt = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Draws calibration windows, and random plans.")] = 0,
    calib: CalibOpt = None,
    nsamples: SamplesOpt = 128,
    seqlen: SeqlenOpt = 2048,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the plan; a frontier as .html, or else as JSON.")
    ] = None,
    explain: Annotated[str | None, typer.Option(help="Show which rules bear on this module.")] = None,
    engine: EngineOpt = None,
    tp: TpOpt = 1,
    gpu: GpuOpt = None,
    legalize: LegalizeOpt = False,
    layout: Annotated[Format, typer.Option("--format", help="Layout to hold against the engine.")] = Format.AUTO,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = DType.AUTO,
    overwrite: OverwriteOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Resolve a plan on a model: which module gets which format, and why; or find one for --bits, --size or --max-kl.

    With --engine it lists what the engine would not take, and ends with code 2 where there is something; what it finds
    the engine takes. --config then decides the modules that its overrides name.
    """
    serving = serving_from(engine, tp, gpu, legalize=legalize)
    layout_name = None if layout is Format.AUTO else layout.value
    request = request_from(
        bits,
        size,
        method,
        max_kl=max_kl,
        is_frontier=sweep,
        validate=validate,
        held_out=held_out,
        formats=formats,
        floors=floor,
        ceilings=ceiling,
        table=table,
        serving=serving,
        layout=layout_name,
        seed=seed,
        sheet=csv,
        overwrite=overwrite,
    )
    refuse_with(request, {"--scheme": scheme is not None, "--legalize": legalize})
    if output is not None:
        check_single_file(output, overwrite=overwrite)
    found = open_model(model) if request is None else resolve_model(model)
    prepared = prepare(found, base_plan(request, config, scheme))
    calibration = Calibration("wikitext2" if calib is None else calib, nsamples, seqlen, seed)
    means = Means(calibration, Recipe(), torch_device(device), dtype.value, seed)
    is_quiet = quiet or as_json
    if request is not None and sweep:
        with progress_bar("planning", quiet=is_quiet) as progress:
            swept = frontier(request, prepared, replace(means, progress=progress))
        _show_frontier(swept, output, as_json=as_json)
        return
    proposal = proposal_for(request, prepared, means, serving, legalize=legalize, quiet=is_quiet)
    prepared = proposal.prepared
    if output is not None:
        write_text(output, prepared.plan.to_json())
    if explain is not None:
        _explain(prepared, explain, as_json=as_json)
        return
    violations = [] if serving is None else serving.violations(prepared, layout_name)
    _show(proposal, serving, violations, as_json=as_json)
    if violations:
        raise typer.Exit(2)


def _show(proposal: Proposal, serving: Serving | None, violations: Sequence[Violation], *, as_json: bool) -> None:
    prepared, known, notes, _ = proposal
    if as_json:
        schemes = {name: None if s is None else str(s) for name, s in prepared.schemes.items()}
        found = [{"module": v.module, "modules": v.num_modules, "rule": v.rule, "remedy": v.remedy} for v in violations]
        facts: dict[str, Any] = {} if serving is None else {"violations": found, "legalized": notes}
        facts |= {"proposal": known} if known else {}
        print_json({"schemes": schemes, **facts} if facts else schemes)
        return
    print_sizes(plan_sizes(prepared))
    print_notes(prepared.resolved.warnings, [*prepared.notes, *notes])
    if serving is not None:
        print_violations(serving.profile.name, violations)


def _show_frontier(found: Frontier, output: Path | None, *, as_json: bool) -> None:
    if output is not None:
        if output.suffix == ".html":
            write_frontier(found.to_dict(), output)
        else:
            write_json(output, found.to_dict())
    if as_json:
        print_json(found.to_dict())
    else:
        print_frontier(found)


def _explain(prepared: Prepared, name: str, *, as_json: bool) -> None:
    explanation = prepared.resolved.explain(name)
    if as_json:
        steps = [{"rule": s.rule, "pattern": s.pattern, "sets": dict(s.keys)} for s in explanation.steps]
        found = None if explanation.scheme is None else str(explanation.scheme)
        print_json({"module": explanation.module.name, "scheme": found, "steps": steps})
    else:
        out.print(str(explanation), soft_wrap=True)
