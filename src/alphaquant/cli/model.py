"""Verbs that look at a model before anything is computed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from alphaquant.checkpoint import resolve_model
from alphaquant.cli.options import (
    ConfigOpt,
    EngineOpt,
    Format,
    GpuOpt,
    JsonOpt,
    LegalizeOpt,
    ModelArg,
    SchemeOpt,
    TpOpt,
    plan_from,
    print_json,
    serving_from,
)
from alphaquant.models import MoESpec
from alphaquant.pipeline import Prepared, plan_sizes, prepare
from alphaquant.terminal import out, print_notes, print_sizes, print_violations

__all__ = ["inspect", "plan"]


def inspect(
    model: ModelArg,
    *,
    config: ConfigOpt = None,
    scheme: SchemeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Show a model's architecture, modules and sizes, and what a plan would make of them."""
    prepared = prepare(resolve_model(model), plan_from(config, scheme, default="bf16"))
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
    print_notes(prepared.resolved.warnings, prepared.resolved.notes)


def plan(
    model: ModelArg,
    *,
    config: ConfigOpt = None,
    scheme: SchemeOpt = None,
    explain: Annotated[str | None, typer.Option(help="Show which rules bear on this module.")] = None,
    engine: EngineOpt = None,
    tp: TpOpt = 1,
    gpu: GpuOpt = None,
    legalize: LegalizeOpt = False,
    layout: Annotated[Format, typer.Option("--format", help="Layout to hold against the engine.")] = Format.AUTO,
    as_json: JsonOpt = False,
) -> None:
    """Resolve a plan on a model: which module gets which format, and why.

    With --engine it lists what the engine would not take, and ends with code 2 where there is something.
    """
    prepared = prepare(resolve_model(model), plan_from(config, scheme))
    serving = serving_from(engine, tp, gpu, legalize=legalize)
    changes: tuple[str, ...] = ()
    if serving is not None and legalize:
        prepared, changes = serving.legalized(prepared)
    if explain is not None:
        _explain(prepared, explain, as_json=as_json)
        return
    violations = (
        [] if serving is None else serving.violations(prepared, None if layout is Format.AUTO else layout.value)
    )
    table = {name: None if s is None else str(s) for name, s in prepared.schemes.items()}
    if as_json:
        found = [{"module": v.module, "modules": v.num_modules, "rule": v.rule, "remedy": v.remedy} for v in violations]
        print_json(table if serving is None else {"schemes": table, "violations": found, "legalized": changes})
    else:
        print_sizes(plan_sizes(prepared))
        print_notes(prepared.resolved.warnings, [*prepared.resolved.notes, *changes])
        if engine is not None:
            print_violations(engine.value, violations)
    if violations:
        raise typer.Exit(2)


def _explain(prepared: Prepared, name: str, *, as_json: bool) -> None:
    explanation = prepared.resolved.explain(name)
    if as_json:
        steps = [{"rule": s.rule, "pattern": s.pattern, "sets": dict(s.keys)} for s in explanation.steps]
        found = None if explanation.scheme is None else str(explanation.scheme)
        print_json({"module": explanation.module.name, "scheme": found, "steps": steps})
    else:
        out.print(str(explanation), soft_wrap=True)
