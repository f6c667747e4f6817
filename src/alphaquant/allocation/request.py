"""What is asked for, and what comes of it: a plan for a budget, or the frontier of all budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.allocation.candidates import parse_candidates
from alphaquant.allocation.estimate import Strategy, error_table
from alphaquant.allocation.propose import Limits, Proposer
from alphaquant.allocation.trial import try_plans
from alphaquant.calibration import evaluation_windows, is_tokenised, load_tokenizer
from alphaquant.checkpoint import write_text
from alphaquant.errors import ConfigError, PlanError
from alphaquant.pipeline import check_writable
from alphaquant.pipeline.quality import quality_facts
from alphaquant.pipeline.run import draw_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from alphaquant.allocation.budget import Budget
    from alphaquant.allocation.estimate import Means
    from alphaquant.allocation.problem import Assignment
    from alphaquant.allocation.table import ErrorTable
    from alphaquant.evaluation import Quality
    from alphaquant.pipeline import Prepared, Serving
    from alphaquant.plan import Plan

__all__ = ["Frontier", "Point", "Proposal", "Request", "Search", "frontier", "propose", "to_fill"]

_VALIDATE = 8
_FORWARD = (Strategy.SENSITIVITY, Strategy.UTILIZATION)  # what can run the model can measure it

_TRIAL_TOKENS = 16_384  # to calibrate a plan that is only tried out
_TRIES = 5
_AIM = 0.9  # of the divergence that is allowed, where a first plan measured otherwise than predicted
_NEAR = 0.8  # of the divergence that is allowed: then no smaller plan is looked for


@dataclass(frozen=True, slots=True)
class Request:
    """What kind of plan is asked for.

    Attributes:
        budget: what it may take, or lose.
        strategy: how it is found.
        formats: shorthand of the formats to choose from, with commas.
        limits: floors and ceilings.
        table: file of the costs: read where it exists, else written.
        validate: held-out windows on which the plan and the uniform one are measured; 0: not at all.
        held_out: text of these; None: the evaluation split of the calibration text.
        serving: the engine whose rules hold.
        layout: the layout that it reads; None: that which allows most.
        seed: of what is random.
        sheet: file to write the costs to as CSV, for the reader; it is not read again.
    """

    budget: Budget
    strategy: Strategy
    formats: str
    limits: Limits
    table: Path | None = None
    validate: int = 0
    held_out: str | None = None
    serving: Serving | None = None
    layout: str | None = None
    seed: int = 0
    sheet: Path | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """How a plan for a budget is found.

    Attributes:
        strategy: `sensitivity`, `alpha`, `utilization`, `uniform` or `random`.
        formats: shorthand of the formats to choose from, with commas.
        floors: least nominal bits of what a pattern matches; a later one wins.
        ceilings: most nominal bits.
        table: file of the costs of all modules: read where it exists, else written for the next time.
        validate: held-out windows on which the plan and the uniform one are measured; 0: not at all; None: 8, and 0
            for strategies without a forward pass.
        held_out: text of these; None: the evaluation split of the calibration text.
    """

    strategy: Strategy | str = Strategy.SENSITIVITY
    formats: str = "int2,int3,int4,int6,int8"
    floors: Mapping[str, int] = field(default_factory=dict)
    ceilings: Mapping[str, int] = field(default_factory=dict)
    table: str | Path | None = None
    validate: int | None = None
    held_out: str | None = None

    def request(
        self, budget: Budget, *, serving: Serving | None, layout: str | None, seed: int, is_sweep: bool = False
    ) -> Request:
        """The request for a budget; a sweep of budgets is measured only where that is asked for.

        Raises:
            ConfigError: there is no such strategy, or it predicts no divergence, which the budget limits.
            OutputError: the table cannot be written.
        """
        names = [strategy.value for strategy in Strategy]
        if not isinstance(self.strategy, Strategy) and self.strategy not in names:
            raise ConfigError(f"strategy is {self.strategy!r}", remedy=f"give one of {', '.join(names)}")
        strategy = Strategy(self.strategy)
        if budget.max_kl is not None and strategy is not Strategy.SENSITIVITY:
            remedy = "leave --method out: only sensitivity predicts a divergence"
            raise ConfigError(f"--max-kl was given with --method {strategy.value}", remedy=remedy)
        table = None if self.table is None else Path(self.table)
        if table is not None:
            check_writable(table)
        validate = self.validate
        if validate is None:
            validate = 0 if is_sweep or strategy not in _FORWARD else _VALIDATE
        limits = Limits(tuple(self.floors.items()), tuple(self.ceilings.items()))
        return Request(budget, strategy, self.formats, limits, table, validate, self.held_out, serving, layout, seed)


class Proposal(NamedTuple):
    """A model with its plan; what is known of that plan, as JSON and in words; all modules' costs, if it was found."""

    prepared: Prepared
    facts: dict[str, Any]
    notes: tuple[str, ...]
    table: ErrorTable | None


class Point(NamedTuple):
    """One budget of a frontier: bits a weight, bytes of the whole model, predicted and measured KL in nats a token."""

    bits: float
    num_bytes: int
    predicted: float
    measured: float | None
    uniform: float | None


class Frontier(NamedTuple):
    """Points from the smallest to the largest; `knee` is the number of the one farthest below the chord."""

    points: tuple[Point, ...]
    knee: int
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        points = [point._asdict() for point in self.points]
        return {"version": 1, "method": self.method, "knee": self.knee, "points": points}


def to_fill(plan: Plan) -> Plan:
    """A plan's overrides over a default that leaves every module: what a budget is to fill."""
    return plan.model_copy(update={"default": plan.default.model_copy(update={"wq": "bf16"})})


def propose(request: Request, prepared: Prepared, means: Means) -> Proposal:
    """The plan for a budget, of a model with the plan of `--config`.

    Raises:
        AlphaQuantError: the budget, a pattern, a format or a text is not possible.
    """
    proposer, bits = _proposer(request, prepared, means)
    if request.budget.max_kl is not None:
        return _within_kl(request, proposer, means)
    uniform = proposer.uniform(bits, request.seed)
    chosen = uniform if request.strategy is Strategy.UNIFORM else proposer.best(bits)
    facts = _facts(request, proposer, chosen) | {"uniform": _sizes(proposer, uniform)}
    notes = [f"{proposer.bits(chosen):.3f} bits a weight by {request.strategy.value}, scales counted"]
    if chosen is not uniform:
        notes.append(
            f"predicted cost {chosen.cost:.4g}, within {chosen.gap or 0:.1e} of the least; uniform plan of "
            f"{proposer.bits(uniform):.3f} bits: {uniform.cost:.4g}"
        )
    if request.validate and chosen is not uniform:
        found, uniforms = _measured(request, [proposer.proposal(chosen), proposer.proposal(uniform)], means)
        facts |= {"measured": quality_facts(found), "measured_uniform": quality_facts(uniforms)}
        notes.append(f"held-out KL {_kl(found):.5f} nats a token, uniform {_kl(uniforms):.5f}")
        if _kl(uniforms) < _kl(found):
            chosen = uniform
            facts["method"] = Strategy.UNIFORM.value
            notes.append("the uniform plan measures better, so that is the one proposed")
    return Proposal(proposer.proposal(chosen), facts, tuple(notes), proposer.table)


def frontier(request: Request, prepared: Prepared, means: Means, num_points: int = 12) -> Frontier:
    """Size against loss, from the smallest plan to the largest.

    The knee is the point farthest below the straight line between the ends, both axes scaled to 0 … 1.

    Raises:
        AlphaQuantError: a pattern, a format or a text is not possible.
    """
    proposer, _ = _proposer(request, prepared, means)
    low, high = proposer.problem.least, proposer.problem.most
    budgets = sorted({low + (high - low) * n // (num_points - 1) for n in range(num_points)})
    chosen = [proposer.best(bits) for bits in budgets]
    measured: list[float | None] = [None] * len(chosen)
    uniform: list[float | None] = [None] * len(chosen)
    if request.validate:
        plans = [proposer.proposal(a) for a in chosen]
        plans += [proposer.proposal(proposer.uniform(bits, request.seed)) for bits in budgets]
        found = [_kl(quality) for quality in _measured(request, plans, means)]
        measured, uniform = [*found[: len(chosen)]], [*found[len(chosen) :]]
    points = tuple(
        Point(proposer.bits(a), proposer.num_bytes(a), a.cost, m, u)
        for a, m, u in zip(chosen, measured, uniform, strict=True)
    )
    losses = [point.predicted if point.measured is None else point.measured for point in points]
    return Frontier(points, knee_of([point.num_bytes for point in points], losses), request.strategy.value)


def knee_of(sizes: Sequence[float], losses: Sequence[float]) -> int:
    """The point farthest below the chord from the first to the last, both axes scaled to 0 … 1."""
    width, height = (sizes[-1] - sizes[0]) or 1, (losses[0] - losses[-1]) or 1
    below = [
        1 - (size - sizes[0]) / width - (loss - losses[-1]) / height for size, loss in zip(sizes, losses, strict=True)
    ]
    return max(range(len(below)), key=below.__getitem__)


def _proposer(request: Request, prepared: Prepared, means: Means) -> tuple[Proposer, int]:
    widths = {m.in_features for m in prepared.spec.modules() if m.quantizable_by_default}
    candidates = parse_candidates(request.formats, widths)
    bits = request.budget.total(prepared)

    def with_costs(strategy: Strategy, saved: Path | None) -> Proposer:
        table = error_table(prepared, strategy, candidates, means, saved)
        return Proposer(
            prepared, table, candidates, serving=request.serving, layout=request.layout, limits=request.limits
        )

    # what can be refused is refused before the work, on a table that costs nothing
    with_costs(Strategy.UNIFORM, None).problem.check(bits)
    proposer = with_costs(request.strategy, request.table)
    if request.sheet is not None:
        write_text(request.sheet, proposer.table.to_csv())
    return proposer, bits


def _within_kl(request: Request, proposer: Proposer, means: Means) -> Proposal:
    """The smallest plan whose divergence is allowed: as predicted, or as measured where that is asked for."""
    allowed, most = request.budget.max_kl, proposer.problem.most
    assert allowed is not None
    least_cost = proposer.best(most).cost
    if least_cost > allowed:
        raise PlanError(
            f"--max-kl {allowed:g} is below the {least_cost:.3g} that the best allowed formats are predicted to lose",
            where="--max-kl",
            remedy=f"give --max-kl {least_cost * 1.01:.3g} or more, or finer --formats",
        )
    target, kept, notes = allowed, proposer.cheapest(allowed), []
    if not request.validate:
        notes.append("predicted only; --validate 8 measures it")
        told = (_told(proposer, kept), *notes)
        return Proposal(proposer.proposal(kept), _facts(request, proposer, kept), told, proposer.table)
    best: tuple[Assignment, Quality] | None = None
    for _ in range(_TRIES):
        tried = proposer.cheapest(target)
        (quality,) = _measured(request, [proposer.proposal(tried)], means)
        notes.append(f"{proposer.bits(tried):.3f} bits: held-out KL {_kl(quality):.5f}, predicted {tried.cost:.5f}")
        fits = _kl(quality) <= allowed
        if fits and (best is None or tried.bits < best[0].bits):
            best = tried, quality
        if fits and _kl(quality) >= _NEAR * allowed:
            break
        target = max(least_cost, tried.cost * _AIM * allowed / max(_kl(quality), 1e-9))
    if best is None:
        raise PlanError(
            f"no plan was measured within --max-kl {allowed:g}: {'; '.join(notes)}",
            where="--max-kl",
            remedy="give a larger one, or finer --formats",
        )
    facts = _facts(request, proposer, best[0]) | {"measured": quality_facts(best[1])}
    return Proposal(proposer.proposal(best[0]), facts, (_told(proposer, best[0]), *notes), proposer.table)


def _told(proposer: Proposer, chosen: Assignment) -> str:
    return f"{proposer.bits(chosen):.3f} bits a weight, scales counted; predicted KL {chosen.cost:.5f} nats a token"


def _facts(request: Request, proposer: Proposer, chosen: Assignment) -> dict[str, Any]:
    head = {"method": request.strategy.value, **_sizes(proposer, chosen), "gap": chosen.gap}
    return head | {"table": proposer.table.settings}


def _sizes(proposer: Proposer, chosen: Assignment) -> dict[str, Any]:
    return {
        "bits_per_weight": proposer.bits(chosen),
        "bytes": proposer.num_bytes(chosen),
        "predicted_cost": chosen.cost,
    }


def _measured(request: Request, plans: Sequence[Prepared], means: Means) -> list[Quality]:
    calibration, first = means.calibration, plans[0]
    seqlen = min(calibration.seqlen, first.spec.max_positions)
    few = replace(calibration, num_samples=max(1, min(calibration.num_samples, _TRIAL_TOKENS // seqlen)))
    source = request.held_out or calibration.source
    held_out = evaluation_windows(
        source,
        None if is_tokenised(source) else load_tokenizer(first.checkpoint.path),
        seqlen=seqlen,
        max_windows=request.validate,
        vocab_size=first.spec.vocab_size,
    )
    return try_plans(
        plans,
        draw_tokens(first, few).ids,
        held_out.ids,
        means.recipe,
        device=means.device,
        dtype=means.dtype,
        progress=means.progress,
    )


def _kl(quality: Quality) -> float:
    assert quality.agreement is not None
    return quality.agreement.kl
