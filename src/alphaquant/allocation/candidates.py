"""Candidate formats: what `--formats` names, and the scheme that each makes of a module."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alphaquant.errors import PlanError
from alphaquant.formats import FORMATS, Scheme
from alphaquant.plan import Plan
from alphaquant.rules import LEAVE

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

__all__ = ["UNQUANTIZED_BITS", "Candidate", "Setting", "parse_candidates"]

UNQUANTIZED_BITS = 16
_GROUPS = (128, 64, 32, 16, 8)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a rule of a plan must set to give a module its scheme; `bf16` leaves it."""

    wq: str
    group_size: int | None = None
    symmetric: bool = True
    aq: str = "bf16"

    @classmethod
    def of(cls, scheme: Scheme | None) -> Setting:
        """The setting that makes this scheme."""
        if scheme is None:
            return cls("bf16")
        fmt = scheme.format
        group_size = None if scheme.group_size == fmt.native_group else scheme.group_size
        return cls(fmt.name, group_size, scheme.symmetric, scheme.activation.value)

    def __str__(self) -> str:
        group = {None: "", -1: ":channel"}.get(self.group_size, f":g{self.group_size}")
        return self.wq + group + ("" if self.symmetric else ":asym")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate format; `text` is its shorthand with the group size written out."""

    text: str
    wq: str
    group_size: int
    symmetric: bool

    @property
    def bits(self) -> int:
        """Nominal bits of an element."""
        return UNQUANTIZED_BITS if self.wq in LEAVE else FORMATS[self.wq].bits

    def scheme(self, in_features: int, scale_dtype: torch.dtype) -> Scheme | None:
        """What it makes of a matrix with so many inputs; None leaves it unquantized.

        Raises:
            ValueError: its group size does not divide the inputs.
        """
        if self.wq in LEAVE:
            return None
        if self.group_size > 0 and in_features % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide {in_features} inputs")
        return Scheme(FORMATS[self.wq], self.group_size, symmetric=self.symmetric, scale_dtype=scale_dtype)


def parse_candidates(text: str, widths: Collection[int]) -> tuple[Candidate, ...]:
    """Candidates of a list such as `int2,int3:g64,mxfp4`, narrowest first.

    Integers and floats without a group size get the largest standard one that divides all `widths`, the inputs of the
    modules that can be quantized.

    Raises:
        PlanError: one is not known, or is given twice.
    """
    common = next((size for size in _GROUPS if all(width % size == 0 for width in widths)), -1)
    found: dict[str, Candidate] = {}
    for part in (p.strip() for p in text.split(",")):
        try:
            rule = Plan.from_shorthand(part).default
        except PlanError as error:
            raise PlanError(error.what, where=f"--formats, {part!r}", remedy=error.remedy) from None
        wq, symmetric = rule.wq or "bf16", rule.symmetric is not False
        own_group = re.search(r":(g[0-9]+|channel)(:|$)", part) is not None
        native = None if wq in LEAVE else FORMATS[wq].native_group
        group = rule.group_size if own_group and rule.group_size else native or common
        setting = Setting(wq, None if group == native or wq in LEAVE else group, symmetric)
        if str(setting) in found:
            raise PlanError(f"{part!r} is given twice", where="--formats", remedy="give each format once")
        found[str(setting)] = Candidate(str(setting), wq, group, symmetric)
    return tuple(sorted(found.values(), key=lambda c: c.bits))
