"""Options of a budget, and the proposal that they ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from alphaquant.allocation import Budget, Limits, Proposer, Strategy, error_table, parse_candidates, parse_size
from alphaquant.cli.options import plan_from
from alphaquant.errors import ConfigError, PlanError
from alphaquant.pipeline import check_writable

if TYPE_CHECKING:
    from alphaquant.allocation import Means
    from alphaquant.pipeline import Prepared, Serving
    from alphaquant.plan import Plan

__all__ = [
    "BitsOpt",
    "CeilingOpt",
    "FloorOpt",
    "FormatsOpt",
    "Proposal",
    "SizeOpt",
    "StrategyOpt",
    "TableOpt",
    "Wish",
    "base_plan",
    "refuse_with",
    "wish_from",
]

_FORMATS = "int2,int3,int4,int6,int8"

BitsOpt = Annotated[
    float | None, typer.Option(help="Find a plan of so many bits a weight, scales counted, of what can be quantized.")
]
SizeOpt = Annotated[str | None, typer.Option(help="Find a plan whose tensors take so much: 4GiB, 800MB …")]
StrategyOpt = Annotated[Strategy | None, typer.Option("--method", help="How to find it.", show_default="sensitivity")]
FormatsOpt = Annotated[str | None, typer.Option(help="Formats to choose from, as in --scheme.", show_default=_FORMATS)]
FloorOpt = Annotated[list[str] | None, typer.Option(help="PATTERN=BITS: at least so many; may be repeated.")]
CeilingOpt = Annotated[list[str] | None, typer.Option(help="PATTERN=BITS: at most so many; may be repeated.")]
TableOpt = Annotated[
    Path | None, typer.Option(help="Costs of all modules: read where the file exists, else written for the next time.")
]


class Proposal(NamedTuple):
    """A model with the plan found for it; what is known of that plan, as JSON and in words."""

    prepared: Prepared
    facts: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wish:
    """What kind of plan is asked for."""

    budget: Budget
    strategy: Strategy
    formats: str
    limits: Limits
    table: Path | None
    seed: int

    def proposal(
        self,
        prepared: Prepared,
        serving: Serving | None,
        layout: str | None,
        means: Means,
    ) -> Proposal:
        """The plan that is asked for, of a model with the plan of `--config`."""
        bits = self.budget.total(prepared)
        widths = {m.in_features for m in prepared.spec.modules() if m.quantizable_by_default}
        candidates = parse_candidates(self.formats, widths)
        # what can be refused is refused before the work, on a table that costs nothing
        flat = error_table(prepared, Strategy.UNIFORM, candidates, means)
        Proposer(prepared, flat, candidates, serving=serving, layout=layout, limits=self.limits).problem.check(bits)
        table = error_table(prepared, self.strategy, candidates, means, self.table)
        proposer = Proposer(prepared, table, candidates, serving=serving, layout=layout, limits=self.limits)
        uniform = proposer.uniform(bits, self.seed)
        chosen = uniform if self.strategy is Strategy.UNIFORM else proposer.best(bits)
        facts = {
            "method": self.strategy.value,
            "bits_per_weight": proposer.bits(chosen),
            "predicted_cost": chosen.cost,
            "gap": chosen.gap,
            "uniform": {"bits_per_weight": proposer.bits(uniform), "predicted_cost": uniform.cost},
            "table": table.settings,
        }
        notes = [f"{proposer.bits(chosen):.3f} bits a weight by {self.strategy.value}, scales counted"]
        if self.strategy is not Strategy.UNIFORM:
            notes.append(
                f"predicted cost {chosen.cost:.4g}, within {chosen.gap or 0:.1e} of the least; uniform plan of "
                f"{proposer.bits(uniform):.3f} bits: {uniform.cost:.4g}"
            )
        return Proposal(proposer.proposal(chosen), facts, tuple(notes))


def wish_from(
    bits: float | None,
    size: str | None,
    method: Strategy | None,
    *,
    formats: str | None,
    floors: list[str] | None,
    ceilings: list[str] | None,
    table: Path | None,
    seed: int,
) -> Wish | None:
    """What the options ask for; None where they name no budget."""
    if bits is not None and size is not None:
        raise PlanError("--bits and --size were both given", remedy="give one of them")
    if bits is None and size is None:
        given = {"--method": method, "--formats": formats, "--floor": floors, "--ceiling": ceilings, "--table": table}
        for option, value in given.items():
            if value is not None:
                raise ConfigError(f"{option} was given without a budget", remedy="add --bits 3.5, or --size 4GiB")
        return None
    if table is not None:
        check_writable(table)
    return Wish(
        Budget(bits, None if size is None else parse_size(size)),
        method or Strategy.SENSITIVITY,
        formats or _FORMATS,
        Limits(_bounds("--floor", floors), _bounds("--ceiling", ceilings)),
        table,
        seed,
    )


def base_plan(wish: Wish | None, config: Path | None, scheme: str | None) -> Plan:
    """The plan of the options; for a budget the overrides of `--config`, over a default that leaves every module."""
    if wish is None:
        return plan_from(config, scheme)
    plan = plan_from(config, scheme, "bf16")
    return plan.model_copy(update={"default": plan.default.model_copy(update={"wq": "bf16"})})


def refuse_with(wish: Wish | None, given: dict[str, bool]) -> None:
    """Refuse options that make no sense where a plan is to be found."""
    for option, is_given in given.items():
        if wish is not None and is_given:
            remedy = "leave it out: formats are chosen from --formats, as --engine asks"
            if option == "--dry-run":
                remedy = "find the plan with `alphaquant plan`, which writes nothing else"
            raise ConfigError(f"{option} was given with a budget", remedy=remedy)


def _bounds(option: str, texts: list[str] | None) -> tuple[tuple[str, int], ...]:
    found = []
    for text in texts or ():
        parts = re.fullmatch(r"(.+)=([0-9]{1,2})", text)
        if parts is None:
            raise ConfigError(f"{option} {text!r} is no PATTERN=BITS", remedy=f"write {option} '*.self_attn.*=4'")
        found.append((parts[1], int(parts[2])))
    return tuple(found)
