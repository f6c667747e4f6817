"""From a budget to a plan: the table, the engine's rules and the user's, the solver, the writer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from alphaquant.allocation.budget import rest_bits
from alphaquant.allocation.candidates import Setting
from alphaquant.allocation.costs import scale_dtype, subjects
from alphaquant.allocation.problem import Assignment, Problem, build_problem
from alphaquant.allocation.simple import uniform
from alphaquant.allocation.write import write_plan
from alphaquant.errors import AlphaQuantError, PlanError
from alphaquant.patterns import compile_pattern, unmatched
from alphaquant.pipeline.run import resolve_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from alphaquant.allocation.candidates import Candidate
    from alphaquant.allocation.table import ErrorTable
    from alphaquant.pipeline import Prepared, Serving
    from alphaquant.plan import Module, Plan

__all__ = ["Limits", "Proposer"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Least and most nominal bits of modules, by pattern; a later one wins."""

    floors: tuple[tuple[str, int], ...] = ()
    ceilings: tuple[tuple[str, int], ...] = ()


class Proposer:
    """Turns budgets into plans, for one model, table and set of rules.

    Args:
        prepared: the model with the plan of `--config`: modules that one of its overrides names are fixed.
        table: what each module costs in each candidate.
        candidates: the same candidates, in the table's order.
        serving: the engine whose rules hold; None lets every module have a format of its own.
        layout: the layout that the engine reads; None takes that which allows most.
        limits: floors and ceilings.

    Raises:
        PlanError: a pattern matches nothing, the engine refuses a candidate, or a module has none left.
    """

    def __init__(
        self,
        prepared: Prepared,
        table: ErrorTable,
        candidates: Sequence[Candidate],
        *,
        serving: Serving | None = None,
        layout: str | None = None,
        limits: Limits = Limits(),
    ) -> None:
        self.prepared, self.table, self.candidates = prepared, table, tuple(candidates)
        self._modules = subjects(prepared)
        names = {module.name for module in self._modules}
        allowed = _allowed(prepared, candidates, serving, layout)
        allowed = _limited(self._modules, self.candidates, allowed, limits)
        profile = None if serving is None else serving.profile.on(prepared.spec.family)
        ties = [] if profile is None else [group.names for group in profile.tie_groups(self._modules)]
        fixed = _fixed(prepared)
        self.problem: Problem = build_problem(
            table, ties, allowed, {name: bits for name, bits in fixed.items() if name in names}
        )
        self._row_of = {row.name: index for index, row in enumerate(table.rows)}

    def best(self, bits: int) -> Assignment:
        """The assignment of least cost within so many bits for all subjects."""
        return self.problem.within(bits)

    def uniform(self, bits: int, seed: int = 0) -> Assignment:
        """The same bits, spent without looking: one format for all, raised at random."""
        return uniform(self.problem, bits, seed)

    def bits(self, assignment: Assignment) -> float:
        """Average stored bits of the subjects' weights."""
        return assignment.bits / self.problem.num_weights

    def num_bytes(self, assignment: Assignment) -> int:
        """Bytes of all tensors of the model."""
        return -(-(rest_bits(self.prepared) + assignment.bits) // 8)

    def cheapest(self, cost: float) -> Assignment:
        """The smallest assignment that is predicted to cost no more, to a thousandth of a bit a weight.

        Raises:
            PlanError: even the largest costs more.
        """
        low, high = self.problem.least, self.problem.most
        best = self.best(high)
        if best.cost > cost:
            raise PlanError(f"no plan costs as little as {cost:g}", remedy="give finer --formats")
        while high - low > self.problem.num_weights // 1000:
            middle = (low + high) // 2
            tried = self.best(middle)
            if tried.cost <= cost:
                best, high = tried, tried.bits if low < tried.bits < middle else middle
            else:
                low = middle
        smallest = self.best(self.problem.least)
        return smallest if smallest.cost <= cost else best

    def settings(self, assignment: Assignment) -> dict[str, Setting]:
        """What each module gets: the assignment, and what `--config` decides."""
        found: dict[str, Setting] = {}
        for module in self.prepared.spec.modules():
            scheme = self.prepared.schemes[module.name]
            row = self._row_of.get(module.name)
            if row is not None and row in assignment.chosen:
                candidate = self.candidates[assignment.chosen[row]]
                made = candidate.scheme(module.in_features, scale_dtype(self.prepared))
                found[module.name] = Setting.of(made)
            elif row is not None or scheme is not None:
                found[module.name] = Setting.of(scheme)
        return found

    def proposal(self, assignment: Assignment) -> Prepared:
        """The model with the plan that gives exactly this assignment.

        Raises:
            AlphaQuantError: the plan as written means something else.
        """
        plan = self._plan(assignment, f"{self.table.method}: {self.bits(assignment):.3f} bits a weight")
        found = replace(self.prepared, plan=plan, resolved=resolve_plan(plan, self.prepared.spec))
        settings = self.settings(assignment)
        for name, scheme in found.schemes.items():
            if Setting.of(scheme) != settings.get(name, Setting.of(None)):
                raise AlphaQuantError(
                    f"the plan gives {name} {scheme}, and {settings.get(name)} was meant",
                    remedy="this is a fault of alphaquant: please report it with config.json",
                )
        return found

    def _plan(self, assignment: Assignment, comment: str) -> Plan:
        settings = self.settings(assignment)

        def reason(names: Sequence[str]) -> str:
            """Why these modules have their format: what it costs, and what the other candidates would."""
            rows = [self._row_of[name] for name in names if name in self._row_of]
            free = [row for row in rows if row in assignment.chosen]
            if not free:
                return "as --config says"
            chosen = self.candidates[assignment.chosen[free[0]]].text
            text = f"{self.table.method}: predicted cost {self._cost(free, assignment.chosen):.3g}"
            lower = self._neighbour(free, assignment, -1)
            higher = self._neighbour(free, assignment, 1)
            others = [
                f"{self.candidates[c].text} {self._cost(free, dict.fromkeys(free, c)):.3g}"
                for c in (lower, higher)
                if c is not None and self.candidates[c].text != chosen
            ]
            return text + (f" ({', '.join(others)})" if others else "")

        return write_plan(list(self.prepared.spec.modules()), settings, comment=comment, reason=reason)

    def _cost(self, rows: Sequence[int], chosen: Mapping[int, int]) -> float:
        return sum(self.table.rows[row].cost[chosen[row]] or 0.0 for row in rows)

    def _neighbour(self, rows: Sequence[int], assignment: Assignment, step: int) -> int | None:
        """The candidate next in size for the first of these rows, if it has one."""
        bits = self.table.rows[rows[0]].bits
        ladder = sorted((c for c, size in enumerate(bits) if size is not None), key=lambda c: bits[c] or 0)
        position = ladder.index(assignment.chosen[rows[0]]) + step
        return ladder[position] if 0 <= position < len(ladder) else None


def _fixed(prepared: Prepared) -> dict[str, int]:
    """Bits of the modules that an override of `--config` names."""
    found = {}
    for module in prepared.spec.modules():
        if not any(isinstance(step.rule, int) for step in prepared.resolved.explain(module.name).steps):
            continue
        scheme, size = prepared.schemes[module.name], module.out_features * module.in_features
        stored = 8 * prepared.spec.dtype.itemsize * size
        found[module.name] = (
            stored if scheme is None else round(scheme.bits_per_weight(module.out_features, module.in_features) * size)
        )
    return found


def _allowed(
    prepared: Prepared,
    candidates: Sequence[Candidate],
    serving: Serving | None,
    layout: str | None,
) -> dict[str, tuple[int, ...]]:
    """For each subject the candidates that fit its inputs and that the engine takes, in the best of its layouts.

    Raises:
        PlanError: the engine takes a candidate on no module.
    """
    modules, dtype = subjects(prepared), scale_dtype(prepared)

    def reasons(name: str | None) -> list[dict[str, str | None]]:
        found: list[dict[str, str | None]] = []
        for candidate in candidates:
            of_module: dict[str, str | None] = {}
            for module in modules:
                try:
                    scheme = candidate.scheme(module.in_features, dtype)
                except ValueError as error:
                    of_module[module.name] = str(error)
                    continue
                of_module[module.name] = (
                    None
                    if serving is None
                    else serving.profile.allowed(scheme, module, tp=serving.tp, layout=name, gpu=serving.gpu)
                )
            found.append(of_module)
        return found

    names: Sequence[str | None] = [layout] if serving is None or layout is not None else [*serving.profile.layouts]
    found = min(map(reasons, names), key=lambda f: sum(reason is not None for of in f for reason in of.values()))
    for candidate, of_module in zip(candidates, found, strict=True):
        if all(reason is not None for reason in of_module.values()):
            engine = "no module" if serving is None else f"{serving.profile.name} on no module"
            raise PlanError(
                f"{candidate.text} can be given to {engine}: {next(iter(of_module.values()))}",
                where="--formats",
                remedy=f"leave {candidate.text} out of --formats",
            )
    return {
        module.name: tuple(c for c, of_module in enumerate(found) if of_module[module.name] is None)
        for module in modules
    }


def _limited(
    modules: Sequence[Module],
    candidates: Sequence[Candidate],
    allowed: Mapping[str, tuple[int, ...]],
    limits: Limits,
) -> dict[str, tuple[int, ...]]:
    """Candidates within floors and ceilings.

    Raises:
        PlanError: a pattern matches nothing, or nothing is left between a floor and a ceiling.
    """
    bounds = {module.name: [0, 1 << 10] for module in modules}
    every = [name for module in modules for name in (module.name, module.alias)]
    for side, (option, rules) in enumerate((("--floor", limits.floors), ("--ceiling", limits.ceilings))):
        for text, value in rules:
            pattern = compile_pattern(text)
            found = [m for m in modules if pattern.matches(m.name) or pattern.matches(m.alias)]
            if not found:
                remedy = "name modules that can be quantized by default"
                raise PlanError(unmatched(pattern, option, every), where=option, remedy=remedy)
            for module in found:
                bounds[module.name][side] = value
    left = {}
    for module in modules:
        low, high = bounds[module.name]
        kept = tuple(c for c in allowed[module.name] if low <= candidates[c].bits <= high)
        if not kept:
            held = ", ".join(candidates[c].text for c in allowed[module.name]) or "none"
            raise PlanError(
                f"no format is left for {module.name}: at least {low} and at most {high} bits, of {held}",
                where="--floor, --ceiling, --formats",
                remedy="loosen the limits, or add a format between them",
            )
        left[module.name] = kept
    return left
