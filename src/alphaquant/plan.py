"""The plan: one JSON file of glob rules, resolved once into an explicit table of module and scheme."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, field_validator

from alphaquant.errors import PlanError
from alphaquant.formats import FORMATS, Activation, ElementKind, ScaleKind, Scheme, parse_format
from alphaquant.patterns import compile_pattern, generalise, unknown_name, unmatched
from alphaquant.rules import ACTIVATIONS, LEAVE, Override, Rule, read_json, read_text, validation_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["Explanation", "Module", "ModuleKind", "Override", "Plan", "ResolvedPlan", "Rule", "Step", "plan_schema"]

_DEFAULT_WQ = "int4"
_DEFAULT_GROUP_SIZE = 128
_STANDARD_GROUPS = (128, 64, 32, 16, 8)
_SHORTHAND: dict[str, tuple[str, int | str]] = {
    "channel": ("group_size", -1),
    "sym": ("symmetric", True),
    "asym": ("symmetric", False),
    "a-int8": ("aq", "int8"),
    "a-fp8": ("aq", "fp8"),
}


class ModuleKind(Enum):
    """The role of a module in a decoder."""

    ATTENTION = "attention"
    MLP = "mlp"
    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    ROUTER = "router"
    SHARED_EXPERT_GATE = "shared_expert_gate"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"


_QUANTIZABLE = frozenset({ModuleKind.ATTENTION, ModuleKind.MLP, ModuleKind.EXPERT, ModuleKind.SHARED_EXPERT})


@dataclass(frozen=True, slots=True)
class Module:
    """One weight of a model: its checkpoint name without `.weight`, its canonical name, its role and [O, I] shape."""

    name: str
    alias: str
    kind: ModuleKind
    out_features: int
    in_features: int

    @property
    def quantizable_by_default(self) -> bool:
        """False for what a plan must name literally: router, gates, embeddings, head; and for norms."""
        return self.kind in _QUANTIZABLE


def _filled(rule: Rule) -> Rule:
    """The default rule with omitted keys made explicit; a block format's group size stays open."""
    wq = rule.wq or _DEFAULT_WQ
    is_block = wq in FORMATS and FORMATS[wq].native_group is not None
    group_size = rule.group_size or (None if is_block else _DEFAULT_GROUP_SIZE)
    return Rule(wq=wq, aq=rule.aq or "bf16", group_size=group_size, symmetric=rule.symmetric is not False)


class Plan(BaseModel):
    """A default rule and ordered overrides: the last match wins, key by key."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, populate_by_name=True)

    schema_url: StrictStr | None = Field(default=None, alias="$schema", description="The schema, for editors.")
    comment: StrictStr | None = Field(default=None, description="For people; it changes nothing.")
    default: Rule = Field(default=_filled(Rule()), description="What holds for every module that can be quantized.")
    overrides: tuple[Override, ...] = Field(default=(), description="Rules in order: the last match wins, key by key.")

    @field_validator("default")
    @classmethod
    def _fill(cls, rule: Rule) -> Rule:
        return _filled(rule)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: it cannot be read, or is not a plan.
        """
        return cls.parse(read_text(path), str(path))

    @classmethod
    def parse(cls, text: str, where: str = "plan") -> Plan:
        """Read a plan from JSON text; `where` names its source in errors.

        Raises:
            PlanError: it is not JSON, or not a plan.
        """
        return cls.from_dict(read_json(text, where), where)

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> Plan:
        """Check a parsed JSON object; `where` names its source in errors.

        Raises:
            PlanError: it is not a plan.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            keys = {"": _json_keys(cls), "default": _json_keys(Rule), "overrides": _json_keys(Override)}
            raise validation_error(error, where, keys) from None

    @classmethod
    def from_shorthand(cls, text: str) -> Plan:
        """A plan without overrides from `FORMAT[:gN | :channel][:asym | :sym][:a-int8 | :a-fp8]`: `int3:g64:asym`.

        Raises:
            PlanError: a part is not known, or is given twice.
        """
        where, (wq, *parts) = f"the shorthand {text!r}", text.split(":")
        keys: dict[str, Any] = {}
        for part in parts:
            if part in _SHORTHAND:
                key, value = _SHORTHAND[part]
            elif re.fullmatch("g[0-9]{1,9}", part):
                key, value = "group_size", int(part[1:])
            else:
                raise PlanError(
                    f"unknown part {part!r}",
                    where=where,
                    remedy="write FORMAT:g64, :channel, :asym, :sym, :a-int8, :a-fp8",
                )
            if key in keys:
                raise PlanError(f"{part!r} sets {key} a second time", where=where, remedy="give it once")
            keys[key] = value
        return cls.from_dict({"default": {"wq": wq, **keys}}, where)

    def to_json(self) -> str:
        """The canonical text: the default's omitted keys filled in, other omitted keys left out, a fixed order."""
        data = self.model_dump(by_alias=True, exclude_none=True)
        data["overrides"] = [{"pattern": rule.pop("pattern"), **rule} for rule in data["overrides"]]
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"

    def resolve(self, modules: Sequence[Module], *, scale_dtype: torch.dtype = torch.bfloat16) -> ResolvedPlan:
        """Give every module its scheme, or None to leave it; `scale_dtype` is the storage type of model scales.

        Raises:
            PlanError: a pattern matches nothing that any family has, a norm would be quantized, or a group size does
                not fit.
        """
        matched, warnings = _match(self, modules)
        schemes: dict[str, Scheme | None] = {}
        rules: dict[str, tuple[int, ...]] = {}
        chosen: dict[tuple[tuple[int, ...], bool], _Choice] = {}
        misfits: list[tuple[Module, _Choice]] = []
        odd_blocks: dict[Scheme, list[str]] = {}
        for module, found in zip(modules, matched, strict=True):
            applied = tuple(found)
            rules[module.name] = applied
            schemes[module.name] = None
            key = (applied, module.quantizable_by_default)
            if key not in chosen:
                chosen[key] = _choose(self, applied, scale_dtype, module)
            choice = chosen[key]
            if choice.scheme is None or (not module.quantizable_by_default and not _opts_in(self, applied)):
                continue
            schemes[module.name] = choice.scheme
            if choice.scheme.group_size != -1 and module.in_features % choice.scheme.group_size:
                misfits.append((module, choice))
            fmt = choice.scheme.format
            if fmt.scale is ScaleKind.E8M0 and choice.scheme.group_size != fmt.native_group:
                odd_blocks.setdefault(choice.scheme, []).append(module.name)
        if misfits:
            raise _misfit(self, misfits)
        notes = tuple(_odd_block_note(scheme, names) for scheme, names in odd_blocks.items())
        return ResolvedPlan(schemes, tuple(warnings), notes, self, {module.name: module for module in modules}, rules)


@dataclass(frozen=True, slots=True)
class Step:
    """One rule that bears on a module: its number, "default" or "protected", and the keys that it sets."""

    rule: int | Literal["default", "protected"]
    pattern: str | None
    keys: Mapping[str, str | int | bool]
    comment: str | None = None

    def __str__(self) -> str:
        head = f"overrides[{self.rule}] {self.pattern}" if isinstance(self.rule, int) else self.rule
        keys = ", ".join(f"{key} = {json.dumps(value)}" for key, value in self.keys.items())
        return head + (f": {keys}" if keys else "") + (f"  ({self.comment})" if self.comment else "")


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a module has its scheme: every rule that bears on it, in order."""

    module: Module
    scheme: Scheme | None
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        head = f"{self.module.name} ({self.module.kind.value}): {self.scheme or 'unquantized'}"
        return "\n".join([head, *(f"  {step}" for step in self.steps)])


@dataclass(frozen=True)
class ResolvedPlan:
    """The table of every module, by checkpoint name and in order, with its scheme; None is left unquantized."""

    schemes: Mapping[str, Scheme | None]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    plan: Plan = field(repr=False)
    _modules: Mapping[str, Module] = field(repr=False)
    _rules: Mapping[str, tuple[int, ...]] = field(repr=False)

    def explain(self, name: str) -> Explanation:
        """Every rule that bears on the module of this checkpoint name or alias.

        Raises:
            PlanError: the model has no such module.
        """
        name = name.removesuffix(".weight")
        module = self._modules.get(name) or next((m for m in self._modules.values() if m.alias == name), None)
        if module is None:
            raise unknown_name(name, (n for m in self._modules.values() for n in (m.name, m.alias)))
        steps = [Step("default", None, self.plan.default.settings())]
        if not module.quantizable_by_default and not _opts_in(self.plan, self._rules[module.name]):
            why = "a vector" if module.kind is ModuleKind.NORM else "only a rule that names it literally applies"
            steps.append(Step("protected", None, {}, f"{module.kind.value}: {why}"))
        for i in self._rules[module.name]:
            rule = self.plan.overrides[i]
            steps.append(Step(i, rule.pattern, rule.settings(), rule.comment))
        return Explanation(module, self.schemes[module.name], tuple(steps))


# --- Which rules bear on which module -------------------------------------------------------------------------------


def _match(plan: Plan, modules: Sequence[Module]) -> tuple[list[list[int]], list[str]]:
    """The rules that bear on each module, in order, and the warnings."""
    matched: list[list[int]] = [[] for _ in modules]
    warnings: list[str] = []
    by_name: dict[str, list[int]] = {}
    for m, module in enumerate(modules):
        for name in {module.name, module.alias}:
            by_name.setdefault(name, []).append(m)
    for i, rule in enumerate(plan.overrides):
        pattern = compile_pattern(rule.pattern)
        if pattern.literal is not None:  # an allocator's plan names thousands of modules
            found = by_name.get(pattern.literal, [])
        else:
            matches = pattern.matches
            found = [
                m
                for m, module in enumerate(modules)
                if matches(module.name) or (module.alias != module.name and matches(module.alias))
            ]
        if not found:
            warnings.append(unmatched(pattern, f"overrides[{i}].pattern", by_name))
        is_effective = False
        for m in found:
            if pattern.names_last or modules[m].quantizable_by_default:
                is_effective = True
                matched[m].append(i)
                if modules[m].kind is ModuleKind.NORM and not rule.leaves:
                    what = f"{modules[m].name} is a norm, a vector that cannot be quantized"
                    raise PlanError(what, where=_place(plan, i), remedy='set "skip": true, or narrow the pattern')
        if found and not is_effective and not rule.leaves:
            kind, name = modules[found[0]].kind.value, modules[found[0]].name
            warnings.append(
                f"{_place(plan, i)} has no effect: it matches only protected modules such as {name} ({kind}), which "
                "only a pattern with a literal last segment reaches"
            )
    return matched, warnings


def _opts_in(plan: Plan, applied: Iterable[int]) -> bool:
    """Whether rules that name a protected module ask for it to be quantized; `aq` alone does not."""
    return any(plan.overrides[i].settings().keys() - {"aq"} for i in applied)


def _place(plan: Plan, i: int) -> str:
    return "default" if i < 0 else f"overrides[{i}] {plan.overrides[i].pattern!r}"


# --- What the rules amount to ---------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    scheme: Scheme | None
    group_rule: int  # the override that decided the group size; -1 is the default rule


def _choose(plan: Plan, applied: Sequence[int], scale_dtype: torch.dtype, module: Module) -> _Choice:
    """Merge the default and these overrides key by key; `module` is the first that they make.

    The group size is the one set by the rule that won `wq` or by a later one; else the format's own block; else the
    last one set before.
    """
    wq, wq_rule = _last(plan, applied, "wq")
    group_size, group_rule = _last(plan, applied, "group_size")
    aq, aq_rule = _last(plan, applied, "aq")
    symmetric, skip = _last(plan, applied, "symmetric")[0], _last(plan, applied, "skip")[0]
    if skip or wq in LEAVE:
        return _Choice(None, wq_rule)
    fmt = parse_format(wq)
    assert fmt is not None
    if fmt.native_group is not None and (group_size is None or group_rule < wq_rule):
        group_size, group_rule = fmt.native_group, wq_rule
    elif group_size is None:
        group_size = _DEFAULT_GROUP_SIZE
    if fmt.has_one_group and group_size != fmt.native_group:
        what = f"group_size {group_size} for {module.name}, which is {fmt.name} with blocks of {fmt.native_group}"
        raise PlanError(what, where=_place(plan, group_rule), remedy="narrow the pattern, or choose another format")
    is_symmetric = symmetric is not False or fmt.kind is not ElementKind.INT
    activation = ACTIVATIONS[aq] if module.quantizable_by_default else Activation.BF16
    if activation is not ACTIVATIONS[aq] and aq_rule >= 0:
        what = f'"aq": "{aq}" for {module.name}: the inputs of a {module.kind.value} are never rounded'
        raise PlanError(what, where=_place(plan, aq_rule), remedy="omit aq there")
    try:
        scheme = Scheme(fmt, group_size, symmetric=is_symmetric, scale_dtype=scale_dtype, activation=activation)
    except PlanError as error:
        where = _place(plan, max(wq_rule, aq_rule, group_rule))
        raise PlanError(f"{error.what}, for {module.name}", where=where, remedy=error.remedy) from None
    return _Choice(scheme, group_rule)


def _last(plan: Plan, applied: Sequence[int], key: str) -> tuple[Any, int]:
    """The last value that a rule sets, and which override that was; of the default rule and -1 where none does."""
    for i in reversed(applied):
        value = getattr(plan.overrides[i], key)
        if value is not None:
            return value, i
    return getattr(plan.default, key, None), -1


def _misfit(plan: Plan, misfits: Sequence[tuple[Module, _Choice]]) -> PlanError:
    module, (scheme, group_rule) = misfits[0]
    assert scheme is not None
    more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
    what = f"group size {scheme.group_size} does not divide the {module.in_features} inputs of {module.name}{more}"
    fitting = next((size for size in _STANDARD_GROUPS if module.in_features % size == 0), -1)
    pattern = f'"pattern": "{generalise(module.name)}"'
    if scheme.format.has_one_group:
        remedy = f'add at the end {{{pattern}, "skip": true}}, or give it another format than {scheme.format.name}'
    else:
        why = "the largest standard size that divides" if fitting > 0 else "one scale a row; no standard size divides"
        remedy = f'add at the end {{{pattern}, "group_size": {fitting}}}: {why} {module.in_features}'
    return PlanError(what, where=_place(plan, group_rule), remedy=remedy)


def _odd_block_note(scheme: Scheme, names: Sequence[str]) -> str:
    block = f"block {scheme.group_size}" if scheme.group_size > 0 else "a whole row"
    count = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{count}: {scheme} is an E8M0-scaled float of {block}: served through humming only, not OCP MX"


# --- Schema ---------------------------------------------------------------------------------------------------------


def _json_keys(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def plan_schema() -> dict[str, Any]:
    """The JSON schema of a plan file, for editors."""
    kinds: dict[str, dict[str, Any]] = {
        "wq": {"enum": [*FORMATS, *LEAVE]},
        "aq": {"enum": list(ACTIVATIONS)},
        "group_size": {"type": "integer", "anyOf": [{"minimum": 1}, {"const": -1}]},
        "symmetric": {"type": "boolean"},
        "skip": {"type": "boolean"},
        "pattern": {"type": "string", "minLength": 1},
    }

    def properties(model: type[BaseModel]) -> dict[str, Any]:
        fields = ((info.alias or name, info.description) for name, info in model.model_fields.items())
        return {key: {**kinds.get(key, {"type": "string"}), "description": text} for key, text in fields}

    def closed(model: type[BaseModel], **more: Any) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": False, **more, "properties": properties(model)}

    kinds["default"] = closed(Rule)
    kinds["overrides"] = {"type": "array", "items": closed(Override, required=["pattern"])}
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": "AlphaQuant plan", **closed(Plan)}
