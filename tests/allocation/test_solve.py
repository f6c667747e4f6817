"""The solver against every choice there is, and against its own bound."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.allocation.problem import Group, Problem
from alphaquant.allocation.simple import uniform
from alphaquant.allocation.solve import solve
from alphaquant.errors import PlanError

GROUP = st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 60)), min_size=1, max_size=4)


def brute_force(costs, sizes, budget):
    """The least cost of any choice that fits; None where none does."""
    fitting = [
        sum(cost[o] for cost, o in zip(costs, choice, strict=True))
        for choice in itertools.product(*(range(len(cost)) for cost in costs))
        if sum(size[o] for size, o in zip(sizes, choice, strict=True)) <= budget
    ]
    return min(fitting, default=None)


@settings(deadline=None, max_examples=150)
@given(groups=st.lists(GROUP, min_size=1, max_size=6), share=st.floats(0, 1))
def test_no_choice_is_better(groups, share):
    costs = [[cost for cost, _ in group] for group in groups]
    sizes = [[size for _, size in group] for group in groups]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    budget = round(least - 2 + share * (most - least + 4))
    best, found = brute_force(costs, sizes, budget), solve(costs, sizes, budget)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert sum(size[o] for size, o in zip(sizes, found.options, strict=True)) <= budget
    cost = sum(cost[o] for cost, o in zip(costs, found.options, strict=True))
    assert best * (1 - 1e-9) <= cost <= best * (1 + 1.1e-4) + 1e-9
    assert cost * (1 - found.gap) <= best * (1 + 1e-6) + 1e-9  # the gap that it tells is one


def hard_case(num_groups, seed=0):
    """Few large groups whose sizes hardly fit together: rounding alone is far from the best."""
    rng = random.Random(seed)
    sizes, costs = [], []
    for _ in range(num_groups):
        numel = rng.choice([1 << 20, 3 << 18, 11 << 16]) * rng.choice([1, 64])
        weight = numel * 10 ** rng.uniform(-1, 1)
        bits = (2.25, 3.25, 4.25, 6.25, 8.25)
        sizes.append([int(b * numel) for b in bits])
        costs.append([weight * 4**-b * rng.uniform(0.8, 1.25) for b in bits])
    return costs, sizes


def test_branch_and_bound_is_needed_and_silent(monkeypatch, capfd):
    costs, sizes = hard_case(40, seed=3)
    budget = sum(size[1] for size in sizes)
    exact = solve(costs, sizes, budget)
    monkeypatch.setattr("alphaquant.allocation.solve._branch_and_bound", lambda *_: (None, -float("inf")))
    rounded = solve(costs, sizes, budget)
    assert exact.gap <= 1e-4 < rounded.gap
    total = [sum(cost[o] for cost, o in zip(costs, found.options, strict=True)) for found in (exact, rounded)]
    assert total[0] <= total[1]
    assert capfd.readouterr().out == ""


def test_fifty_thousand_pairs_take_seconds():
    costs, sizes = hard_case(10_000)
    begin = time.perf_counter()
    found = solve(costs, sizes, sum(size[1] for size in sizes))
    assert found.gap <= 1e-4
    assert time.perf_counter() - begin < 10


def problem(num_groups=6, numel=1000):
    bits = (2 * numel, 3 * numel, 4 * numel)
    groups = [Group((g,), (0, 1, 2), bits, tuple((g + 1) * 4.0**-o for o in range(3))) for g in range(num_groups)]
    return Problem(tuple(groups), 0, num_groups * numel)


def test_a_budget_too_small_names_the_nearest_that_is_not():
    with pytest.raises(PlanError, match=r"give --bits 2\.000 or more") as error:
        problem().within(11_900)
    assert "1.9" in error.value.what
    assert set(problem().within(12_000).chosen.values()) == {0}


def test_uniform_spends_all_and_steps_once():
    drawn = {tuple(uniform(problem(), 15_000, seed).chosen.values()) for seed in range(8)}
    assert all(sorted(chosen) == [0, 0, 0, 1, 1, 1] for chosen in drawn)
    assert len(drawn) > 1  # which ones go up is a matter of the seed
    assert uniform(problem(), 15_000, 3) == uniform(problem(), 15_000, 3)
    assert set(uniform(problem(), 18_999).chosen.values()) == {1}
    with pytest.raises(PlanError, match="the budget"):
        uniform(problem(), 11_000)


def test_uniform_fills_with_groups_of_unequal_size():
    sizes = [7000, 5000, 3000, 2000, 1000]
    groups = tuple(Group((g,), (0, 1), (2 * n, 3 * n), (2.0, 1.0)) for g, n in enumerate(sizes))
    for room in (8000, 9000, 13_000):  # each is a sum of some of them
        assert uniform(Problem(groups, 0, sum(sizes)), 2 * sum(sizes) + room).bits == 2 * sum(sizes) + room
