"""Writing an assignment as a plan: few patterns, coarse ones first, that resolve to exactly the assignment."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alphaquant.patterns import compile_pattern
from alphaquant.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from alphaquant.allocation.candidates import Setting
    from alphaquant.plan import Module

__all__ = ["write_plan"]

_PLACE = re.compile(r"model\.layers\.(?P<layer>[0-9]+)\.(?P<role>.+)")
_EXPERTS = ".experts.*"
_EXPERT = re.compile(r"(?<=\.experts\.)[0-9]+(?=\.)")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module stands: layer, role with `*` for the expert, and expert."""

    layer: int
    role: str
    expert: int | None


@dataclass(frozen=True, slots=True)
class _Draft:
    pattern: str
    setting: Setting


def write_plan(
    modules: Sequence[Module],
    settings: Mapping[str, Setting],
    *,
    comment: str | None = None,
    reason: Callable[[Sequence[str]], str | None] = lambda _: None,
) -> Plan:
    """The plan that gives each module of `settings` its setting and leaves every other one.

    Args:
        modules: all modules of the model.
        settings: by checkpoint name; must name every module that is quantizable by default.
        comment: of the whole plan.
        reason: comment of an override, from the names of the modules that it decides.
    """
    places: dict[_Place, Setting] = {}
    literal: list[_Draft] = []
    for module in modules:
        if module.name not in settings:
            continue
        found = _PLACE.fullmatch(module.alias)
        if found is None or not module.quantizable_by_default:
            literal.append(_Draft(module.alias, settings[module.name]))
            continue
        expert = _EXPERT.search(found["role"])
        role = _EXPERT.sub("*", found["role"])
        places[_Place(int(found["layer"]), role, int(expert[0]) if expert else None)] = settings[module.name]
    default = _majority(places.values())
    drafts = [*_drafts(places, default), *literal]
    owners = _owners(drafts, [module for module in modules if module.name in settings])
    used = [*settings.values()]
    varying = [
        key
        for key, usual in (("symmetric", True), ("aq", "bf16"))
        if any(getattr(setting, key) != usual for setting in used)
    ]
    overrides = []
    for index, draft in enumerate(drafts):
        if owners[index]:
            text = reason(owners[index])
            overrides.append(
                {"pattern": draft.pattern, **_keys(draft.setting, varying)} | ({"comment": text} if text else {})
            )
    head = {"comment": comment} if comment else {}
    return Plan.from_dict({**head, "default": _keys(default, varying), "overrides": overrides})


def _keys(setting: Setting, varying: Collection[str]) -> dict[str, str | int | bool]:
    """What a rule says; symmetry and activations only where they vary over the plan."""
    keys: dict[str, str | int | bool] = {"wq": setting.wq}
    if setting.wq == "bf16":
        return keys
    if setting.group_size is not None:
        keys["group_size"] = setting.group_size
    if "symmetric" in varying and setting.wq.startswith("int"):  # floats ignore what they inherit; integers would not
        keys["symmetric"] = setting.symmetric
    return keys | ({"aq": setting.aq} if "aq" in varying else {})


def _majority(settings: Iterable[Setting]) -> Setting:
    return Counter(settings).most_common(1)[0][0]


def _drafts(places: Mapping[_Place, Setting], default: Setting) -> list[_Draft]:
    """Rules for roles, then for roles of single layers, then for single experts; each level corrects the one above."""
    layers = sorted({place.layer for place in places})
    by_role: dict[str, list[Setting]] = {}
    by_layer: dict[int, dict[str, list[Setting]]] = {layer: {} for layer in layers}
    for place, setting in places.items():
        by_role.setdefault(place.role, []).append(setting)
        by_layer[place.layer].setdefault(place.role, []).append(setting)
    role_setting = {role: _majority(found) for role, found in by_role.items()}
    drafts = [
        _Draft(f"model.layers.*.{role}", setting)
        for role, setting in _joined(role_setting, dict.fromkeys(role_setting, default))
    ]
    layer_setting = {
        layer: {role: _majority(found) for role, found in roles.items()} for layer, roles in by_layer.items()
    }
    of_layers: dict[tuple[str, Setting], list[int]] = {}
    for layer in layers:
        for role, setting in _joined(layer_setting[layer], role_setting):
            of_layers.setdefault((role, setting), []).append(layer)
    # a rule for all of a block stands before those for parts of it
    for (role, setting), found in sorted(of_layers.items(), key=lambda item: (item[0][0].count("."), item[1][0])):
        drafts += [_Draft(f"model.layers.{glob}.{role}", setting) for glob in _globs(found, layers)]
    drafts += _expert_drafts(places, layer_setting, layers)
    return drafts


def _joined(wanted: Mapping[str, Setting], base: Mapping[str, Setting], within: str = "") -> list[tuple[str, Setting]]:
    """Roles whose setting is not that of `base`, as few as possible: a block that agrees is named as a whole.

    Blocks reach no further up than `within`.
    """
    found: list[tuple[str, Setting]] = []
    done: set[str] = set()
    blocks = sorted(
        {role[:i] for role in wanted for i, c in enumerate(role) if c == "." and within in role[:i]}, key=len
    )
    for block in blocks:
        members = [role for role in wanted if role.startswith(f"{block}.") and role not in done]
        settings = {wanted[role] for role in wanted if role.startswith(f"{block}.")}
        if len(settings) == 1 and sum(wanted[role] != base[role] for role in members) > 1:
            found.append((f"{block}.*", settings.pop()))
            done.update(members)
    found += [(role, wanted[role]) for role in wanted if role not in done and wanted[role] != base[role]]
    return found


def _expert_drafts(
    places: Mapping[_Place, Setting], layer_setting: Mapping[int, Mapping[str, Setting]], layers: Sequence[int]
) -> list[_Draft]:
    """Rules for experts that differ from the others of their layer; layers and experts with equal rules share them."""
    roles: dict[tuple[int, int], dict[str, Setting]] = {}
    experts: set[int] = set()
    for place, setting in places.items():
        if place.expert is not None:
            roles.setdefault((place.layer, place.expert), {})[place.role] = setting
            experts.add(place.expert)
    differing: dict[tuple[int, str, Setting], list[int]] = {}
    for (layer, expert), wanted in roles.items():
        for role, setting in _joined(wanted, layer_setting[layer], _EXPERTS):
            differing.setdefault((layer, role, setting), []).append(expert)
    of_layers: dict[tuple[str, Setting, tuple[int, ...]], list[int]] = {}
    for (layer, role, setting), found in differing.items():
        of_layers.setdefault((role, setting, tuple(found)), []).append(layer)
    drafts = []
    for (role, setting, members), at in sorted(of_layers.items(), key=lambda item: (item[1][0], item[0][0].count("."))):
        for glob in _globs(members, sorted(experts)):
            name = role.replace(_EXPERTS, f".experts.{glob}", 1)
            drafts += [_Draft(f"model.layers.{layer}.{name}", setting) for layer in _globs(at, layers)]
    return drafts


def _globs(wanted: Sequence[int], universe: Sequence[int]) -> list[str]:
    """Globs of decimal numbers that match all of `wanted` and nothing else of `universe`."""
    if set(wanted) == set(universe):
        return ["*"]
    tails: dict[str, set[str]] = {}
    for number in wanted:
        tails.setdefault(str(number)[:-1], set()).add(str(number)[-1])
    heads: dict[str, list[str]] = {}
    for head, digits in tails.items():
        present = {str(n)[-1] for n in universe if str(n)[:-1] == head}
        heads.setdefault("?" if digits == present and len(digits) > 1 else _class(digits), []).append(head)
    globs = []
    for tail, found in heads.items():
        single = {head for head in found if len(head) == 1}
        globs += [head + tail for head in found if len(head) != 1]
        globs += [_class(single) + tail] if single else []
    return globs


def _class(digits: set[str]) -> str:
    """`3`, `[0-37]`: a glob of one character."""
    runs: list[list[int]] = []
    for digit in sorted(map(int, digits)):
        if runs and digit == runs[-1][-1] + 1:
            runs[-1].append(digit)
        else:
            runs.append([digit])
    # a plan refuses a range beside other digits, which reads like a range of numbers
    text = f"{runs[0][0]}-{runs[0][-1]}" if len(runs) == 1 and len(digits) > 2 else "".join(sorted(digits))
    return text if len(digits) == 1 else f"[{text}]"


def _owners(drafts: Sequence[_Draft], modules: Sequence[Module]) -> list[list[str]]:
    """For each rule the modules that it decides: those that no later rule matches."""
    patterns = [(index, compile_pattern(draft.pattern)) for index, draft in enumerate(drafts)]
    owners: list[list[str]] = [[] for _ in drafts]
    for module in modules:
        for index, pattern in reversed(patterns):
            if pattern.matches(module.alias) and (module.quantizable_by_default or pattern.names_last):
                owners[index].append(module.name)
                break
    return owners
