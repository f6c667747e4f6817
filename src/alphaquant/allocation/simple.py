"""Uniform: one format for all, and the bytes that it leaves spent at random. No torch."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from alphaquant.allocation.solve import solve

if TYPE_CHECKING:
    from alphaquant.allocation.problem import Assignment, Group, Problem

__all__ = ["uniform"]

_SPREAD = 0.1


def uniform(problem: Problem, bits: int, seed: int = 0) -> Assignment:
    """The largest candidate that all groups can take; then random groups one step up, until the bits are spent.

    Groups that the constraints keep from that candidate take their nearest smaller one, or else their smallest. Which
    groups go up is a knapsack too: each bit is worth the same but for a random tenth, so the room is filled as far as
    the groups' sizes allow.

    Raises:
        PlanError: even the smallest candidates do not fit.
    """
    generator = random.Random(seed)  # noqa: S311  (no secret: a plan that can be made again)
    candidates = sorted({option for group in problem.groups for option in group.options})
    levels = [[_at(group, candidate) for group in problem.groups] for candidate in candidates]
    fitting = [level for level in levels if problem.assignment(level).bits <= bits]
    if not fitting:
        raise problem.infeasible(bits)
    level = max(fitting, key=lambda chosen: problem.assignment(chosen).bits)
    steps = [(option, _above(group, option)) for group, option in zip(problem.groups, level, strict=True)]
    sizes = [[group.bits[o] for o in pair] for group, pair in zip(problem.groups, steps, strict=True)]
    costs = [[(max(size) - s) * (1 + _SPREAD * generator.random()) for s in size] for size in sizes]
    found = solve(costs, sizes, bits - problem.fixed_bits)
    assert found is not None  # the level itself fits
    return problem.assignment([pair[choice] for pair, choice in zip(steps, found.options, strict=True)])


def _ladder(group: Group) -> list[int]:
    return sorted(range(len(group.options)), key=group.bits.__getitem__)


def _at(group: Group, candidate: int) -> int:
    """The option of a group for a candidate that all are to take."""
    lower = [option for option in _ladder(group) if group.options[option] <= candidate]
    return next((o for o in lower if group.options[o] == candidate), lower[-1] if lower else _ladder(group)[0])


def _above(group: Group, option: int) -> int:
    """The next larger option, or the same where there is none."""
    return next((o for o in _ladder(group) if group.bits[o] > group.bits[option]), option)
