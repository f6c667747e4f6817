"""Module names as few anchored regular expressions: exact over a model's modules, general over their indices."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

__all__ = ["NamePatterns"]

_Template = tuple[str | None, ...]  # a name's segments, with None for an index
_Indices = tuple[str, ...]
_INDEX = re.compile(r"[0-9]+")
_ANY_INDEX = r"\d+"


class NamePatterns:
    """Writes subsets of a model's module names as regular expressions.

    Args:
        universe: every name that the expressions may be held against.
    """

    def __init__(self, universe: Iterable[str]) -> None:
        self._universe = _by_template(universe)

    def cover(self, names: Iterable[str]) -> list[str]:
        r"""Anchored expressions ``^…$`` which together match, of the universe, exactly ``names``; no name twice.

        An index becomes ``\d+`` where every module that differs only in it is meant, else an alternation.
        """
        chosen = _by_template(names)
        # Sibling leaves with the same indices share an expression: (?:q_proj|k_proj|v_proj).
        merged: dict[tuple[_Template, _Indices], list[str]] = {}
        for template, every in self._universe.items():
            for indices in _cover_indices(chosen.get(template, set()), every):
                leaf = template[-1]
                key = (template, indices) if leaf is None else (template[:-1], indices)
                merged.setdefault(key, []).extend([] if leaf is None else [leaf])
        return [_regex(template, indices, leaves) for (template, indices), leaves in merged.items()]

    def cover_marked(self, names: Iterable[str]) -> list[str]:
        """``cover`` for lists that take plain names too: expressions after ``re:``, names without a dot as they are.

        The empty name is an expression as well: readers look for plain names anywhere in a name.
        """
        names = list(names)
        plain = [name for name in names if name and "." not in name]
        return [*plain, *(f"re:{pattern}" for pattern in self.cover(name for name in names if name not in plain))]


def _by_template(names: Iterable[str]) -> dict[_Template, set[_Indices]]:
    found: dict[_Template, set[_Indices]] = {}
    for name in names:
        segments = name.split(".")
        indices = tuple(segment for segment in segments if _INDEX.fullmatch(segment))
        template = tuple(None if _INDEX.fullmatch(segment) else segment for segment in segments)
        found.setdefault(template, set()).add(indices)
    return found


def _cover_indices(some: set[_Indices], every: set[_Indices]) -> list[_Indices]:
    """Patterns, one for each index, that match exactly ``some`` of the index tuples ``every``."""
    if not some:
        return []
    if some == every:
        return [(_ANY_INDEX,) * len(next(iter(every)))]
    rests_some, rests_every = _by_first(some), _by_first(every)
    heads: dict[_Indices, list[str]] = {}
    for head, rest in rests_some.items():
        for pattern in _cover_indices(rest, rests_every[head]):
            heads.setdefault(pattern, []).append(head)
    return [
        (_ANY_INDEX if len(found) == len(rests_every) else _alternation(found), *pattern)
        for pattern, found in heads.items()
    ]


def _by_first(tuples: Collection[_Indices]) -> Mapping[str, set[_Indices]]:
    ordered = sorted(tuples, key=lambda indices: [(int(index), index) for index in indices])
    return {head: {indices[1:] for indices in group} for head, group in groupby(ordered, key=lambda t: t[0])}


def _alternation(choices: Sequence[str]) -> str:
    return re.escape(choices[0]) if len(choices) == 1 else f"(?:{'|'.join(map(re.escape, choices))})"


def _regex(template: _Template, indices: _Indices, leaves: Sequence[str]) -> str:
    pattern = iter(indices)
    segments = [next(pattern) if segment is None else re.escape(segment) for segment in template]
    return "^" + r"\.".join([*segments, _alternation(leaves)] if leaves else segments) + "$"
