"""What config.json tells an engine: every module gets its scheme, by the engine's own way of matching."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.layouts import LAYOUTS
from alphaquant.plan import ModuleKind

from .samples import scheme
from .test_names import moe_names

CT_SCHEMES = [
    None,
    scheme("int4", 128),
    scheme("int4", 64),
    scheme("int8", -1),
    scheme("int3", 32, symmetric=False),
    scheme("int3", 32),
    scheme("fp8", -1),
    scheme("nvfp4"),
    scheme("mxfp4"),
    scheme("int8", -1, inputs="int8"),
    scheme("fp8", -1, inputs="fp8"),
]
HUMMING_SCHEMES = [
    *CT_SCHEMES,
    scheme("fp6", 64),
    scheme("int3", 64, inputs="int8"),
    scheme("mxfp4", inputs="fp8"),
    scheme("fp8_e5m2", -1),
    scheme("mxfp8_e5m2", 64),
]
TOKENS = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@st.composite
def assignments(draw, schemes):
    """Random schemes over layers x experts x projections, with as many distinct ones as drawn."""
    names = moe_names(draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.sets(st.integers(0, 4))))
    allowed = draw(st.lists(st.sampled_from(schemes), min_size=1, max_size=3))
    by = draw(st.sampled_from([r"layers\.(\d+)", r"experts\.(\d+)", r"(\w+)$", r"(.*)"]))
    keys = {name: m[1] if (m := re.search(by, name)) else "" for name in names}
    choice = {key: draw(st.sampled_from(allowed)) for key in sorted(set(keys.values()))}
    return {name: choice[keys[name]] for name in names}


def config_of(layout, schemes, kinds=None):
    config = LAYOUTS[layout].quantization_config(schemes, kinds)
    return json.loads(json.dumps(config, allow_nan=False))


def matches(target, name):
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


# --- compressed-tensors ---------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(assignments(CT_SCHEMES))
def test_compressed_tensors_groups_match_exactly_their_modules(schemes):
    config = config_of("compressed-tensors", schemes)
    if config is None:
        assert set(schemes.values()) == {None}
        return
    for name, chosen in schemes.items():
        found = [g for g in config["config_groups"].values() for t in g["targets"] if matches(t, name)]
        ignored = [entry for entry in config["ignore"] if matches(entry, name)]
        assert (len(found), len(ignored)) == ((0, 1) if chosen is None else (1, 0))
        if chosen is not None:
            weights = found[0]["weights"]
            assert weights["num_bits"] == chosen.format.bits
            assert weights["type"] == chosen.format.kind.value
            assert weights["symmetric"] == chosen.symmetric
            assert (weights["group_size"] or -1) == chosen.group_size
            inputs = {
                "bf16": None,
                "int8": TOKENS | {"type": "int"},
                "fp8": TOKENS | {"type": "float"},
            }[chosen.activation.value]
            assert found[0]["input_activations"] == inputs


def test_compressed_tensors_config_of_one_format():
    schemes = dict.fromkeys(moe_names(3, 4), scheme("int4", 128)) | {"lm_head": None, "model.embed_tokens": None}
    schemes |= {f"model.layers.{i}.mlp.gate": None for i in range(3)}
    schemes |= {"model.norm": None}
    kinds = {"model.embed_tokens": ModuleKind.EMBEDDING, "model.norm": ModuleKind.NORM, "lm_head": ModuleKind.HEAD}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "dynamic": False,
        "actorder": None,
    }
    group = {
        "targets": [
            r"re:^model\.layers\.\d+\.self_attn\.(?:q_proj|k_proj|v_proj|o_proj)$",
            r"re:^model\.layers\.\d+\.mlp\.experts\.\d+\.(?:gate_proj|up_proj|down_proj)$",
        ],
        "format": "pack-quantized",
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    assert config_of("compressed-tensors", schemes, kinds) == {
        "quant_method": "compressed-tensors",
        "version": "0.18.0",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:^model\.layers\.\d+\.mlp\.gate$"],
    }


@pytest.mark.parametrize(
    ("chosen", "storage", "expected"),
    [
        (scheme("int8", -1), "pack-quantized", {"strategy": "channel", "group_size": None}),
        (scheme("int3", 32, symmetric=False), "pack-quantized", {"strategy": "group", "symmetric": False}),
        (scheme("fp8", -1), "naive-quantized", {"strategy": "channel", "type": "float"}),
        (scheme("nvfp4"), "nvfp4-pack-quantized", {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}),
        (scheme("mxfp4"), "mxfp4-pack-quantized", {"strategy": "group", "scale_dtype": "torch.uint8"}),
        (scheme("mxfp6"), "mxfp6-pack-quantized", {"num_bits": 6, "scale_dtype": "torch.uint8"}),
        (scheme("mxfp8"), "mxfp8-quantized", {"group_size": 32, "scale_dtype": "torch.uint8"}),
        (scheme("int8", -1, inputs="int8"), "int-quantized", {"strategy": "channel", "num_bits": 8, "type": "int"}),
        (scheme("fp8", -1, inputs="fp8"), "float-quantized", {"strategy": "channel", "num_bits": 8, "type": "float"}),
    ],
    ids=str,
)
def test_compressed_tensors_weights(chosen, storage, expected):
    config = config_of("compressed-tensors", {"a.0.up_proj": chosen, "a.1.up_proj": scheme("int4", 128)})
    group = config["config_groups"]["group_0"]
    assert group["format"] == storage
    assert config["format"] == ("pack-quantized" if storage == "pack-quantized" else "mixed-precision")
    assert expected.items() <= group["weights"].items()
    assert ("scale_dtype" in group["weights"]) == ("scale_dtype" in expected)


def test_compressed_tensors_groups_differ_in_everything_but_the_scale_dtype():
    a, b = scheme("int4", 128), scheme("int4", 128, dtype=torch.float16)
    others = [scheme("int4", 128, symmetric=False), scheme("int4", 64), scheme("int3", 128)]
    schemes = {f"m.{i}.w": chosen for i, chosen in enumerate([a, b, *others])}
    groups = config_of("compressed-tensors", schemes)["config_groups"]
    assert [len(g["targets"]) for g in groups.values()] == [1, 1, 1, 1]
    assert groups["group_0"]["targets"] == [r"re:^m\.(?:0|1)\.w$"]


# --- humming, as vLLM reads it --------------------------------------------------------------------------------------


def humming_settings(config, prefix):
    """vLLM: skipped by `ignore` (substring, or an expression) or a "-:" rule; else the first "+:" rule."""
    for entry in config["ignore"]:
        if re.match(entry[3:], prefix) if entry.startswith("re:") else entry in prefix:
            return None
    if any(rule[0] == "-" and re.match(rule[2:], prefix) for rule in config["dynamic"]):
        return None
    merged = {key: value for key, value in config.items() if key not in ("dynamic", "ignore", "quant_method")}
    for rule, overrides in config["dynamic"].items():
        if rule[0] == "+" and re.match(rule[2:], prefix):
            return merged | overrides
    return merged


def expected_settings(chosen):
    fmt = chosen.format
    is_int = fmt.kind.value == "int"
    name = f"uint{fmt.bits}" if is_int else f"float{fmt.bits}e{fmt.exponent_bits}m{fmt.mantissa_bits}"
    scale = {"model": None, "e8m0": "float8e8m0", "e4m3": "float8e4m3"}[fmt.scale.value]
    group = 0 if chosen.group_size == -1 else chosen.group_size
    second = "tensor" if fmt.name == "nvfp4" else None
    inputs = {"bf16": None, "int8": "int8", "fp8": "float8e4m3"}[chosen.activation.value]
    return name, scale, group, not chosen.symmetric, second, inputs


def assert_served(config, prefix, chosen):
    found = humming_settings(config, prefix)
    if chosen is None:
        assert found is None, prefix
        return
    assert found is not None, prefix
    keys = ("b_dtype", "bs_dtype", "weight_scale_group_size", "has_zero_point", "weight_scale_2_type", "a_dtype")
    values = tuple(found.get(key, False if key == "has_zero_point" else None) for key in keys)
    assert values == expected_settings(chosen), prefix


def fused_prefixes(schemes):
    """vLLM's modules whose members share one scheme, with that scheme."""
    members = {}
    for name, chosen in schemes.items():
        parent, _, leaf = name.rpartition(".")
        if match := re.fullmatch(r"(.*\.experts)\.\d+\.\w+", name):
            members.setdefault(match[1], set()).add(chosen)
        for fused, parts in FUSED.items():
            if leaf in parts:
                members.setdefault(f"{parent}.{fused}", set()).add(chosen)
    return {name: found.pop() for name, found in members.items() if len(found) == 1 and ".experts." not in name}


@settings(max_examples=80)
@given(assignments(HUMMING_SCHEMES))
def test_humming_rules_give_every_module_its_scheme(schemes):
    config = config_of("humming", schemes)
    if config is None:
        assert set(schemes.values()) == {None}
        return
    assert config["quant_method"] == "humming"
    for name, chosen in (schemes | fused_prefixes(schemes)).items():
        assert_served(config, name, chosen)
    # no substring may swallow a neighbour
    assert all(entry.startswith("re:^") or "." not in entry for entry in config["ignore"])


def test_humming_rules_of_one_model():
    schemes = dict.fromkeys(moe_names(4, 4), scheme("int4", 128)) | {"lm_head": None, "model.embed_tokens": None}
    schemes |= {f"model.layers.{i}.mlp.gate": None for i in range(4)}
    schemes |= {n: scheme("fp6", -1) for n in schemes if "layers.1.mlp.experts" in n or "self_attn" in n}
    kinds = {"model.embed_tokens": ModuleKind.EMBEDDING}
    fp6 = {"b_dtype": "float6e2m3", "weight_scale_group_size": 0}
    assert config_of("humming", schemes, kinds) == {
        "quant_method": "humming",
        "b_dtype": "uint4",
        "weight_scale_group_size": 128,
        "dynamic": {
            r"+:^model\.layers\.\d+\.self_attn\.(?:q_proj|k_proj|v_proj|o_proj|qkv_proj)$": fp6,
            r"+:^model\.layers\.1\.mlp\.experts\.\d+\.(?:gate_proj|up_proj|down_proj)$": fp6,
            r"+:^model\.layers\.1\.mlp\.experts$": fp6,
            r"-:^lm_head$": {},
            r"-:^model\.layers\.\d+\.mlp\.gate$": {},
        },
        "ignore": ["lm_head", r"re:^model\.layers\.\d+\.mlp\.gate$"],
    }


def test_humming_overrides_reset_what_the_default_sets():
    schemes = {"a.0.w": scheme("nvfp4"), "a.1.w": scheme("nvfp4"), "b.w": scheme("int8", 32, symmetric=False)}
    config = config_of("humming", schemes)
    assert (config["bs_dtype"], config["weight_scale_2_type"]) == ("float8e4m3", "tensor")
    for name, chosen in schemes.items():
        assert_served(config, name, chosen)


def test_a_fused_module_of_several_schemes_has_no_rule():
    a, b = scheme("int4", 128), scheme("int8", 128)
    schemes = {f"layers.{i}.self_attn.{p}_proj": a for i in range(2) for p in "qkv"} | {"x": b, "y": b, "z": b}
    schemes |= dict.fromkeys(map(str.upper, "abcdefgh"), b) | {"layers.0.self_attn.k_proj": b}
    rules = [
        rule for rule in config_of("humming", schemes)["dynamic"] if re.match(rule[2:], "layers.1.self_attn.qkv_proj")
    ]
    assert len(rules) == 1
    assert not re.match(rules[0][2:], "layers.0.self_attn.qkv_proj")


def test_humming_fuses_only_whole_sets():
    """DeepSeek without q_lora has kv_a_proj_with_mqa alone: nothing is fused with it."""
    a, b = scheme("int4", 128), scheme("int8", 128)
    config = config_of("humming", {"l.0.kv_a_proj_with_mqa": a, "l.0.o_proj": b, "l.1.o_proj": b})
    assert list(config["dynamic"]) == [r"+:^l\.\d+\.kv_a_proj_with_mqa$"]


# --- Modules that reach an engine without a name ----------------------------------------------------------------------


@pytest.mark.parametrize("nameless", [None, scheme("int8", 64)])
def test_the_empty_name_is_met_by_a_rule_of_its_own(nameless):
    """As a plain entry it would stand in every name, and ignore the whole model."""
    schemes = {name: scheme("int4", 64) for name in moe_names(2, 2)} | {"": nameless}
    config = config_of("compressed-tensors", schemes)
    groups = config["config_groups"].values()
    owners = [g["weights"]["num_bits"] for g in groups if any(matches(target, "") for target in g["targets"])]
    assert (owners, "re:^$" in config["ignore"]) == (([], True) if nameless is None else ([8], False))
    config = config_of("humming", schemes)
    assert config["dynamic"].get("-:^$" if nameless is None else "+:^$") == (
        {} if nameless is None else {"b_dtype": "uint8"}
    )
    for layout in ("compressed-tensors", "humming"):
        assert "" not in config_of(layout, schemes)["ignore"]
