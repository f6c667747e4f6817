"""The solver: which option each group takes, so that the cost is least and the size fits. No torch.

A multiple-choice knapsack. With a price λ on size the groups part and each takes its cheapest option; the best price
gives a bound on what any choice can reach, and rounding its choice gives a choice near that bound. With thousands of
groups the two agree to 1e-4 and nothing else is needed. Where they do not, branch and bound (HiGHS) decides among the
few options that the bound does not rule out. Shapes: G groups, O options.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

__all__ = ["Solved", "solve"]

_Number = TypeVar("_Number", np.float64, np.int64)

_GAP = 1e-4
_SECONDS = 60.0  # for branch and bound; what it has by then is kept, and its gap is told
_SCALE = 1e4  # HiGHS also stops at an absolute gap of 1e-6: costs are scaled so that it means nothing


class Solved(NamedTuple):
    """A choice, and how far from the best it can be.

    Attributes:
        options: the number of an option for each group.
        gap: what could at most be saved, relative to the cost.
    """

    options: list[int]
    gap: float


def solve(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> Solved | None:
    """The option of each group that makes the sum of costs least while the sum of sizes stays within the budget.

    Args:
        costs: for each group the cost of each option, finite and not negative.
        sizes: the same of sizes, whole numbers.
        budget: the most that the sizes may sum to.

    Returns:
        A choice whose cost is within 1e-4 of the least; None where even the smallest options do not fit.
    """
    keep = [_undominated(cost, size) for cost, size in zip(costs, sizes, strict=True)]
    room = budget - sum(size[options[0]] for size, options in zip(sizes, keep, strict=True))
    if room < 0:
        return None
    shape = (len(keep), max(map(len, keep), default=0))
    cost_GO, size_GO = np.full(shape, np.inf), np.zeros(shape, np.int64)
    for g, options in enumerate(keep):
        cost_GO[g, : len(options)] = [costs[g][o] for o in options]
        # the smallest option of each group is the base: what is chosen is what is added to it
        size_GO[g, : len(options)] = [sizes[g][o] - sizes[g][options[0]] for o in options]
    chosen_G, gap = _solve(cost_GO, size_GO, room)
    return Solved([options[o] for options, o in zip(keep, chosen_G, strict=True)], gap)


def _undominated(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Options by rising size, each of which costs less than all smaller ones."""
    kept: list[int] = []
    for option in sorted(range(len(costs)), key=lambda o: (sizes[o], costs[o])):
        if not kept or costs[option] < costs[kept[-1]]:
            kept.append(option)
    return kept


def _solve(cost_GO: Floats, size_GO: Ints, room: int) -> tuple[Ints, float]:
    last_G = np.isfinite(cost_GO).sum(1) - 1
    if _taken(size_GO, last_G).sum() <= room:
        return last_G, 0.0
    start_G, price, bound = _relaxed(cost_GO, size_GO, room)
    best_G = _improved(cost_GO, size_GO, start_G, room)
    cost = float(_taken(cost_GO, best_G).sum())
    wanted = cost * (1 - _GAP)
    if bound < wanted:
        # what costs so much more than the cheapest option of its group, at this price, is in no choice that is wanted
        reduced_GO = cost_GO + price * size_GO
        core_GO = bound + reduced_GO - reduced_GO.min(1, keepdims=True) < wanted
        core_GO[np.arange(len(best_G)), best_G] = True
        found_G, found_bound = _branch_and_bound(cost_GO, size_GO, core_GO, room)
        bound = max(bound, min(wanted, found_bound))
        if found_G is not None and (found_cost := float(_taken(cost_GO, found_G).sum())) < cost:
            best_G, cost = found_G, found_cost
    return best_G, max(0.0, (cost - bound) / cost) if cost > 0 else 0.0


def _taken(x_GO: NDArray[_Number], chosen_G: Ints) -> NDArray[_Number]:
    return np.take_along_axis(x_GO, chosen_G[:, None], 1)[:, 0]


def _relaxed(cost_GO: Floats, size_GO: Ints, room: int) -> tuple[Ints, float, float]:
    """The choice, the price and the bound of the linear relaxation: steps along the convex hulls, steepest first."""
    steps: list[tuple[float, int, int]] = []  # cost saved a unit of size; group; option that it leads to
    for g in range(len(cost_GO)):
        at, num_options = 0, int(np.isfinite(cost_GO[g]).sum())
        while at + 1 < num_options:
            saved = (cost_GO[g, at] - cost_GO[g, at + 1 : num_options]) / (
                size_GO[g, at + 1 : num_options] - size_GO[g, at]
            )
            step = len(saved) - 1 - int(saved[::-1].argmax())  # the longest of the steepest
            steps.append((float(saved[step]), g, at + 1 + step))
            at += 1 + step
    steps.sort(key=lambda step: -step[0])
    chosen_G = np.zeros(len(cost_GO), np.int64)
    for price, g, option in steps:
        added = int(size_GO[g, option] - size_GO[g, chosen_G[g]])
        if added > room:
            return chosen_G, price, float(_taken(cost_GO, chosen_G).sum()) - price * room
        chosen_G[g] = option
        room -= added
    raise AssertionError("all of the largest options fit, which the caller has ruled out")


def _improved(cost_GO: Floats, size_GO: Ints, chosen_G: Ints, room: int) -> Ints:
    """The choice after the changes that save most, of one group or of one that makes room for another."""
    chosen_G = chosen_G.copy()
    room -= int(_taken(size_GO, chosen_G).sum())
    while True:
        saved_GO = _taken(cost_GO, chosen_G)[:, None] - cost_GO
        added_GO = size_GO - _taken(size_GO, chosen_G)[:, None]
        saved_GO[np.arange(len(chosen_G)), chosen_G] = -np.inf
        changes = _best_changes(saved_GO.ravel(), added_GO.ravel(), room, cost_GO.shape[1])
        if not changes:
            return chosen_G
        for g, option in (divmod(change, cost_GO.shape[1]) for change in changes):
            room -= int(size_GO[g, option] - size_GO[g, chosen_G[g]])
            chosen_G[g] = option


def _best_changes(saved_C: Floats, added_C: Ints, room: int, num_options: int) -> list[int]:
    """The change that saves most within the room, alone or with the cheapest one that makes enough room for it."""
    alone_C = np.where(added_C <= room, saved_C, -np.inf)
    one = int(alone_C.argmax())
    best, found = (float(alone_C[one]), [one]) if alone_C[one] > 0 else (0.0, [])
    up_C = np.flatnonzero((added_C > room) & (saved_C > best))
    down_C = np.flatnonzero((added_C < 0) & np.isfinite(saved_C))
    if not (len(up_C) and len(down_C)):
        return found
    down_C = down_C[np.argsort(added_C[down_C], kind="stable")]
    # for every length of the list, which goes from those that give most, the one of them that costs least
    leading_C = np.maximum.accumulate(saved_C[down_C])
    first_C = np.maximum.accumulate(np.where(saved_C[down_C] == leading_C, np.arange(len(down_C)), 0))
    enough_C = np.searchsorted(added_C[down_C], room - added_C[up_C], side="right")
    up_C, enough_C = up_C[enough_C > 0], enough_C[enough_C > 0]
    if not len(up_C):
        return found
    partner_C = down_C[first_C[enough_C - 1]]
    both_C = np.where(partner_C // num_options == up_C // num_options, -np.inf, saved_C[up_C] + saved_C[partner_C])
    pair = int(both_C.argmax())
    return [int(partner_C[pair]), int(up_C[pair])] if both_C[pair] > best else found


def _branch_and_bound(
    cost_GO: Floats, size_GO: Ints, core_GO: NDArray[np.bool_], room: int
) -> tuple[Ints | None, float]:
    """The best choice among the options of a core, by HiGHS, and its bound; None where it found none in its time."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415  (slow to import)
    from scipy.sparse import csr_matrix  # noqa: PLC0415

    groups, options = core_GO.nonzero()
    cost, size = cost_GO[core_GO], size_GO[core_GO]
    scale = float(cost.max()) or 1.0
    unit = int(np.gcd.reduce(size)) or 1
    one_each = csr_matrix((np.ones(len(groups)), (groups, np.arange(len(groups)))))
    left, bound = room // unit, math.inf
    while True:
        row = csr_matrix((size // unit / max(left, 1))[None])
        with _silenced():
            found = milp(
                cost / scale * _SCALE,  # in this order: of a scale next to nothing there is no inverse
                integrality=np.ones(len(cost)),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(row, -np.inf, left / max(left, 1))],
                options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
            )
        if found.x is None:
            return None, -math.inf
        picked = found.x > 0.5
        bound = min(bound, float(found.mip_dual_bound) * scale / _SCALE)  # the first one had all the room
        over = int(size[picked].sum()) // unit - left
        if over <= 0:
            return options[picked], bound
        left -= over  # HiGHS allows itself 1e-6 of a row; bytes do not


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing reaches standard output: HiGHS prints lines of its own there, past Python, whatever it is told."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
