"""Verbs that look at a model before anything is computed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.checkpoint import open_model, resolve_model, write_json
from alphaquant.cli.options import (
    ConfigOpt,
    DeviceOpt,
    DType,
    DTypeOpt,
    JsonOpt,
    ModelArg,
    OverwriteOpt,
    QuietOpt,
    SchemeOpt,
    check_single_file,
    plan_from,
    print_json,
)
from alphaquant.errors import ConfigError
from alphaquant.models import MoESpec
from alphaquant.pipeline import Calibration, RoutingReport, measure_routing, plan_sizes, prepare, torch_device
from alphaquant.terminal import out, print_notes, print_routing, print_sizes, progress_bar

__all__ = ["inspect"]


def inspect(
    model: ModelArg,
    *,
    config: ConfigOpt = None,
    scheme: SchemeOpt = None,
    routing: Annotated[
        bool, typer.Option("--routing", help="Run a text through it: which experts its tokens choose.")
    ] = False,
    calib: Annotated[str | None, typer.Option(help="With --routing: the text.", show_default="wikitext2")] = None,
    nsamples: Annotated[int | None, typer.Option(min=1, help="With --routing: windows.", show_default="128")] = None,
    seqlen: Annotated[
        int | None, typer.Option(min=1, help="With --routing: tokens in a window.", show_default="2048")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="With --routing: draws the windows.", show_default="0")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="With --routing: JSON file.", show_default="routing.json; with --json none"
        ),
    ] = None,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = DType.AUTO,
    overwrite: OverwriteOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Show a model's architecture, modules and sizes, and what a plan would make of them.

    With --routing it shows instead what its routers and shared experts' gates do on a text, and names starved experts.
    """
    if not routing:
        for option, given in (
            ("--calib", calib), ("--nsamples", nsamples), ("--seqlen", seqlen), ("--seed", seed), ("-o", output)
        ):  # fmt: skip
            if given is not None:
                raise ConfigError(f"{option} was given without --routing", remedy="add --routing")
    prepared = prepare(
        resolve_model(model) if routing else open_model(model), plan_from(config, scheme, default="bf16")
    )
    if routing:
        defaults = Calibration()
        calibration = Calibration(
            defaults.source if calib is None else calib,
            defaults.num_samples if nsamples is None else nsamples,
            defaults.seqlen if seqlen is None else seqlen,
            defaults.seed if seed is None else seed,
        )
        target = Path("routing.json") if output is None and not as_json else output
        if target is not None:
            check_single_file(target, overwrite=overwrite)
        run_device = torch_device(device)
        with progress_bar("routing", quiet=quiet or as_json) as progress:
            report = measure_routing(prepared, calibration, device=run_device, dtype=dtype.value, progress=progress)
        _show_routing(report, target, as_json=as_json)
        return
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
        print_json(facts)
        return
    out.print(
        f"{spec.family} ({spec.architecture}): {spec.num_layers} layers, hidden size {spec.hidden_size}, "
        f"vocabulary {spec.vocab_size:,}, {sum(s.weights for s in sizes):,} parameters"
    )
    if moe:
        out.print(f"{len(moe)} MoE layers of {moe[0].num_experts} experts, top-{moe[0].top_k}")
    print_sizes(sizes)
    print_notes(prepared.resolved.warnings, prepared.notes)


def _show_routing(report: RoutingReport, target: Path | None, *, as_json: bool) -> None:
    print_notes(report.warnings)
    facts = report.to_dict()
    if target is not None:
        write_json(target, facts)
    if as_json:
        print_json(facts)
        return
    print_routing(report)
    out.print(f"written to {target}", soft_wrap=True)
