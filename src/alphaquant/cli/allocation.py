"""Options of a budget, and the proposal that they ask for."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alphaquant.allocation import Budget, Proposal, Request, Search, Strategy, propose, to_fill
from alphaquant.cli.options import check_single_file, plan_from
from alphaquant.errors import ConfigError, PlanError
from alphaquant.pipeline import parse_bytes
from alphaquant.terminal import progress_bar

if TYPE_CHECKING:
    from alphaquant.allocation import Means
    from alphaquant.pipeline import Prepared, Serving
    from alphaquant.plan import Plan

__all__ = [
    "BitsOpt",
    "CeilingOpt",
    "CsvOpt",
    "FloorOpt",
    "FormatsOpt",
    "HeldOutOpt",
    "SizeOpt",
    "StrategyOpt",
    "TableOpt",
    "ValidateOpt",
    "base_plan",
    "proposal_for",
    "refuse_with",
    "request_from",
]

_DEFAULT = Search()

BitsOpt = Annotated[
    float | None, typer.Option(help="Find a plan of so many bits a weight, scales counted, of what can be quantized.")
]
SizeOpt = Annotated[str | None, typer.Option(help="Find a plan whose tensors take so much: 4GiB, 800MB …")]
StrategyOpt = Annotated[Strategy | None, typer.Option("--method", help="How to find it.", show_default="sensitivity")]
FormatsOpt = Annotated[
    str | None, typer.Option(help="Formats to choose from, as in --scheme.", show_default=_DEFAULT.formats)
]
FloorOpt = Annotated[list[str] | None, typer.Option(help="PATTERN=BITS: at least so many; may be repeated.")]
CeilingOpt = Annotated[list[str] | None, typer.Option(help="PATTERN=BITS: at most so many; may be repeated.")]
ValidateOpt = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Held-out windows on which the plan and the uniform one are measured; 0: not.",
        show_default="8; 0 for methods without a forward pass",
    ),
]
HeldOutOpt = Annotated[str | None, typer.Option(help="Text for --validate; else the calibration text's other split.")]
TableOpt = Annotated[
    Path | None, typer.Option(help="Costs of all modules: read where the file exists, else written for the next time.")
]

CsvOpt = Annotated[
    Path | None, typer.Option("--csv", help="Write costs, bits and what was found of every module, such as α, as CSV.")
]


def request_from(
    bits: float | None,
    size: str | None,
    method: Strategy | None = None,
    *,
    max_kl: float | None = None,
    is_frontier: bool = False,
    validate: int | None,
    held_out: str | None = None,
    formats: str | None,
    floors: list[str] | None = None,
    ceilings: list[str] | None = None,
    table: Path | None,
    serving: Serving | None,
    layout: str | None,
    seed: int,
    sheet: Path | None = None,
    overwrite: bool = False,
) -> Request | None:
    """What the options ask for; None where they name no budget."""
    budgets = {"--bits": bits, "--size": size, "--max-kl": max_kl, "--frontier": is_frontier or None}
    named = [option for option, value in budgets.items() if value is not None]
    if len(named) > 1:
        raise PlanError(f"{named[0]} and {named[1]} were both given", remedy="give one of them")
    if not named:
        given = {
            "--method": method,
            "--formats": formats,
            "--floor": floors,
            "--ceiling": ceilings,
            "--table": table,
            "--validate": validate,
            "--held-out": held_out,
            "--csv": sheet,
        }
        for option, value in given.items():
            if value is not None:
                raise ConfigError(f"{option} was given without a budget", remedy="add --bits 3.5, or --size 4GiB")
        return None
    if sheet is not None:
        check_single_file(sheet, overwrite=overwrite)
    search = Search(
        method or _DEFAULT.strategy,
        formats or _DEFAULT.formats,
        _bounds("--floor", floors),
        _bounds("--ceiling", ceilings),
        table,
        validate,
        held_out,
    )
    budget = Budget(bits, None if size is None else parse_bytes(size, "--size"), max_kl)
    found = search.request(budget, serving=serving, layout=layout, seed=seed, is_sweep=is_frontier)
    return replace(found, sheet=sheet)


def base_plan(request: Request | None, config: Path | None, scheme: str | None) -> Plan:
    """The plan of the options; for a budget the overrides of `--config`, over a default that leaves every module."""
    if request is None:
        return plan_from(config, scheme)
    return to_fill(plan_from(config, scheme, "bf16"))


def proposal_for(
    request: Request | None,
    prepared: Prepared,
    means: Means,
    serving: Serving | None,
    *,
    legalize: bool,
    quiet: bool,
) -> Proposal:
    """What the options come to: the plan found for a budget, or the given one, made legal where that is asked for."""
    if request is not None:
        with progress_bar("planning", quiet=quiet) as progress:
            return propose(request, prepared, replace(means, progress=progress))
    if serving is not None and legalize:
        prepared, changes = serving.legalized(prepared)
        return Proposal(prepared, {}, changes, None)
    return Proposal(prepared, {}, (), None)


def refuse_with(request: Request | None, given: dict[str, bool]) -> None:
    """Refuse options that make no sense where a plan is to be found."""
    for option, is_given in given.items():
        if request is not None and is_given:
            remedy = "leave it out: formats are chosen from --formats, as --engine asks"
            if option == "--dry-run":
                remedy = "find the plan with `alphaquant plan`, which writes nothing else"
            if option == "--rotate auto":
                remedy = "name the rotation: it is measured with formats that are known"
            raise ConfigError(f"{option} was given with a budget", remedy=remedy)


def _bounds(option: str, texts: list[str] | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in texts or ():
        parts = re.fullmatch(r"(.+)=([0-9]{1,2})", text)
        if parts is None:
            raise ConfigError(f"{option} {text!r} is no PATTERN=BITS", remedy=f"write {option} '*.self_attn.*=4'")
        found.pop(parts[1], None)  # the last one of a pattern wins, from its own place
        found[parts[1]] = int(parts[2])
    return found
