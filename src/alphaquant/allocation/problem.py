"""From an error table to an assignment: ties, floors, ceilings and fixed modules around the solver. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alphaquant.allocation.solve import solve
from alphaquant.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from alphaquant.allocation.table import ErrorTable

__all__ = ["Assignment", "Group", "Problem", "build_problem"]


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that must take one candidate: rows of the table, and for each allowed candidate the sums of them."""

    rows: tuple[int, ...]
    options: tuple[int, ...]
    bits: tuple[int, ...]
    cost: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """A candidate for each row of the table that is free, and what they come to.

    Attributes:
        chosen: row → candidate.
        bits: stored bits of all rows, the fixed ones included.
        cost: predicted cost of the free ones.
        gap: what a better choice could at most save of it, relative; None where nothing was minimised.
    """

    chosen: Mapping[int, int]
    bits: int
    cost: float
    gap: float | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Groups to decide; `fixed_bits` is what the modules take that are fixed."""

    groups: tuple[Group, ...]
    fixed_bits: int
    num_weights: int

    @property
    def least(self) -> int:
        """The fewest bits that all modules can take."""
        return self.fixed_bits + sum(min(group.bits) for group in self.groups)

    @property
    def most(self) -> int:
        """The bits of the largest allowed candidates."""
        return self.fixed_bits + sum(max(group.bits) for group in self.groups)

    def check(self, bits: int) -> None:
        """Refuse a budget that is too small.

        Raises:
            PlanError: names the nearest budget that is not.
        """
        if bits < self.least:
            raise self.infeasible(bits)

    def within(self, bits: int) -> Assignment:
        """The assignment of least cost that takes at most so many bits.

        Raises:
            PlanError: none fits; names the nearest budget that does.
        """
        room = bits - self.fixed_bits
        found = solve([group.cost for group in self.groups], [group.bits for group in self.groups], room)
        if found is None:
            raise self.infeasible(bits)
        return self.assignment(found.options, found.gap)

    def assignment(self, chosen: Sequence[int], gap: float | None = None) -> Assignment:
        """What an option for each group comes to."""
        picked = list(zip(self.groups, chosen, strict=True))
        return Assignment(
            {row: group.options[option] for group, option in picked for row in group.rows},
            self.fixed_bits + sum(group.bits[option] for group, option in picked),
            sum(group.cost[option] for group, option in picked),
            gap,
        )

    def infeasible(self, bits: int) -> PlanError:
        """The error of a budget that is too small."""
        least = self.least / self.num_weights
        nearest = -int(-least * 1000 // 1) / 1000
        return PlanError(
            f"{bits / self.num_weights:.3f} bits a weight are fewer than the {least:.3f} that the narrowest allowed "
            "formats take, scales counted",
            where="the budget",
            remedy=f"give --bits {nearest:.3f} or more ({-(-self.least // 8):,} bytes of quantizable weights), "
            "narrower --formats, or lower floors",
        )


def build_problem(
    table: ErrorTable,
    ties: Iterable[Sequence[str]],
    allowed: Mapping[str, Sequence[int]],
    fixed: Mapping[str, int],
) -> Problem:
    """Groups of rows that are decided together.

    Args:
        table: the error table.
        ties: sets of modules that must take one candidate; modules in none stand alone.
        allowed: module → candidates that it may take.
        fixed: module → its bits, of modules that are decided already.

    Raises:
        PlanError: a group has no candidate that all its members may take, or is fixed in part.
    """
    row_of = {row.name: index for index, row in enumerate(table.rows)}
    tied: dict[str, tuple[str, ...]] = {}
    for names in ties:
        tied |= dict.fromkeys(names, tuple(names))
    groups: list[Group] = []
    seen: set[str] = set()
    for row in table.rows:
        if row.name in seen:
            continue
        members = tied.get(row.name, (row.name,))
        seen.update(members)
        held = [name for name in members if name in fixed]
        if held and len(held) < len(members):
            other = next(name for name in members if name not in fixed)
            raise PlanError(
                f"--config decides {held[0]}, but not {other}, which must have the same format",
                where=f"{len(members)} modules that the engine loads as one",
                remedy="let --config name all of them, or none",
            )
        if not held:
            groups.append(_group(table, [row_of[name] for name in members], allowed))
    weights = sum(row.num_weights for row in table.rows)
    return Problem(tuple(groups), sum(fixed[row.name] for row in table.rows if row.name in fixed), weights)


def _group(table: ErrorTable, rows: Sequence[int], allowed: Mapping[str, Sequence[int]]) -> Group:
    members = [table.rows[row] for row in rows]
    options = [
        option
        for option in range(len(table.candidates))
        if all(option in allowed[m.name] and m.bits[option] is not None for m in members)
    ]
    if not options:
        what = (
            "no candidate is left for "
            + members[0].name
            + (f" and {len(rows) - 1} tied to it" if len(rows) > 1 else "")
        )
        raise PlanError(
            what, where=", ".join(table.candidates), remedy="widen --formats, or loosen --floor, --ceiling or --engine"
        )
    return Group(
        tuple(rows),
        tuple(options),
        tuple(sum(m.bits[option] or 0 for m in members) for option in options),
        tuple(sum(m.cost[option] or 0.0 for m in members) for option in options),
    )
