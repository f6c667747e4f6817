"""Plans as written resolve to exactly what was meant, in few rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.allocation.candidates import Setting
from alphaquant.allocation.write import write_plan
from alphaquant.models import detect
from alphaquant.plan import Plan
from pipeline.tiny import CONFIGS

SETTINGS = (
    Setting("int2", 32),
    Setting("int4", 16),
    Setting("int4", 32, symmetric=False),
    Setting("mxfp4"),
    Setting("int8", -1),
    Setting("bf16"),
)


def modules_of(family, **overrides):
    return list(detect(CONFIGS[family] | overrides).modules())


def resolved(plan, modules):
    schemes = Plan.parse(plan.to_json()).resolve(modules, scale_dtype=torch.bfloat16).schemes
    return {name: Setting.of(scheme) for name, scheme in schemes.items()}


@settings(deadline=None, max_examples=40)
@given(
    family=st.sampled_from(["olmoe", "llama", "mixtral", "qwen2_moe"]),
    layers=st.sampled_from([2, 12]),
    changed=st.floats(0, 1),
    data=st.randoms(use_true_random=False),
)
def test_it_means_what_was_meant(family, layers, changed, data):
    modules = modules_of(family, num_hidden_layers=layers)
    wanted = {
        m.name: data.choice(SETTINGS) if data.random() < changed else SETTINGS[0]
        for m in modules
        if m.quantizable_by_default
    }
    found = resolved(write_plan(modules, wanted), modules)
    assert found == {m.name: wanted.get(m.name, Setting("bf16")) for m in modules}


def test_protected_modules_are_named():
    modules = modules_of("olmoe", tie_word_embeddings=False)
    wanted = {m.name: Setting("int4", 32) for m in modules if m.quantizable_by_default}
    wanted["lm_head"] = Setting("int8", 32)
    assert resolved(write_plan(modules, wanted), modules)["lm_head"] == Setting("int8", 32)


@pytest.mark.parametrize(
    ("differs", "most"),
    [
        (lambda m: False, 0),
        (lambda m: ".experts." in m.alias, 1),
        (lambda m: "down_proj" in m.alias and ".layers.1" in m.alias, 3),
        (lambda m: ".experts.5." in m.alias, 1),
        (lambda m: m.alias.split(".")[2] in ("3", "7"), 2),
    ],
)
def test_few_rules(differs, most):
    modules = modules_of("olmoe", num_hidden_layers=20)
    wanted = {m.name: SETTINGS[differs(m)] for m in modules if m.quantizable_by_default}
    plan = write_plan(modules, wanted)
    assert len(plan.overrides) <= most
    assert resolved(plan, modules).items() >= wanted.items()


def test_rules_carry_the_reason_of_what_they_decide():
    modules = modules_of("olmoe")
    wanted = {m.name: SETTINGS[".experts." in m.alias] for m in modules if m.quantizable_by_default}
    # the default is what most have: experts
    plan = write_plan(modules, wanted, comment="why", reason=lambda names: f"{len(names)} modules")
    assert plan.comment == "why"
    assert [rule.comment for rule in plan.overrides] == ["8 modules"]
