"""A default scheme and regular expressions for what differs, as humming and GPTQ checkpoints say it.

An engine holds the expressions against its own module names, of which some stand for several of the checkpoint's.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.engines import FUSED
from alphaquant.layouts.names import NamePatterns
from alphaquant.plan import ModuleKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from alphaquant.formats import Scheme

__all__ = ["DynamicRules", "Settings", "dynamic_rules", "ignored_modules"]

Settings = tuple[tuple[str, Any], ...]
"""A scheme in a checkpoint's own words: every key, since a rule overrides the default key by key."""

# What an engine loads as one module, by the member's last name; its name must share the members' scheme.
_FUSED_OF = {member: fused for fused, members in FUSED.items() for member in members}
_EXPERT = re.compile(r"(.+\.experts)\.[0-9]+\.[^.]+")
_NOT_LINEAR = (ModuleKind.NORM, ModuleKind.EMBEDDING)


class DynamicRules(NamedTuple):
    """The most common settings, rules ``+:REGEX`` for others and ``-:REGEX`` for none, and what is left, marked."""

    default: Settings
    rules: dict[str, dict[str, Any]]
    ignore: list[str]


def dynamic_rules(
    schemes: Mapping[str, Scheme | None],
    kinds: Mapping[str, ModuleKind] | None,
    settings_of: Callable[[Scheme], Settings],
) -> DynamicRules | None:
    """Rules over checkpoint names, and over fused modules (``qkv_proj``, ``experts``) whose members share a scheme.

    None when nothing is quantized.
    """
    counts = Counter(settings_of(scheme) for scheme in schemes.values() if scheme is not None)
    if not counts:
        return None
    default = counts.most_common(1)[0][0]
    fused = _fused_modules(schemes)
    patterns = NamePatterns([*schemes, *fused])
    members: dict[Settings, list[str]] = {}
    ignored = list(ignored_modules(schemes, kinds))
    for name, scheme in [*schemes.items(), *_agreed(fused)]:
        if scheme is not None:
            members.setdefault(settings_of(scheme), []).append(name)
        elif name in fused:
            ignored.append(name)
    rules: dict[str, dict[str, Any]] = {}
    for settings, names in members.items():
        if settings != default:
            rule = {key: value for key, value in settings if (key, value) not in default}
            rules |= {f"+:{pattern}": rule for pattern in patterns.cover(names)}
    rules |= {f"-:{pattern}": {} for pattern in patterns.cover(ignored)}
    return DynamicRules(default, rules, patterns.cover_marked(ignored))


def ignored_modules(schemes: Mapping[str, Scheme | None], kinds: Mapping[str, ModuleKind] | None) -> Iterator[str]:
    """The unquantized modules that an engine might take for linears to quantize."""
    for name, scheme in schemes.items():
        if scheme is None and (kinds is None or kinds.get(name) not in _NOT_LINEAR):
            yield name


def _fused_modules(schemes: Mapping[str, Scheme | None]) -> dict[str, list[Scheme | None]]:
    """The fused modules of which all members are there, with the members' schemes."""
    found: dict[str, list[Scheme | None]] = {}
    for name, scheme in schemes.items():
        parent, _, leaf = name.rpartition(".")
        if expert := _EXPERT.fullmatch(name):
            found.setdefault(expert[1], []).append(scheme)
        elif leaf in _FUSED_OF:
            found.setdefault(f"{parent}.{_FUSED_OF[leaf]}", []).append(scheme)

    def is_whole(name: str) -> bool:
        return len(found[name]) == len(FUSED.get(name.rpartition(".")[2], found[name]))

    return {name: members for name, members in found.items() if name not in schemes and is_whole(name)}


def _agreed(fused: Mapping[str, list[Scheme | None]]) -> list[tuple[str, Scheme | None]]:
    """Fused modules whose members share one scheme."""
    return [(name, members[0]) for name, members in fused.items() if len(set(members)) == 1]
