"""The rules of an engine, and what they make of a plan: what is tied, what is refused, and the remedy."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.engines.parts import FUSED_OF, GATES, LINEAR, leaf
from alphaquant.errors import PlanError
from alphaquant.formats import Activation, ElementKind, ScaleKind
from alphaquant.plan import ModuleKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from alphaquant.engines.parts import Schemes
    from alphaquant.formats import Scheme
    from alphaquant.plan import Module

__all__ = ["NAMELESS_ATTENTION", "Legalized", "Profile", "TieGroup", "Violation"]

NAMELESS_ATTENTION = ("deepseek",)
"""Families whose attention vLLM 0.32 builds without giving its linears their names: rules by name miss them."""

_ATTENTION = "*.self_attn.*"
_LEAVE = 'leave it with "skip": true, or give it another format'


class TieGroup(NamedTuple):
    """Modules that must share one scheme, or all stay unquantized.

    Attributes:
        names: their checkpoint names.
        patterns: globs over canonical names that mean exactly these.
        why: what the engine makes of them.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    why: str


class Violation(NamedTuple):
    """What an engine would not take, or would get silently wrong.

    Attributes:
        names: the modules concerned, by checkpoint name.
        rule: the engine's rule, and what it meets.
        remedy: what to do about it.
    """

    names: tuple[str, ...]
    rule: str
    remedy: str

    @property
    def module(self) -> str:
        """The first module concerned."""
        return self.names[0]

    @property
    def num_modules(self) -> int:
        """How many are."""
        return len(self.names)

    def __str__(self) -> str:
        more = f" and {self.num_modules - 1} more" if self.num_modules > 1 else ""
        return f"{self.module}{more}: {self.rule}; {self.remedy}"


class Legalized(NamedTuple):
    """Overrides that make a plan legal when they are added at its end, and what each of them changes, in words."""

    overrides: tuple[dict[str, Any], ...]
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """The rules of one engine, or of several at once.

    Attributes:
        name: its name in options.
        layouts: for every layout that it reads, in order of preference, why it would not take a scheme on a module
            under so many tensor-parallel GPUs, or None.
        fuses: it loads q/k/v and gate/up as one matrix each.
        experts_of: experts share one scheme by "layer", or over the whole "model".
        nameless_attention: it cannot tell attention linears apart, so that they share one scheme over the whole model.
        capabilities: the least CUDA compute capability (80 is 8.0) of formats that need more than the others.
    """

    name: str
    layouts: Mapping[str, Callable[[Scheme, Module, int], str | None]]
    fuses: bool
    experts_of: str
    nameless_attention: bool = False
    capabilities: Callable[[Scheme], int] = field(default=lambda scheme: 0)  # noqa: ARG005

    def on(self, family: str) -> Profile:
        """The profile for models of that family."""
        return replace(self, nameless_attention=self.fuses and family in NAMELESS_ATTENTION)

    def tie_groups(self, modules: Sequence[Module]) -> list[TieGroup]:
        """The sets of modules that must share one scheme; modules in none of them are free."""
        found: dict[str, list[Module]] = {}
        for module in modules:
            key = self._tie(module)
            if key is not None:
                found.setdefault(key, []).append(module)
        return [self._group(key, members) for key, members in found.items() if len(members) > 1]

    def allowed(
        self, scheme: Scheme | None, module: Module, *, tp: int = 1, layout: str | None = None, gpu: int | None = None
    ) -> str | None:
        """Why the engine would not compute this scheme on this module, or None when it does.

        Args:
            scheme: None is unquantized, which every engine takes.
            module: the module.
            tp: GPUs of tensor parallelism.
            layout: the layout's name; None asks whether any will do.
            gpu: CUDA compute capability times ten; None asks for none in particular.
        """
        if scheme is None or layout == "dense":
            return None
        if gpu is not None and gpu < self.capabilities(scheme):
            need = self.capabilities(scheme)
            return f"{scheme} needs a GPU of compute capability {need / 10}, and this one has {gpu / 10}"
        if layout is not None and layout not in self.layouts:
            return f"{self.name} does not read the {layout} layout"
        reasons: list[str] = []
        for name in self.layouts if layout is None else (layout,):
            reason = self.layouts[name](scheme, module, tp)
            if reason is None:
                return None
            reasons.append(reason)
        return "; ".join(dict.fromkeys(reasons))

    def violations(
        self,
        schemes: Schemes,
        modules: Sequence[Module],
        *,
        tp: int = 1,
        layout: str | None = None,
        gpu: int | None = None,
    ) -> list[Violation]:
        """Everything that the engine would refuse, or get silently wrong; empty where the plan is legal.

        Args:
            schemes: for every module its scheme, None where it is unquantized.
            modules: the modules of the model.
            tp: GPUs of tensor parallelism.
            layout: the layout that it will be written in; None: that of the engine's layouts that breaks fewest rules.
            gpu: CUDA compute capability times ten.
        """
        if layout == "dense":
            return []
        mixed = [self._mixed(group, schemes, modules, tp) for group in self.tie_groups(modules)]
        ties = [violation for violation in mixed if violation is not None]
        names = (*self.layouts,) if layout is None else (layout,)
        refused = [self._refused(schemes, modules, tp, name, gpu) for name in names]
        return ties + min(refused, key=lambda found: sum(violation.num_modules for violation in found))

    def best_layout(
        self, schemes: Schemes, modules: Sequence[Module], *, tp: int = 1, gpu: int | None = None
    ) -> str | None:
        """The first of the engine's layouts in which it takes every module, or None."""
        quantized = _distinct(schemes, modules)

        def takes(layout: str) -> bool:
            return all(self.allowed(s, m, tp=tp, layout=layout, gpu=gpu) is None for s, m in quantized)

        return next(filter(takes, self.layouts), None)

    def legalize(self, schemes: Schemes, modules: Sequence[Module], *, tp: int = 1) -> Legalized:
        """Lift modules that must share a scheme to the best of theirs, and leave what must stay unquantized.

        Best is unquantized, then the most bits a weight. What is still not allowed remains a violation.
        """
        by_name = {module.name: module for module in modules}
        overrides: list[dict[str, Any]] = []
        changes: list[str] = []
        for group in self.tie_groups(modules):
            found = Counter(schemes[name] for name in group.names)
            if len(found) == 1:
                continue
            best = self._best(list(found), [by_name[name] for name in group.names], tp)
            raised = sum(count for scheme, count in found.items() if scheme != best)
            comment = f"{raised} of {len(group.names)} raised to {_show(best)}: {group.why}"
            overrides += [_override(pattern, best, f"{self.name}: {group.why}") for pattern in group.patterns]
            changes.append(f"{', '.join(group.patterns)}: {comment}")
        for module in modules:
            if module.kind in GATES and schemes[module.name] is not None:
                why = f"{self.name} computes it unquantized"
                overrides.append(_override(module.name, None, why))
                changes.append(f"{module.name}: left unquantized, {why}")
        return Legalized(tuple(overrides), tuple(changes))

    def _tie(self, module: Module) -> str | None:
        """The pattern-like key of what the module is loaded with."""
        if module.kind is ModuleKind.EXPERT:
            prefix = module.alias[: module.alias.rindex(".experts.")] + ".experts.*"
            return prefix if self.experts_of == "layer" else "*.mlp.experts.*"
        if self.nameless_attention and module.kind is ModuleKind.ATTENTION:
            return _ATTENTION
        parent, _, last = module.alias.rpartition(".")
        if self.fuses and module.kind in LINEAR and last in FUSED_OF:
            return f"{parent}.{FUSED_OF[last]}"
        return None

    def _group(self, key: str, members: Sequence[Module]) -> TieGroup:
        names = tuple(module.name for module in members)
        if key == _ATTENTION:
            return TieGroup(names, (key,), f"{self.name} cannot tell the attention linears of this family apart")
        if key.endswith(".*"):
            scope = "of a layer" if self.experts_of == "layer" else "of all layers"
            return TieGroup(names, (key,), f"{self.name} gives all experts {scope} the scheme of the first one")
        leaves = "/".join(leaf(module) for module in members)
        return TieGroup(names, tuple(m.alias for m in members), f"{self.name} loads {leaves} as one matrix")

    def _mixed(self, group: TieGroup, schemes: Schemes, modules: Sequence[Module], tp: int) -> Violation | None:
        found = Counter(schemes[name] for name in group.names)
        if len(found) == 1:
            return None
        members = set(group.names)
        best = self._best(list(found), [module for module in modules if module.name in members], tp)
        shown = " and ".join(_show(scheme) for scheme in sorted(found, key=_rank))
        odd = next(name for name in group.names if schemes[name] != best)
        remedy = f"give {', '.join(group.patterns)} one scheme, such as {_show(best)}, or pass --legalize"
        names = (odd, *(name for name in group.names if name != odd))
        return Violation(names, f"{group.why}, and here they are {shown}", remedy)

    def _best(self, found: Sequence[Scheme | None], members: Sequence[Module], tp: int) -> Scheme | None:
        """The best of these schemes that every member can have, else the best of them."""
        ranked = sorted(found, key=_rank, reverse=True)
        return next((scheme for scheme in ranked if self._fits(scheme, members, tp)), ranked[0])

    def _fits(
        self,
        scheme: Scheme | None,
        members: Sequence[Module],
        tp: int,
        layout: str | None = None,
        gpu: int | None = None,
    ) -> bool:
        """Whether every one of these modules can have the scheme."""
        if scheme is None:
            return True
        shapes = {(m.kind, leaf(m), m.out_features, m.in_features): m for m in members}.values()
        return all(
            _divides(scheme, m) and self.allowed(scheme, m, tp=tp, layout=layout, gpu=gpu) is None for m in shapes
        )

    def _refused(
        self, schemes: Schemes, modules: Sequence[Module], tp: int, layout: str, gpu: int | None
    ) -> list[Violation]:
        """One violation for each reason and scheme."""
        found: dict[tuple[str, Scheme], list[Module]] = {}
        for module in modules:
            scheme = schemes[module.name]
            reason = self.allowed(scheme, module, tp=tp, layout=layout, gpu=gpu)
            if scheme is not None and reason is not None:
                found.setdefault((reason, scheme), []).append(module)
        elsewhere = self.best_layout(schemes, modules, tp=tp, gpu=gpu) if found else None
        return [
            Violation(
                tuple(module.name for module in members),
                reason,
                self._other_scheme(scheme, members, tp, layout, gpu)
                or (f"write it with --format {elsewhere}" if elsewhere is not None else _LEAVE),
            )
            for (reason, scheme), members in found.items()
        ]

    def _other_scheme(
        self, scheme: Scheme, members: Sequence[Module], tp: int, layout: str, gpu: int | None
    ) -> str | None:
        """What makes it the nearest scheme that these modules can have: another group, other inputs; None: nothing."""
        for other in _neighbours(scheme):
            if self._fits(other, members, tp, layout, gpu):
                keys = [f'"group_size": {other.group_size}'] if other.group_size != scheme.group_size else []
                keys += [f'"aq": "{other.activation.value}"'] if other.activation is not scheme.activation else []
                return f"give it {' and '.join(keys)}"
        return None


def _distinct(schemes: Schemes, modules: Sequence[Module]) -> list[tuple[Scheme, Module]]:
    """One module for each scheme, kind, last name and shape: the rules look at nothing else."""
    found: dict[tuple[Any, ...], tuple[Scheme, Module]] = {}
    for module in modules:
        scheme = schemes[module.name]
        if scheme is not None:
            key = (scheme, module.kind, leaf(module), module.out_features, module.in_features)
            found.setdefault(key, (scheme, module))
    return list(found.values())


def _show(scheme: Scheme | None) -> str:
    return "unquantized" if scheme is None else str(scheme)


def _rank(scheme: Scheme | None) -> tuple[float, ...]:
    """Unquantized is best, then bits a weight; a zero point counts, and unrounded inputs break a tie."""
    if scheme is None:
        return (float("inf"),)
    group = scheme.group_size if scheme.group_size > 0 else 1 << 20
    extra = (scheme.scale_bits + (0 if scheme.symmetric else scheme.format.bits)) / group
    return (scheme.format.bits + extra, float(scheme.activation is Activation.BF16))


def _neighbours(scheme: Scheme) -> Iterator[Scheme]:
    """Schemes of the same format with other groups, then with other inputs too, nearest first."""
    if scheme.format.scale is not ScaleKind.MODEL:
        return
    for activation in dict.fromkeys((scheme.activation, *Activation)):
        for group_size in dict.fromkeys((scheme.group_size, 128, 64, 32, -1)):
            with suppress(PlanError):  # these do not go together
                other = replace(scheme, group_size=group_size, activation=activation)
                if other != scheme:
                    yield other


def _divides(scheme: Scheme, module: Module) -> bool:
    return scheme.group_size == -1 or module.in_features % scheme.group_size == 0


def _override(pattern: str, scheme: Scheme | None, comment: str) -> dict[str, Any]:
    if scheme is None:
        return {"pattern": pattern, "skip": True, "comment": comment}
    is_int = scheme.format.kind is ElementKind.INT
    return {
        "pattern": pattern,
        "wq": scheme.format.name,
        "aq": scheme.activation.value,
        "group_size": scheme.group_size,
        **({"symmetric": scheme.symmetric} if is_int else {}),
        "skip": False,
        "comment": comment,
    }
