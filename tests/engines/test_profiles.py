"""Engine profiles: what an engine refuses or gets silently wrong is known before a run."""

from __future__ import annotations

import ast
import inspect

import pytest

from alphaquant import engines
from alphaquant.engines import PROFILES, profile_of
from alphaquant.errors import ConfigError
from alphaquant.formats import FORMATS, Activation, Scheme
from alphaquant.models import detect
from alphaquant.plan import Plan
from alphaquant.rules import Override
from pipeline import tiny

VLLM, TRANSFORMERS, ANY = (PROFILES[name] for name in ("vllm", "transformers", "any"))


def modules_of(family="olmoe", **changed):
    return list(detect(tiny.CONFIGS[family] | changed).modules())


def resolved(*overrides, family="olmoe", default=None, **changed):
    modules = modules_of(family, **changed)
    plan = Plan.from_dict({"default": {"wq": "int4", "group_size": 32} | (default or {}), "overrides": list(overrides)})
    return dict(plan.resolve(modules).schemes), modules, plan


def rules(profile, *overrides, tp=1, layout=None, gpu=None, **kwargs):
    schemes, modules, _ = resolved(*overrides, **kwargs)
    return profile.violations(schemes, modules, tp=tp, layout=layout, gpu=gpu)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_uniform_plan_is_legal_everywhere(profile, family):
    assert rules(profile, family=family) == []


# --- What engines get silently wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek"])
def test_experts_of_one_layer_mixed(family):
    """vLLM looks at expert 0 only and computes all as it says."""
    found = rules(VLLM, {"pattern": "model.layers.1.mlp.experts.3.*", "wq": "int8"}, family=family)
    assert len(found) == 1
    assert ".1." in found[0].module
    assert found[0].num_modules == 24
    assert "all experts of a layer" in found[0].rule
    assert "int8 g32" in found[0].remedy


def test_down_proj_different():
    found = rules(VLLM, {"pattern": "*.mlp.experts.*.down_proj", "wq": "mxfp4"})
    assert [v.num_modules for v in found] == [24, 24]
    assert rules(TRANSFORMERS, {"pattern": "*.mlp.experts.*.down_proj", "wq": "mxfp4"})


def test_experts_by_layer_under_transformers():
    rule = {"pattern": "model.layers.1.mlp.experts.*", "wq": "int8"}
    assert rules(VLLM, rule) == []
    (found,) = rules(TRANSFORMERS, rule)
    assert found.num_modules == 48
    assert "all layers" in found.rule
    assert rules(TRANSFORMERS, {"pattern": "model.layers.0.mlp.experts.*", "skip": True})


def test_nvfp4_experts_under_transformers():
    (found,) = rules(TRANSFORMERS, {"pattern": "*.mlp.experts.*", "wq": "nvfp4"})
    assert "silently wrong" in found.rule
    assert found.num_modules == 48


@pytest.mark.parametrize(
    ("pattern", "family"),
    [
        ("*.self_attn.k_proj", "olmoe"),
        ("*.mlp.up_proj", "llama"),
        ("*.mlp.shared_experts.gate_proj", "deepseek"),
        ("*.mlp.shared_expert.up_proj", "qwen2_moe"),
    ],
)
def test_what_is_fused_shares_a_scheme_or_is_left_whole(pattern, family):
    for rule in ({"wq": "int8"}, {"skip": True}, {"group_size": 64}):
        found = rules(VLLM, {"pattern": pattern} | rule, family=family)
        assert found, rule
        assert all("as one matrix" in v.rule for v in found)
        assert rules(TRANSFORMERS, {"pattern": pattern} | rule, family=family) == []


# --- Formats, layouts, sizes ----------------------------------------------------------------------------------------


def test_routers_are_never_quantized():
    for profile in PROFILES.values():
        found = rules(profile, {"pattern": "*.mlp.gate", "wq": "int8"})
        assert "unquantized" in found[0].rule


@pytest.mark.parametrize(("inner", "tp", "legal"), [(1408, 1, 128), (1408, 2, 64), (1408, 4, 32)])
def test_tensor_parallelism_needs_whole_groups(inner, tp, legal):
    for group_size in (128, 64, 32):
        found = rules(
            VLLM, tp=tp, hidden_size=2048, intermediate_size=inner, num_attention_heads=16,
            default={"group_size": group_size},
        )  # fmt: skip
        is_legal = group_size <= legal
        assert (found == []) == is_legal, (group_size, found)
        if found:
            assert f"groups of {group_size}" in found[0].rule
            assert '"group_size"' in found[0].remedy


def test_fp8_experts_need_rounded_inputs_in_vllm_compressed_tensors():
    rule = {"pattern": "*.mlp.experts.*", "wq": "fp8", "group_size": -1}
    assert rules(VLLM, rule, layout="humming") == rules(VLLM, rule) == []
    (found,) = rules(VLLM, rule, layout="compressed-tensors")
    assert '"aq": "fp8"' in found.rule
    assert found.remedy == 'give it "aq": "fp8"'
    assert rules(VLLM, rule | {"aq": "fp8"}, layout="compressed-tensors") == []


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_rounded_inputs_go_with_one_scale_a_row(name):
    rule = {"pattern": "*", "wq": name, "aq": name, "group_size": -1}
    assert rules(VLLM, rule, layout="compressed-tensors") == []
    (found,) = rules(VLLM, rule | {"group_size": 32}, layout="compressed-tensors")
    assert found.remedy == 'give it "group_size": -1'
    assert all(v.remedy == 'give it "aq": "bf16"' for v in rules(TRANSFORMERS, rule) if name == "int8")
    assert rules(TRANSFORMERS, rule)
    assert "fails on" not in rules(ANY, rule)[0].rule


IN_BLOCKS = {"pattern": "*", "wq": "fp8_block", "aq": "fp8"}
WIDE = {"hidden_size": 2048, "intermediate_size": 1408, "num_attention_heads": 16, "num_key_value_heads": 16}


def test_fp8_in_blocks_is_served_by_vllm_from_compressed_tensors():
    schemes, modules, _ = resolved(IN_BLOCKS, **WIDE)
    assert VLLM.best_layout(schemes, modules) == "compressed-tensors"
    assert VLLM.violations(schemes, modules) == VLLM.violations(schemes, modules, gpu=90) == []
    assert all("8.9" in found.rule for found in VLLM.violations(schemes, modules, gpu=80))
    for found in VLLM.violations(schemes, modules, layout="humming"):
        assert found.remedy == "write it with --format compressed-tensors"
    assert all("does not load fp8_block" in found.rule for found in TRANSFORMERS.violations(schemes, modules))
    (experts,) = rules(VLLM, IN_BLOCKS | {"aq": "bf16"}, layout="compressed-tensors", **WIDE)
    assert experts.remedy == 'give it "aq": "fp8"'
    (head,) = rules(VLLM, IN_BLOCKS, {"pattern": "lm_head", "wq": "fp8_block", "aq": "bf16"}, **WIDE)
    assert (head.module, "linears of layers" in head.rule) == ("lm_head", True)


@pytest.mark.parametrize(
    ("family", "changed", "tp", "refused"),
    [
        ("llama", {}, 1, []),
        ("llama", {"num_key_value_heads": 8}, 1, []),
        # values come last of what is loaded as one, and may end within a block; nothing may begin there
        ("llama", {"num_key_value_heads": 1, "head_dim": 64}, 1, ["k_proj"]),
        ("llama", {"intermediate_size": 1344}, 1, ["gate_proj"]),
        ("llama", {}, 2, ["gate_proj", "up_proj", "down_proj"]),
        ("llama", {"intermediate_size": 1536}, 4, []),
        ("olmoe", {}, 2, ["gate_proj", "up_proj", "down_proj"]),
        ("olmoe", {"intermediate_size": 1536}, 4, []),
    ],
)
def test_blocks_begin_with_each_matrix_that_is_loaded(family, changed, tp, refused):
    down = {"pattern": "*.down_proj", "skip": True} if changed.get("intermediate_size") == 1344 else IN_BLOCKS
    schemes, modules, _ = resolved(IN_BLOCKS, down, family=family, **(WIDE | changed))
    found = VLLM.violations(schemes, modules, tp=tp, layout="compressed-tensors")
    assert {name.rpartition(".")[2] for v in found for name in v.names} == set(refused)
    assert all("128" in v.rule for v in found)


def test_each_format_goes_where_it_is_read():
    schemes, modules, _ = resolved({"pattern": "*.mlp.experts.*", "wq": "fp6", "group_size": 64})
    assert VLLM.best_layout(schemes, modules) == "humming"
    assert VLLM.violations(schemes, modules) == []
    assert VLLM.violations(schemes, modules, layout="compressed-tensors")
    assert VLLM.violations(schemes, modules, layout="dense") == []
    assert "does not read" in TRANSFORMERS.violations(schemes, modules, layout="humming")[0].rule
    expert = next(m for m in modules if m.kind.value == "expert")
    assert TRANSFORMERS.allowed(schemes[expert.name], expert) is not None
    assert TRANSFORMERS.allowed(None, expert) is None


def test_nvfp4_of_fused_modules_is_not_served_from_humming():
    (found,) = rules(VLLM, {"pattern": "*.self_attn.*", "wq": "nvfp4"}, layout="humming")
    assert found.num_modules == 6  # q, k, v of two layers; o_proj stands alone
    assert rules(VLLM, {"pattern": "*.self_attn.*", "wq": "nvfp4"}) == []


def test_gptq_is_read_in_four_and_eight_bits():
    assert rules(VLLM, layout="gptq") == []
    for rule in ({"wq": "int3"}, {"symmetric": False}, {"wq": "mxfp4"}):
        assert rules(VLLM, {"pattern": "*"} | rule, layout="gptq")


def test_gpu_generations():
    assert rules(VLLM, {"pattern": "*", "wq": "mxfp4"}, gpu=80) == []
    assert "8.0" in rules(VLLM, {"pattern": "*", "wq": "mxfp4"}, gpu=75)[0].rule
    expert = next(m for m in modules_of() if m.kind.value == "expert")
    fp8 = Scheme(FORMATS["fp8"], -1, activation=Activation.FP8)
    assert VLLM.allowed(fp8, expert, gpu=89) is None
    assert "8.9" in VLLM.allowed(fp8, expert, gpu=80)


# --- Tie groups and making a plan legal -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_tie_groups_are_disjoint_and_their_patterns_mean_them(profile, family):
    modules = modules_of(family)
    seen = set()
    for group in profile.tie_groups(modules):
        assert len(group.names) > 1
        assert seen.isdisjoint(group.names)
        seen.update(group.names)
        plan = Plan.from_dict(
            {
                "default": {"wq": "bf16"},
                "overrides": [{"pattern": p, "wq": "int8", "group_size": -1} for p in group.patterns],
            }
        )
        reached = {name for name, scheme in plan.resolve(modules).schemes.items() if scheme is not None}
        assert reached == set(group.names)


MIXES = {
    "experts": ({"pattern": "model.layers.0.mlp.experts.[0-3].*", "wq": "int8"},),
    "down": ({"pattern": "*.down_proj", "wq": "mxfp4"},),
    "left": ({"pattern": "*.v_proj", "skip": True}, {"pattern": "model.layers.1.mlp.experts.2.up_proj", "skip": True}),
    "router": ({"pattern": "*.mlp.gate", "wq": "int8"},),
    "groups": ({"pattern": "*.k_proj", "group_size": 64, "symmetric": False},),
}


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "deepseek"])
@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_legalize_makes_it_legal_and_never_lowers(profile, family, name):
    schemes, modules, plan = resolved(*MIXES[name], family=family)
    found = profile.legalize(schemes, modules)
    overrides = [o.settings() | {"pattern": o.pattern} for o in plan.overrides]
    lifted = Plan.from_dict({"default": plan.default.settings(), "overrides": [*overrides, *found.overrides]})
    after = dict(lifted.resolve(modules).schemes)
    assert profile.violations(after, modules) == []
    assert bool(found.changes) == bool(profile.violations(schemes, modules))
    for module, scheme in after.items():
        if scheme is not None:
            assert schemes[module] is not None
            assert scheme.format.bits >= schemes[module].format.bits
    assert profile.legalize(after, modules) == ((), ())


def test_unknown_engine():
    with pytest.raises(ConfigError, match="sglang") as caught:
        profile_of("sglang")
    assert "vllm, transformers, any" in caught.value.remedy


def test_no_tensor_is_needed():
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(inspect.getsource(engines)))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert "torch" not in imported


# --- Linears that vLLM builds without their names ---------------------------------------------------------------------


def test_attention_without_names_shares_one_scheme():
    """The first DeepSeek-MoE in vLLM: only a rule for the empty name reaches q, k, v and o."""
    schemes, modules, plan = resolved({"pattern": "model.layers.1.self_attn.o_proj", "wq": "int8"}, family="deepseek")
    profile = VLLM.on("deepseek")
    assert VLLM.violations(schemes, modules) == VLLM.on("olmoe").violations(schemes, modules) == []
    (found,) = profile.violations(schemes, modules)
    assert (found.num_modules, "cannot tell the attention linears" in found.rule) == (8, True)
    assert engines.nameless_scheme(schemes, modules, "deepseek") == {}
    changes = profile.legalize(schemes, modules)
    after = plan.model_copy(update={"overrides": (*plan.overrides, *map(Override.model_validate, changes.overrides))})
    legal = dict(after.resolve(modules).schemes)
    assert profile.violations(legal, modules) == []
    assert str(engines.nameless_scheme(legal, modules, "deepseek")[""]) == "int8 g32"
    assert engines.nameless_scheme(legal, modules, "olmoe") == {}
    assert "any" not in engines.engine_notes(schemes, modules, "compressed-tensors", "deepseek")
    assert engines.engine_notes(schemes, modules, "compressed-tensors", "deepseek")["vllm"]
