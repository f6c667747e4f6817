from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import alphaquant
from alphaquant.errors import PlanError
from alphaquant.formats import FORMATS
from alphaquant.patterns import compile_pattern
from alphaquant.plan import Module, ModuleKind, Override, Plan, Rule, plan_schema

K = ModuleKind
ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.json"))


def olmoe(layers=2, experts=2, hidden=256, inner=128, *, mixtral=False):
    """The modules of a small OLMoE, or of a Mixtral with the same canonical names."""
    plain = [("model.embed_tokens", K.EMBEDDING, 512, hidden)]
    for i in range(layers):
        at = f"model.layers.{i}"
        plain.append((f"{at}.input_layernorm", K.NORM, hidden, 1))
        plain += [(f"{at}.self_attn.{p}_proj", K.ATTENTION, hidden, hidden) for p in "qkvo"]
        plain.append((f"{at}.mlp.gate", K.ROUTER, experts, hidden))
        for e in range(experts):
            plain += [(f"{at}.mlp.experts.{e}.{p}_proj", K.EXPERT, inner, hidden) for p in ("gate", "up")]
            plain.append((f"{at}.mlp.experts.{e}.down_proj", K.EXPERT, hidden, inner))
    plain += [("model.norm", K.NORM, hidden, 1), ("lm_head", K.HEAD, 512, hidden)]
    return [Module(_mixtral(name) if mixtral else name, name, *rest) for name, *rest in plain]


def _mixtral(name):
    name = name.replace(".mlp.gate", ".block_sparse_moe.gate").replace(".mlp.experts.", ".block_sparse_moe.experts.")
    for canonical, native in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        name = name.replace(canonical, native) if "experts" in name else name
    return name


def qwen_extras():
    at = "model.layers.0.mlp"
    return [
        Module(f"{at}.shared_expert.up_proj", f"{at}.shared_expert.up_proj", K.SHARED_EXPERT, 128, 256),
        Module(f"{at}.shared_expert_gate", f"{at}.shared_expert_gate", K.SHARED_EXPERT_GATE, 1, 256),
    ]


def deepseek_extras():
    at = "model.layers.0"
    return [
        Module(f"{at}.mlp.shared_experts.up_proj", f"{at}.mlp.shared_experts.up_proj", K.SHARED_EXPERT, 128, 256),
        Module(f"{at}.mlp.down_proj", f"{at}.mlp.down_proj", K.MLP, 256, 192),
        Module(f"{at}.self_attn.kv_b_proj", f"{at}.self_attn.kv_b_proj", K.ATTENTION, 256, 32),
    ]


def schemes(*overrides, modules=None, **default):
    data = {"default": default, "overrides": list(overrides)}
    resolved = Plan.from_dict(data).resolve(modules or olmoe())
    return {name: str(scheme) if scheme else None for name, scheme in resolved.schemes.items()}


def failure(call, *args):
    with pytest.raises(PlanError) as error:
        call(*args)
    assert error.value.what
    assert error.value.where
    assert error.value.remedy
    return error.value


def resolve_failure(*overrides, modules=None, **default):
    plan = Plan.from_dict({"default": default, "overrides": list(overrides)})
    return failure(plan.resolve, modules or olmoe())


Q = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
ROUTER = "model.layers.0.mlp.gate"
GATE_PROJ = "model.layers.0.mlp.experts.0.gate_proj"


# --- Merging --------------------------------------------------------------------------------------------------------


def test_defaults():
    found = schemes()
    assert found[Q] == found[GATE_PROJ] == "int4 g128"
    left = [name for name, scheme in found.items() if scheme is None]
    assert left == [m.name for m in olmoe() if not m.quantizable_by_default]
    assert {m.kind for m in olmoe() if m.quantizable_by_default} == {K.ATTENTION, K.EXPERT}
    assert list(found) == [m.name for m in olmoe()]


def test_the_last_match_wins_key_by_key():
    first, second = {"pattern": "*.self_attn.*", "wq": "int8"}, {"pattern": "model.layers.0.*", "group_size": 64}
    third = {"pattern": "*.q_proj", "wq": "int3", "symmetric": False}
    found = schemes(first, second, third)
    assert found[Q] == "int3 g64 asym"
    assert found[Q1] == "int3 g128 asym"
    assert found["model.layers.1.self_attn.k_proj"] == "int8 g128"
    assert found["model.layers.0.self_attn.k_proj"] == "int8 g64"
    assert schemes(third, first)[Q] == "int8 g128 asym"


def test_skip_holds_until_it_is_taken_back():
    skip, back = {"pattern": "*.self_attn.*", "skip": True}, {"pattern": "model.layers.1.*", "skip": False}
    assert schemes(skip)[Q] is None
    assert schemes(skip, {"pattern": "*.self_attn.*", "wq": "int8"})[Q] is None
    found = schemes(skip, back)
    assert (found[Q], found[Q1]) == (None, "int4 g128")


@pytest.mark.parametrize("name", ["bf16", "none", "fp16"])
def test_names_that_leave_a_module(name):
    assert schemes({"pattern": "*.self_attn.*", "wq": name})[Q] is None
    found = schemes({"pattern": "*.self_attn.*", "wq": "int8"}, wq=name)
    assert (found[Q], found[GATE_PROJ]) == ("int8 g128", None)


BLOCKS = [
    # default, rules for q_proj in order, expected
    ({}, [{"wq": "mxfp4"}], "mxfp4 g32"),
    ({"group_size": 64}, [{"wq": "mxfp4"}], "mxfp4 g32"),
    ({}, [{"wq": "nvfp4"}], "nvfp4 g16"),
    ({}, [{"wq": "mxfp6", "group_size": 64}], "mxfp6 g64"),
    ({}, [{"wq": "mxfp6"}, {"group_size": 64}], "mxfp6 g64"),
    ({}, [{"group_size": 64}, {"wq": "mxfp6"}], "mxfp6 g32"),
    ({}, [{"wq": "mxfp6", "group_size": 64}, {"wq": "mxfp4"}], "mxfp4 g32"),
    ({"group_size": 64}, [{"wq": "mxfp4"}, {"wq": "int8"}], "int8 g64"),
    ({}, [{"group_size": 64}, {"wq": "mxfp4"}, {"wq": "int8"}], "int8 g64"),
    ({}, [{"wq": "mxfp4"}, {"wq": "int8"}], "int8 g128"),
    ({"wq": "mxfp4"}, [], "mxfp4 g32"),
    ({"wq": "mxfp4"}, [{"wq": "int4"}], "int4 g128"),
    ({"wq": "mxfp4", "group_size": 64}, [], "mxfp4 g64"),
    ({"wq": "mxfp4", "group_size": 64}, [{"wq": "int4"}], "int4 g64"),
    ({"wq": "mxfp4", "group_size": 64}, [{"wq": "nvfp4"}], "nvfp4 g16"),
    ({"wq": "nvfp4"}, [], "nvfp4 g16"),
    ({}, [{"wq": "fp8", "group_size": -1}], "fp8 channel"),
    ({}, [{"wq": "fp6"}], "fp6 g128"),
]


@pytest.mark.parametrize(("default", "rules", "expected"), BLOCKS)
def test_group_sizes_of_block_formats(default, rules, expected):
    assert schemes(*({"pattern": Q, **rule} for rule in rules), **default)[Q] == expected


def test_an_inherited_zero_point_does_not_stop_a_float():
    found = schemes({"pattern": "*.q_proj", "wq": "mxfp4"}, symmetric=False)
    assert (found[Q], found[GATE_PROJ]) == ("mxfp4 g32", "int4 g128 asym")
    later = schemes({"pattern": "*.q_proj", "wq": "fp8"}, {"pattern": "*.q_proj", "symmetric": False})
    assert later[Q] == "fp8 g128"


def test_mx_with_another_block_is_noted():
    rule = {"pattern": "*.self_attn.*", "wq": "mxfp6", "group_size": 64}
    notes = Plan(overrides=(Override(**rule),)).resolve(olmoe()).notes
    assert notes == (
        f"{Q} and 7 more: mxfp6 g64 is an E8M0-scaled float of block 64: served through humming only, not OCP MX",
    )
    assert Plan.from_shorthand("mxfp6").resolve(olmoe()).notes == ()


def test_scale_dtype_reaches_the_schemes():
    resolved = Plan().resolve(olmoe(), scale_dtype=torch.float16)
    assert {s.scale_dtype for s in resolved.schemes.values() if s} == {torch.float16}


PATTERNS = ["**", "*.self_attn.*", "*.q_proj", "model.layers.0.*", "*_proj", Q, "*.mlp.gate", "lm_head"]
SETTINGS = st.fixed_dictionaries(
    {"pattern": st.sampled_from(PATTERNS)},
    optional={
        "wq": st.sampled_from(["int2", "int8", "mxfp4", "fp8", "bf16"]),
        "group_size": st.sampled_from([32, 64, -1]),
        "skip": st.booleans(),
    },
).filter(lambda rule: len(rule) > 1)


@given(st.lists(SETTINGS, max_size=6))
def test_agrees_with_a_naive_merge(rules):
    found = Plan.from_dict({"overrides": rules}).resolve(olmoe()).schemes
    for module in olmoe():
        is_free = module.kind in {K.ATTENTION, K.EXPERT}
        bearing = [
            rule
            for rule in rules
            if compile_pattern(rule["pattern"]).matches(module.name)
            and (is_free or rule["pattern"] in {Q, "*.q_proj", "*.mlp.gate", "lm_head"})
        ]
        merged, group = {"wq": "int4", "skip": not (is_free or bearing)}, 128
        for rule in bearing:
            merged.update(rule)
        setter = max((i for i, rule in enumerate(bearing) if "wq" in rule), default=None)
        groups = [rule["group_size"] for rule in bearing if "group_size" in rule]
        since = [rule["group_size"] for rule in bearing[setter or 0 :] if "group_size" in rule]
        group = groups[-1] if groups else 128
        if merged["wq"] == "mxfp4":
            group = since[-1] if since else 32
        scheme = found[module.name]
        if merged["skip"] or merged["wq"] == "bf16":
            assert scheme is None
        else:
            assert scheme is not None
            assert (scheme.format.name, scheme.group_size) == (merged["wq"], group)


# --- Protected modules and aliases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["**", "*", "*gate*", "*.mlp.*", "*.mlp.gat?", "model.**", "lm_hea[d]", "*head"])
def test_a_wild_rule_never_touches_protected_modules(pattern):
    found = schemes({"pattern": pattern, "wq": "int8"}, modules=[*olmoe(), *qwen_extras()])
    kinds = {m.name: m for m in [*olmoe(), *qwen_extras()]}
    assert [name for name, scheme in found.items() if scheme and not kinds[name].quantizable_by_default] == []


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*.mlp.gate", ROUTER),
        ("lm_head", "lm_head"),
        ("lm_head.weight", "lm_head"),
        ("model.embed_tokens", "model.embed_tokens"),
        ("*.shared_expert_gate", "model.layers.0.mlp.shared_expert_gate"),
    ],
)
def test_a_literal_rule_reaches_a_protected_module_over_the_default(pattern, name):
    wild = {"pattern": "**", "wq": "int2", "group_size": 32}
    found = schemes(wild, {"pattern": pattern, "wq": "int8"}, modules=[*olmoe(), *qwen_extras()], group_size=64)
    assert found[name] == "int8 g64"
    assert found[GATE_PROJ] == "int2 g32"
    only_group = schemes({"pattern": pattern, "group_size": 32}, modules=[*olmoe(), *qwen_extras()])
    assert only_group[name] == "int4 g32"
    assert schemes({"pattern": pattern, "aq": "bf16"}, modules=[*olmoe(), *qwen_extras()])[name] is None
    assert schemes({"pattern": pattern, "skip": True}, modules=[*olmoe(), *qwen_extras()])[name] is None


def test_the_router_rule_never_catches_gate_proj():
    found = schemes({"pattern": "*.mlp.gate", "skip": True})
    assert found[GATE_PROJ] == "int4 g128"


def test_a_wild_rule_that_meets_only_protected_modules_is_warned_about():
    plan = Plan.from_dict({"overrides": [{"pattern": "*head*", "wq": "int8"}]})
    (warning,) = plan.resolve(olmoe()).warnings
    assert "overrides[0] '*head*' has no effect" in warning
    assert "lm_head (head)" in warning
    assert "literal last segment" in warning
    assert Plan.from_dict({"overrides": [{"pattern": "*head*", "skip": True}]}).resolve(olmoe()).warnings == ()


@pytest.mark.parametrize("pattern", ["model.norm", "*.input_layernorm"])
def test_norms_cannot_be_quantized(pattern):
    error = resolve_failure({"pattern": pattern, "wq": "int8"})
    assert "is a norm" in error.what
    assert error.where == f"overrides[0] {pattern!r}"
    assert '"skip": true' in error.remedy
    for leave in ({"skip": True}, {"wq": "bf16"}):
        assert schemes({"pattern": pattern, **leave})["model.norm"] is None


def test_mixtral_is_reached_by_either_name():
    modules = olmoe(mixtral=True)
    assert modules[7].name == "model.layers.0.block_sparse_moe.experts.0.w1"
    canonical = schemes({"pattern": "*.mlp.experts.*.gate_proj", "wq": "int8"}, modules=modules)
    native = schemes({"pattern": "*.w1", "wq": "int8"}, modules=modules)
    assert canonical == native
    assert [n for n, s in canonical.items() if s == "int8 g128"] == [m.name for m in modules if m.name.endswith("w1")]
    literal = schemes({"pattern": GATE_PROJ, "wq": "int8"}, modules=modules)
    assert literal[modules[7].name] == "int8 g128"
    router = schemes({"pattern": "*.mlp.gate", "wq": "int8"}, modules=modules)
    assert router["model.layers.0.block_sparse_moe.gate"] == "int8 g128"
    assert Plan().resolve(modules).explain(GATE_PROJ).module is modules[7]


# --- Patterns that match nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "*.mlp.shared_expert.*",
        "*.shared_expert_gate",
        "*.block_sparse_moe.gate",
        "*.block_sparse_moe.experts.1.w2",
        "model.layers.1.mlp.gate_proj",
        "*.kv_a_proj_with_mqa",
        "*.mlp.shared_experts.down_proj",
        "*.post_feedforward_layernorm",
    ],
)
def test_another_family_s_pattern_is_a_warning(pattern):
    plan = Plan.from_dict({"overrides": [{"pattern": "*.q_proj", "wq": "int8"}, {"pattern": pattern, "wq": "int8"}]})
    (warning,) = plan.resolve(olmoe()).warnings
    assert f"overrides[1].pattern: {pattern!r} matches no module of this model" in warning


@pytest.mark.parametrize(
    ("pattern", "what", "remedy"),
    [
        ("model.layers.2.*", "layers are 0 to 1, and 2 is none of them", "in range"),
        ("model.layers.40.mlp.gate", "layers are 0 to 1, and 40 is none of them", "in range"),
        ("model.layers.[2-9].block_sparse_moe.gate", "layers are 0 to 1, and [2-9] is none", "in range"),
        ("*.experts.2.up_proj", "experts are 0 to 1, and 2 is none of them", "in range"),
        ("*.self_atn.*", "matches no module", '"*.self_attn.*"'),
        ("*.mlp.gate_prj", "matches no module", '"*.gate_proj"'),
        ("model.layers.1.mlp.experts.0.dwn_proj", "matches no module", '"model.layers.*.mlp.experts.*.down_proj"'),
        ("lm_haed", "matches no module", '"lm_head"'),
        ("mlp.gate", "matches no module", '"*.mlp.gate"'),
        ("*.LM_HEAD", "matches no module", "compare it with the names"),
        ("model.*.up_proj", "matches no module", "write model.**.up_proj"),
        ("*.layers.*.mlp.*.*.*.up_proj", "matches no module", "write *.layers.**.mlp.**.up_proj"),
    ],
)
def test_a_pattern_no_family_knows_is_an_error(pattern, what, remedy):
    error = resolve_failure({"pattern": pattern, "skip": True})
    assert repr(pattern) in error.what
    assert what in error.what
    assert error.where == "overrides[0].pattern"
    assert remedy in error.remedy


def test_a_star_that_was_meant_for_several_segments_is_told():
    plan = Plan.from_dict({"overrides": [{"pattern": "*.layers.1.*.up_proj", "wq": "int8"}]})
    (warning,) = plan.resolve(olmoe()).warnings
    assert warning.endswith("it does nothing; *.layers.1.**.up_proj would")


def test_a_layer_of_this_model_counts_for_other_families():
    plan = Plan.from_dict({"overrides": [{"pattern": "model.layers.9.block_sparse_moe.experts.70.w1", "wq": "int8"}]})
    assert len(plan.resolve(olmoe(layers=10, experts=72)).warnings) == 1
    dense = [m for m in olmoe(layers=10) if m.kind is not K.EXPERT]
    assert len(plan.resolve(dense).warnings) == 1


# --- Group sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "fitting"), [(10944, 64), (96, 32), (208, 16), (72, 8), (100, -1)])
def test_a_group_size_that_does_not_divide(width, fitting):
    modules = [
        Module(f"model.layers.{i}.mlp.down_proj", f"model.layers.{i}.mlp.down_proj", K.MLP, 256, width)
        for i in range(3)
    ]
    error = resolve_failure(modules=modules)
    assert f"group size 128 does not divide the {width} inputs of model.layers.0.mlp.down_proj" in error.what
    assert "(and 2 more)" in error.what
    assert error.where == "default"
    assert f'{{"pattern": "model.layers.*.mlp.down_proj", "group_size": {fitting}}}' in error.remedy
    fixed = {"pattern": "model.layers.*.mlp.down_proj", "group_size": fitting}
    assert set(schemes(fixed, modules=modules).values()) == {f"int4 g{fitting}" if fitting > 0 else "int4 channel"}


def test_the_largest_standard_size_is_offered():
    modules = [Module("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", K.MLP, 256, 384)]
    assert '"group_size": 128}: the largest standard size' in resolve_failure(modules=modules, group_size=256).remedy


def test_the_rule_that_set_the_group_size_is_named():
    rules = [{"pattern": "*.self_attn.*", "group_size": 96}, {"pattern": "*.q_proj", "wq": "int8"}]
    assert resolve_failure(*rules).where == "overrides[0] '*.self_attn.*'"
    block = [Module("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", K.MLP, 256, 72)]
    error = resolve_failure({"pattern": "*.mlp.*", "wq": "nvfp4"}, modules=block, group_size=8)
    assert error.where == "overrides[0] '*.mlp.*'"
    assert "another format than nvfp4" in error.remedy
    skipped = {"pattern": "*.mlp.*", "skip": True}
    assert schemes({"pattern": "*.mlp.*", "wq": "nvfp4"}, skipped, modules=block, group_size=8)[block[0].name] is None


def test_nvfp4_refuses_a_later_group_size():
    error = resolve_failure({"pattern": "*.q_proj", "wq": "nvfp4"}, {"pattern": "**", "group_size": 64})
    assert error.what == f"group_size 64 for {Q}, which is nvfp4 with blocks of 16"
    assert error.where == "overrides[1] '**'"
    assert "narrow the pattern" in error.remedy


# --- Reading --------------------------------------------------------------------------------------------------------

WRONG = [
    ("{", "not valid JSON", "p.json: line 1, column 2", "check commas"),
    ('{\n "default": 4 4}', '\\"default\\": 4 4', "p.json: line 2, column 15", "check commas"),
    ("", "not valid JSON", "p.json: line 1, column 1", "check commas"),
    ("[]", "the plan is []", "p.json", "JSON object"),
    ("3", "the plan is 3", "p.json", "JSON object"),
    ("null", "null", "p.json", "bf16"),
    ('{"defualt": {}}', 'unknown key "defualt"', "p.json: defualt", 'did you mean "default"'),
    ('{"default": {"wQ": "int4"}}', 'unknown key "wQ"', "p.json: default.wQ", 'did you mean "wq"'),
    ('{"default": {"skip": true}}', 'unknown key "skip"', "p.json: default.skip", "known keys: wq, aq"),
    ('{"overrides": [{"pattern": "*", "groupsize": 8}]}', '"groupsize"', "overrides[0].groupsize", '"group_size"'),
    ('{"default": 4}', "default is 4", "p.json: default", "write an object"),
    ('{"overrides": {}}', "overrides is {}", "p.json: overrides", "list of objects"),
    ('{"overrides": ["x"]}', 'an override is "x"', "p.json: overrides[0]", "list of objects"),
    ('{"overrides": [{"wq": "int4"}]}', 'pattern is missing in {"wq"', "p.json: overrides[0]", 'add "pattern"'),
    ('{"overrides": [{"pattern": 3, "wq": "int4"}]}', "pattern is 3", "overrides[0].pattern", "glob"),
    ('{"overrides": [{"pattern": "a..b", "wq": "int4"}]}', "'a..b'", "overrides[0].pattern", "extra dot"),
    ('{"overrides": [{"pattern": "a", "comment": "x"}]}', 'override "a" sets nothing', "overrides[0]", "delete"),
    ('{"default": {"wq": 4}}', "wq is 4", "p.json: default.wq", '"int4"'),
    ('{"default": {"wq": "mxpf4"}}', "'mxpf4'", "p.json: default.wq", "mxfp4"),
    ('{"default": {"wq": "INT4"}}', "'INT4'", "p.json: default.wq", "int4"),
    ('{"default": {"wq": null}}', "null", "p.json: default.wq", "omit the key"),
    ('{"default": {"aq": "int4"}}', 'aq is "int4", and no engine computes it so', "p.json: default.aq", '"int8"'),
    ('{"default": {"aq": "w8"}}', 'aq is "w8", and it is not known', "p.json: default.aq", '"fp8"'),
    (
        '{"overrides": [{"pattern": "*.x", "wq": "bf16", "aq": "fp8"}]}',
        "rounded only where weights are quantized",
        "p.json: overrides[0]",
        "omit aq",
    ),
    ('{"default": {"group_size": 0}}', "group_size is 0", "default.group_size", "-1 for one scale a row"),
    ('{"default": {"group_size": -2}}', "group_size is -2", "default.group_size", "-1 for one scale a row"),
    ('{"default": {"group_size": "128"}}', 'group_size is "128"', "default.group_size", "positive integer"),
    ('{"default": {"wq": "fp8", "group_size": [128, 128]}}', "[128, 128]", "default.group_size", '"fp8_block"'),
    ('{"default": {"wq": "fp8_block", "group_size": 64}}', "64 with wq", "default", "omit group_size"),
    ('{"default": {"group_size": true}}', "group_size is true", "default.group_size", "positive integer"),
    ('{"default": {"group_size": 64.0}}', "group_size is 64.0", "default.group_size", "positive integer"),
    ('{"default": {"group_size": NaN}}', "group_size is NaN", "default.group_size", "positive integer"),
    ('{"default": {"symmetric": 1}}', "symmetric is 1", "default.symmetric", "true or false"),
    ('{"overrides": [{"pattern": "*", "skip": "yes"}]}', 'skip is "yes"', "overrides[0].skip", "true or false"),
    ('{"comment": 1}', "comment is 1", "p.json: comment", "string in quotes"),
    ('{"default": {"wq": "fp8", "symmetric": false}}', 'wq "fp8", which has no zero point', "default", "omit"),
    ('{"default": {"wq": "nvfp4", "group_size": 32}}', 'group_size 32 with wq "nvfp4"', "default", "omit group_size"),
    ('{"default": {"wq": "int4", "wq": "int4"}}', 'key "wq" is given twice', "p.json: default", "keep one"),
    ('{"default": {"wq": "x"}, "$schema": 1, "b": 1}', "(and 2 more errors in this plan)", "p.json: $schema", "quotes"),
    ("[" * 60 + "]" * 60, "nested deeper than 50", "p.json", "3 levels"),
    ('{"a":' * 60 + "1" + "}" * 60, "nested deeper than 50", "p.json", "3 levels"),
    ("[" * 200_000, "nested deeper than 50", "p.json", "3 levels"),
    ('{"default": {"group_size": ' + "1" * 5000 + "}}", "number is too long", "p.json", "positive integer"),
    ('{"comment": "\\ud800"}', "is not Unicode text", "p.json: comment", "whole character"),
    (" " * 10_000_001, "larger than 10,000,000 bytes", "p.json", "Use patterns"),
]


@pytest.mark.parametrize(("text", "what", "where", "remedy"), WRONG, ids=[row[0][:50] for row in WRONG])
def test_errors_name_value_place_and_remedy(text, what, where, remedy):
    error = failure(Plan.parse, text, "p.json")
    assert what in error.what
    assert error.where.endswith(where)
    assert remedy in error.remedy
    assert len(str(error)) < 600


def test_files(tmp_path):
    path = tmp_path / "plan.json"
    error = failure(Plan.load, path)
    assert "does not exist" in error.what
    assert error.where == str(path)
    path.write_bytes(b'{"comment": "\xff"}')
    error = failure(Plan.load, path)
    assert "byte 0xff at offset 13" in error.what
    path.write_bytes(b" " * 10_000_001)
    assert "larger than" in failure(Plan.load, str(path)).what
    assert "cannot be read" in failure(Plan.load, tmp_path).what
    path.write_text('{"default": {"wq": "int5"}}')
    assert failure(Plan.load, path).where == f"{path}: default.wq"
    path.write_bytes(b'\xef\xbb\xbf{"default": {"wq": "int8"}}')
    assert Plan.load(path).default.wq == "int8"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["int4", "*.a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["default", "overrides", "pattern", "wq", "skip", "group_size"]), inner)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_a_plan_or_a_plan_error(data):
    try:
        plan = Plan.parse(json.dumps(data))
    except PlanError as error:
        complete = bool(error.what and error.where and error.remedy)
    else:
        complete = Plan.parse(plan.to_json()) == plan
    assert complete


def test_canonical_text_is_stable_and_means_the_same():
    overrides = [{"wq": "mxfp4", "pattern": "*.q_proj", "comment": "é"}, {"pattern": "*.k_proj", "skip": False}]
    plan = Plan.from_dict({"overrides": overrides, "$schema": "s", "comment": "c"})
    text = plan.to_json()
    assert json.loads(text)["default"] == {"wq": "int4", "aq": "bf16", "group_size": 128, "symmetric": True}
    assert list(json.loads(text)["overrides"][0]) == ["pattern", "wq", "comment"]
    assert Plan.parse(text) == plan
    assert Plan.parse(text).to_json() == text
    assert Plan(default=Rule(wq="mxfp4")).to_json().count("group_size") == 0
    assert Plan().to_json() == Plan(default=Rule(wq="int4", group_size=128)).to_json()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4:g128", "int4 g128"),
        ("int4", "int4 g128"),
        ("mxfp4", "mxfp4 g32"),
        ("int3:g64:asym", "int3 g64 asym"),
        ("int3:asym:g64", "int3 g64 asym"),
        ("int4:channel:sym", "int4 channel"),
        ("nvfp4:g16", "nvfp4 g16"),
        ("bf16", None),
    ],
)
def test_shorthand(text, expected):
    scheme = Plan.from_shorthand(text).resolve(olmoe()).schemes[Q]
    assert (str(scheme) if scheme else None) == expected


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        ("int5", "'int5'", "known formats"),
        ("", "''", "known formats"),
        ("int4:128", "'128'", ":g64"),
        ("int4:g", "'g'", ":g64"),
        ("int4:g64:g32", "'g32' sets group_size a second time", "once"),
        ("int4:sym:asym", "'asym' sets symmetric a second time", "once"),
        ("int4:g0", "group_size is 0", "positive"),
        ("mxfp4:asym", "no zero point", "omit"),
        ("nvfp4:g32", "blocks are 16 wide", "omit"),
    ],
)
def test_wrong_shorthand(text, what, remedy):
    error = failure(Plan.from_shorthand, text)
    assert what in error.what
    assert repr(text) in error.where
    assert remedy in error.remedy


# --- Explaining -----------------------------------------------------------------------------------------------------


def test_explain_lists_every_rule_in_order():
    rules = [
        {"pattern": "*.self_attn.*", "wq": "int8", "comment": "why"},
        {"pattern": "*.mlp.*", "wq": "int2"},
        {"pattern": "*.q_proj", "group_size": 64},
    ]
    resolved = Plan.from_dict({"overrides": rules}).resolve(olmoe())
    found = resolved.explain(f"{Q}.weight")
    assert [step.rule for step in found.steps] == ["default", 0, 2]
    assert found.steps[1].keys == {"wq": "int8"}
    assert str(found) == (
        f"{Q} (attention): int8 g64\n"
        '  default: wq = "int4", aq = "bf16", group_size = 128, symmetric = true\n'
        '  overrides[0] *.self_attn.*: wq = "int8"  (why)\n'
        "  overrides[2] *.q_proj: group_size = 64"
    )
    router = resolved.explain(ROUTER)
    assert router.scheme is None
    assert [step.rule for step in router.steps] == ["default", "protected"]
    assert "names it literally" in str(router)
    assert "vector" in str(resolved.explain("model.norm"))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model.layers.1.self_attn.q_prj", '"model.layers.1.self_attn.q_proj"'),
        ("model.layers.7.self_attn.q_proj", '"model.layers.*.self_attn.q_proj"'),
        ("lm_haed", '"lm_head"'),
        ("zzz", "list the modules"),
        ("a..[", "list the modules"),
        ("", "list the modules"),
    ],
)
def test_explain_of_an_unknown_name(name, remedy):
    error = failure(Plan().resolve(olmoe()).explain, name)
    assert repr(name) in error.what
    assert remedy in error.remedy


def test_explain_names_the_range_of_layers():
    error = failure(Plan().resolve(olmoe()).explain, "model.layers.7.self_attn.q_proj")
    assert "this model's layers are 0 to 1, and 7 is none of them" in error.what


# --- What ships -----------------------------------------------------------------------------------------------------


def test_the_schema_is_current():
    path = Path(alphaquant.__file__).parent / "data" / "plan.schema.json"
    text = json.dumps(plan_schema(), indent=2) + "\n"
    assert path.read_text(encoding="utf-8") == text, "write json.dumps(plan_schema(), indent=2) and a newline there"


def test_the_schema_knows_every_key_and_format():
    top = plan_schema()["properties"]
    override = top["overrides"]["items"]
    assert set(top) == {"$schema", "comment", "default", "overrides"}
    assert set(top["default"]["properties"]) == set(Rule.model_fields)
    assert set(override["properties"]) == set(Override.model_fields)
    assert override["required"] == ["pattern"]
    assert override["properties"]["wq"]["enum"] == [*FORMATS, "bf16", "none", "fp16"]
    assert all(field["description"] for field in override["properties"].values())


MODELS = {
    "olmoe": olmoe(),
    "small": olmoe(hidden=128, inner=64),
    "mixtral": olmoe(mixtral=True),
    "qwen": [*olmoe(), *qwen_extras()],
    "deepseek": [*olmoe(), *deepseek_extras()],
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configs_fit_every_family(path, model):
    modules = MODELS[model]
    if path.stem != "gptq_mixed_precision":  # the others are for widths that 64 or 128 divides
        modules = [m for m in modules if m.in_features % 128 == 0]
    resolved = Plan.load(path).resolve(modules)
    assert all((resolved.schemes[m.name] is not None) == m.quantizable_by_default for m in modules)


def test_configs_mix_what_they_say():
    assert len(CONFIGS) == 3
    resolved = Plan.load(ROOT / "configs/gptq_mixed_precision.json").resolve([*olmoe(), *qwen_extras()])
    found = {str(scheme) for scheme in resolved.schemes.values() if scheme}
    assert found == {"int8 channel", "mxfp6 g64", "int4 g64", "fp8 channel"}
    assert str(resolved.schemes[GATE_PROJ]) == "int4 g64"
    deeper = Plan.load(ROOT / "configs/gptq_mixed_precision.json").resolve(olmoe(layers=3))
    assert str(deeper.schemes["model.layers.2.mlp.experts.0.up_proj"]) == "int3 g64"
    mixed = Plan.load(ROOT / "configs/gptq_olmoe_mixed.json").resolve(olmoe())
    assert {str(s) for s in mixed.schemes.values() if s} == {"mxfp6 g64", "mxfp4 g32", "int4 g64"}
    assert mixed.warnings == ()


def test_literal_patterns_are_looked_up_and_others_tried_once_a_name(monkeypatch):
    modules = olmoe(layers=10, experts=32)
    calls = 0

    def counting(text):
        pattern = compile_pattern(text)

        def matches(name):
            nonlocal calls
            calls += 1
            return pattern.matches(name)

        return dataclasses.replace(pattern, matches=matches)

    monkeypatch.setattr(sys.modules["alphaquant.plan"], "compile_pattern", counting)
    rules = [{"pattern": f"model.layers.{i}.mlp.**.up_proj", "wq": "int8"} for i in range(10)]
    # An allocator's plan may name every module.
    rules += [{"pattern": m.name, "wq": "int3"} for m in modules if m.kind is K.EXPERT]
    found = Plan.from_dict({"overrides": rules}).resolve(modules).schemes
    assert sum(scheme is not None and scheme.format.name == "int3" for scheme in found.values()) == 10 * 32 * 3
    assert calls == 10 * len(modules)


# --- Rounded inputs -------------------------------------------------------------------------------------------------


def test_inputs_are_rounded_where_the_last_rule_says():
    found = schemes(
        {"pattern": "*.self_attn.*", "wq": "fp8", "aq": "fp8", "group_size": -1},
        {"pattern": "*.o_proj", "aq": "none"},
        {"pattern": "lm_head", "wq": "int8", "group_size": -1},
        wq="int8", aq="int8", group_size=-1,
    )  # fmt: skip
    assert found["model.layers.0.mlp.experts.1.up_proj"] == "int8 channel ×int8"
    assert found["model.layers.1.self_attn.q_proj"] == "fp8 channel ×fp8"
    assert found["model.layers.1.self_attn.o_proj"] == "fp8 channel"
    assert found["lm_head"] == "int8 channel"  # heads, routers and gates read what they are given
    assert found["model.layers.0.mlp.gate"] is None


@pytest.mark.parametrize("wq", ["int8", "fp8"])
@pytest.mark.parametrize("aq", ["int8", "fp8"])
def test_shorthand_of_rounded_inputs(wq, aq):
    text = f"{wq}:channel:a-{aq}"
    if wq != aq:
        assert resolve_failure(wq=wq, aq=aq, group_size=-1).what.startswith(f"{aq} activations do not go with {wq}")
        return
    plan = Plan.from_shorthand(text)
    assert Plan.from_dict(json.loads(plan.to_json())) == plan
    assert {str(s) for s in plan.resolve(olmoe()).schemes.values() if s} == {f"{wq} channel ×{aq}"}


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ({"pattern": "*.up_proj", "wq": "mxfp4", "aq": "int8"}, "integers are multiplied with integers"),
        ({"pattern": "*.up_proj", "wq": "nvfp4", "aq": "fp8"}, "groups of 32 or more"),
        ({"pattern": "*.up_proj", "wq": "int4", "symmetric": False, "aq": "int8"}, "zero point"),
        ({"pattern": "*.mlp.gate", "wq": "int8", "aq": "int8"}, "a router are never rounded"),
        ({"pattern": "lm_head", "wq": "int8", "aq": "int8"}, "a head are never rounded"),
    ],
)
def test_what_no_kernel_multiplies_is_refused_with_its_reason(override, what):
    error = resolve_failure(override)
    assert what in error.what
    assert "overrides[0]" in error.where
    assert "aq" in error.remedy
