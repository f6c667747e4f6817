"""What a violation tells people to do is done here, word for word, and held against the rules again."""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.engines import PROFILES, Profile
from alphaquant.errors import PlanError
from alphaquant.formats import FORMATS, Activation, Scheme
from alphaquant.patterns import compile_pattern

from .test_profiles import modules_of

FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "deepseek", "deepseek_v2", "llama")
WIDE = {"hidden_size": 2048, "intermediate_size": 1408, "num_attention_heads": 16, "num_key_value_heads": 16}
LAYOUTS = ("compressed-tensors", "humming", "gptq")


def every_scheme():
    found = []
    choices = itertools.product(FORMATS.values(), (-1, 8, 16, 32, 64, 128), (True, False), Activation)
    for fmt, group, symmetric, inputs in choices:
        with suppress(PlanError):  # these do not go together
            found.append(Scheme(fmt, group, symmetric=symmetric, activation=inputs))
    return found


SCHEMES = every_scheme()
BY_NAME = {str(scheme): scheme for scheme in SCHEMES} | {"unquantized": None}
# by what the modules of a plan differ
BY = (
    lambda _: 0,
    lambda m: m.alias.rpartition(".")[2],
    lambda m: ".layers.1." in m.alias,
    lambda m: ".experts.3." in m.alias,
    lambda m: m.kind,
)


class Case(NamedTuple):
    """A plan, and where it is to be served."""

    profile: Profile
    modules: list
    schemes: dict
    tp: int
    layout: str | None
    gpu: int | None

    def __repr__(self):
        plan = {name: str(scheme) for name, scheme in self.schemes.items() if scheme is not None}
        return f"{self.profile.name} {self.layout} tp{self.tp} gpu{self.gpu} {plan}"

    def violations(self):
        where = {"tp": self.tp, "layout": self.layout, "gpu": self.gpu}
        return self.profile.violations(self.schemes, self.modules, **where)


@st.composite
def cases(draw):
    family, by = draw(st.sampled_from(FAMILIES)), draw(st.sampled_from(BY))
    modules = modules_of(family, **draw(st.sampled_from([{}, WIDE])))
    chosen: dict = {}
    schemes = {}
    for module in modules:
        key = by(module)
        if key not in chosen:
            chosen[key] = draw(st.sampled_from([None, *SCHEMES]))
        scheme = chosen[key]
        fits = scheme is not None and (scheme.group_size == -1 or module.in_features % scheme.group_size == 0)
        schemes[module.name] = scheme if fits and module.kind.value != "norm" else None
    return Case(
        PROFILES[draw(st.sampled_from(sorted(PROFILES)))].on(family),
        modules,
        schemes,
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([None, *LAYOUTS])),
        draw(st.sampled_from([None, 75, 80, 90])),
    )


def done(case, violation):
    """The case after a remedy was carried out on the modules of its violation."""
    changed, words = dict(case.schemes), violation.remedy
    if tied := re.fullmatch(r"give (.+) one scheme, such as (.+), or pass --legalize", words):
        patterns = [compile_pattern(pattern) for pattern in tied[1].split(", ")]
        reached = [m.name for m in case.modules if any(pattern.matches(m.alias) for pattern in patterns)]
        assert set(reached) == set(violation.names)
        return case._replace(schemes=changed | dict.fromkeys(reached, BY_NAME[tied[2]]))
    if layout := re.fullmatch(r"write it with --format (\S+)", words):
        return case._replace(layout=layout[1])
    keys = re.fullmatch(r"give it (.+)", words)
    assert keys or words.startswith('leave it with "skip": true'), words
    for name in violation.names:
        changed[name] = None
        if keys:
            size, inputs = (re.search(rf'"{key}": "?([\w-]+)', keys[1]) for key in ("group_size", "aq"))
            changed[name] = replace(
                case.schemes[name],
                **({"group_size": int(size[1])} if size else {}),
                **({"activation": Activation(inputs[1])} if inputs else {}),
            )
            module = next(m for m in case.modules if m.name == name)
            assert changed[name].group_size == -1 or module.in_features % changed[name].group_size == 0
    return case._replace(schemes=changed)


@settings(max_examples=150)
@given(cases())
def test_a_remedy_does_away_with_its_violation(case):
    for violation in case.violations():
        after = {(v.rule, name) for v in done(case, violation).violations() for name in v.names}
        assert after.isdisjoint((violation.rule, name) for name in violation.names), violation


@settings(max_examples=150)
@given(cases())
def test_who_does_as_told_ends_with_a_legal_plan(case):
    """Whoever has agreed on one scheme for what is tied, and then on one that is computed, may have to agree anew."""
    for _ in range(4):
        found = case.violations()
        tied = [violation for violation in found if "one scheme" in violation.remedy]
        elsewhere = [violation for violation in found if "--format" in violation.remedy]
        for violation in tied or elsewhere[:1] or found:
            case = done(case, violation)
    assert case.violations() == []
