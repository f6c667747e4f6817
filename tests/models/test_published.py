"""Published models: their sizes, the plans that ship with the project, and faults in a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from alphaquant.errors import ConfigError, PlanError
from alphaquant.models import FAMILIES, MLPSpec, ModelSpec, MoESpec, detect
from alphaquant.plan import ModuleKind, Plan

CONFIGS = Path(__file__).parents[2] / "configs"


def moe_of(spec: ModelSpec, layer: int) -> MoESpec:
    mlp = spec.layers[layer].mlp
    assert isinstance(mlp, MoESpec)
    return mlp


# --- Published models -----------------------------------------------------------------------------------------------


class Published(NamedTuple):
    """A model as its config.json describes it, with the number of parameters that its makers tell."""

    architecture: str
    num_parameters: int
    config: dict[str, Any]


def published(architecture: str, num_parameters: int, **config: Any) -> Published:
    common = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    return Published(architecture, num_parameters, common | config)


def decoder(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
PUBLISHED = {
    "olmoe": published(
        "olmoe",
        6_919_161_856,
        **decoder(2048, 1024, 16, 16, 16, 50304),
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
    ),
    "mixtral": published(
        "mixtral",
        46_702_792_704,
        **decoder(4096, 14336, 32, 32, 8, 32000),
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    ),
    "qwen2_moe": published(
        "qwen",
        14_315_784_192,
        **decoder(2048, 5632, 24, 16, 16, 151936),
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        use_sliding_window=False,
        sliding_window=32768,
        max_window_layers=21,
    ),
    "qwen3_moe": published(
        "qwen",
        30_532_122_624,
        **decoder(2048, 6144, 48, 32, 4, 151936),
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        head_dim=128,
        mlp_only_layers=[],
        norm_topk_prob=True,
    ),
    "deepseek": published(
        "deepseek",
        16_375_728_128,
        **decoder(2048, 10944, 28, 16, 16, 102400),
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        rope_scaling=None,
    ),
    "deepseek_v2": published(  # Lite
        "deepseek",
        15_706_484_224,
        **decoder(2048, 10944, 27, 16, 16, 102400),
        **LATENT,
        q_lora_rank=None,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        rope_scaling=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek_v3": published(
        "deepseek",
        671_026_419_200,
        **decoder(7168, 18432, 61, 128, 128, 129280),
        **LATENT,
        q_lora_rank=1536,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        topk_method="noaux_tc",
        n_group=8,
        topk_group=4,
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "glm4_moe": published(  # GLM-4.5-Air
        "glm",
        106_852_251_264,
        **decoder(4096, 10944, 46, 96, 8, 151552),
        head_dim=128,
        attention_bias=True,
        use_qk_norm=False,
        partial_rotary_factor=0.5,
        n_routed_experts=128,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        num_nextn_predict_layers=1,
    ),
    "llama": published("standard", 8_030_261_248, **decoder(4096, 14336, 32, 32, 8, 128256)),
    "mistral": published("standard", 7_241_732_096, **decoder(4096, 14336, 32, 32, 8, 32000)),
    "qwen2": published("standard", 494_032_768, **decoder(896, 4864, 24, 14, 2, 151936), tie_word_embeddings=True),
    "qwen3": published("standard", 596_049_920, **decoder(1024, 3072, 28, 16, 8, 151936), tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=FAMILIES)
def known(request: pytest.FixtureRequest) -> tuple[str, ModelSpec]:
    assert request.param in PUBLISHED, f"add a published model of the family {request.param}"
    return request.param, detect(PUBLISHED[request.param].config | {"model_type": request.param})


def test_published_models_have_the_size_that_is_told(known: tuple[str, ModelSpec]) -> None:
    family, spec = known
    assert spec.architecture == PUBLISHED[family].architecture == FAMILIES[family].architecture
    parameters = [p for layer in range(spec.num_layers) for p in spec.parameters(layer)]
    total = 0
    for parameter in (*parameters, *spec.outer_parameters()):
        total += (parameter.num_experts or 1) * torch.Size(parameter.shape).numel()
    assert total == PUBLISHED[family].num_parameters


def _is_dense(spec: ModelSpec, config: str) -> bool:
    first = {"gptq_example.json": 0, "gptq_olmoe_mixed.json": 1, "gptq_mixed_precision.json": 2}[config]
    return first > 0 and all(isinstance(layer.mlp, MLPSpec) for layer in spec.layers[:first])


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.json")))
def test_the_configs_resolve_on_every_family(known: tuple[str, ModelSpec], config: str) -> None:
    family, spec = known
    plan, modules = Plan.load(CONFIGS / config), list(spec.modules())
    if PUBLISHED[family].config["intermediate_size"] % 128 and config == "gptq_example.json":
        with pytest.raises(PlanError, match="group size 128 does not divide the 10944 inputs") as caught:
            plan.resolve(modules)
        assert "64" in (caught.value.remedy or "")
        return
    schemes = plan.resolve(modules).schemes
    by_kind: dict[ModuleKind, set[str]] = {kind: set() for kind in ModuleKind}
    for module in modules:
        scheme = schemes[module.name]
        by_kind[module.kind].add("none" if scheme is None else scheme.format.name)
    expected = {
        "gptq_example.json": ({"int4"}, {"int4"}, {"int4"}, {"int4"}),
        "gptq_olmoe_mixed.json": ({"mxfp6"}, {"int4", "mxfp4"}, {"int4"}, {"int4"}),
        "gptq_mixed_precision.json": ({"int8", "mxfp6"}, {"int4", "int3"}, {"fp8"}, {"int4"}),
    }[config]
    kinds = (ModuleKind.ATTENTION, ModuleKind.EXPERT, ModuleKind.SHARED_EXPERT, ModuleKind.MLP)
    for kind, formats in zip(kinds, expected, strict=True):
        if kind is ModuleKind.EXPERT and _is_dense(spec, config):
            formats = formats - {"int4"}  # noqa: PLW2901  (which both configs keep for the first layers)
        assert by_kind[kind] in (formats, set()), kind
    has_experts = isinstance(spec.layers[-1].mlp, MoESpec)
    assert bool(by_kind[ModuleKind.EXPERT]) == has_experts
    config_json = PUBLISHED[family].config
    is_shared = "n_shared_experts" in config_json or "shared_expert_intermediate_size" in config_json
    assert bool(by_kind[ModuleKind.SHARED_EXPERT]) == is_shared
    for kind in (ModuleKind.ROUTER, ModuleKind.SHARED_EXPERT_GATE, ModuleKind.NORM, ModuleKind.HEAD):
        assert by_kind[kind] <= {"none"}


@pytest.mark.parametrize(
    ("family", "pattern", "expected"),
    [
        ("mixtral", "*.block_sparse_moe.experts.3.w2", 32),
        ("mixtral", "model.layers.0.mlp.experts.*.gate_proj", 8),
        ("deepseek", "*.mlp.shared_experts.up_proj", 27),
        ("deepseek", "*.mlp.shared_expert.up_proj", 27),
    ],
)
def test_native_names_and_aliases_reach_the_same_modules(family: str, pattern: str, expected: int) -> None:
    spec = detect(PUBLISHED[family].config | {"model_type": family})
    plan = Plan.from_dict(
        {"default": {"wq": "bf16"}, "overrides": [{"pattern": pattern, "wq": "int4", "group_size": 64}]}
    )
    resolved = plan.resolve(list(spec.modules()))
    assert sum(scheme is not None for scheme in resolved.schemes.values()) == expected
    assert not resolved.warnings


def test_patterns_of_other_families_are_a_warning() -> None:
    for family, pattern in (("olmoe", "*.mlp.shared_experts.*"), ("qwen2", "*.block_sparse_moe.experts.*.w1")):
        spec = detect(PUBLISHED[family].config | {"model_type": family})
        plan = Plan.from_dict({"default": {"wq": "int4"}, "overrides": [{"pattern": pattern, "wq": "int8"}]})
        assert len(plan.resolve(list(spec.modules())).warnings) == 1


# --- Config ---------------------------------------------------------------------------------------------------------

FAULTS = [
    ("deepseek", {"scoring_func": "sigmoid"}, ("scoring_func", "'sigmoid'", "softmax")),
    ("deepseek", {"topk_method": "group_limited_greedy"}, ("topk_method", "greedy")),
    ("deepseek", {"n_group": 8}, ("n_group", "8")),
    ("deepseek", {"topk_group": 0}, ("topk_group", "0")),
    ("deepseek", {"routed_scaling_factor": -1}, ("routed_scaling_factor", "-1")),
    ("deepseek", {"n_shared_experts": 1.5}, ("n_shared_experts", "1.5")),
    ("deepseek", {"first_k_dense_replace": -1}, ("first_k_dense_replace", "-1")),
    ("deepseek", {"moe_layer_freq": 0}, ("moe_layer_freq", "0")),
    ("deepseek", {"moe_layer_freq": [0, 1]}, ("moe_layer_freq", "[0, 1]")),
    ("deepseek", {"n_routed_experts": None}, ("n_routed_experts",)),
    ("deepseek", {"num_experts_per_tok": 65}, ("num_experts_per_tok 65", "64 experts")),
    ("deepseek_v2", {"norm_topk_prob": True}, ("norm_topk_prob", "True", "not implemented")),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, ("topk_method", "'noaux_tc'", "group_limited_greedy")),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, ("scoring_func", "'sigmoid'", "softmax")),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 7}, ("n_group 7", "64 experts")),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "topk_group": 2}, ("topk_group 2", "n_group 1")),
    ("deepseek_v2", {"num_key_value_heads": 8}, ("num_key_value_heads 8", "num_attention_heads 16")),
    ("deepseek_v2", {"kv_lora_rank": None}, ("kv_lora_rank",)),
    ("deepseek_v2", {"q_lora_rank": 0}, ("q_lora_rank", "0")),
    ("deepseek_v2", {"qk_rope_head_dim": 63}, ("qk_rope_head_dim 63",)),
    ("deepseek_v2", {"mlp_bias": True}, ("mlp_bias", "True")),
    ("deepseek_v3", {"scoring_func": "softmax"}, ("scoring_func", "'softmax'", "sigmoid")),
    ("deepseek_v3", {"topk_method": "greedy"}, ("topk_method", "'greedy'", "noaux_tc")),
    ("deepseek_v3", {"n_group": None}, ("n_group",)),
    ("deepseek_v3", {"n_group": 256}, ("n_group 256", "256 experts")),
    ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 33}, ("num_experts_per_tok 33", "32 experts")),
    ("deepseek_v3", {"rope_interleave": "yes"}, ("rope_interleave", "'yes'")),
    ("deepseek_v3", {"first_k_dense_replace": None}, ("first_k_dense_replace",)),
    ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": -1}}, ("factor", "-1")),
    ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5", "no other is implemented")),
    ("mixtral", {"num_local_experts": None}, ("num_local_experts",)),
    ("mixtral", {"num_experts": 9}, ("num_local_experts", "num_experts", "9")),
    ("mixtral", {"sliding_window": 0}, ("sliding_window", "0")),
    ("mixtral", {"num_experts_per_tok": 9}, ("num_experts_per_tok 9", "8 experts")),
    ("qwen2_moe", {"use_sliding_window": True}, ("use_sliding_window", "True", "not implemented")),
    ("qwen2_moe", {"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, ("layer_types", "sliding")),
    ("qwen2_moe", {"mlp_only_layers": [0, -1]}, ("mlp_only_layers", "-1")),
    ("qwen2_moe", {"mlp_only_layers": "0"}, ("mlp_only_layers",)),
    ("qwen2_moe", {"decoder_sparse_step": 0}, ("decoder_sparse_step", "0")),
    ("qwen2_moe", {"shared_expert_intermediate_size": None}, ("shared_expert_intermediate_size",)),
    ("qwen2_moe", {"moe_intermediate_size": None}, ("moe_intermediate_size",)),
    ("qwen2_moe", {"norm_topk_prob": "yes"}, ("norm_topk_prob", "'yes'")),
    ("qwen3_moe", {"use_sliding_window": True}, ("use_sliding_window", "not implemented")),
    ("qwen3_moe", {"head_dim": 127}, ("head_dim", "127")),
    ("qwen2", {"layer_types": ["full_attention"]}, ("layer_types", "24")),
    ("qwen2", {"layer_types": ["full_attention"] * 23 + ["linear_attention"]}, ("layer_types", "linear_attention")),
    ("qwen2", {"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, ("layer_types", "layer 23")),
    ("qwen2", {"max_window_layers": "21"}, ("max_window_layers", "'21'")),
    ("qwen3", {"use_sliding_window": 1}, ("use_sliding_window", "1")),
]


@pytest.mark.parametrize(("family", "changes", "words"), FAULTS)
def test_a_fault_in_the_config_is_named(family: str, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    config = PUBLISHED[family].config | {"model_type": family} | changes
    with pytest.raises(ConfigError) as caught:
        detect(config, "somewhere/config.json")
    for word in words:
        assert word in str(caught.value)
    assert "somewhere/config.json" in str(caught.value.where)


@pytest.mark.parametrize("family", FAMILIES)
def test_behaviours_that_nobody_implements_are_named(family: str) -> None:
    config = PUBLISHED[family].config | {"model_type": family}
    for key, value in (("hidden_act", "gelu"), ("rope_scaling", {"type": "longrope", "factor": 4.0})):
        with pytest.raises(ConfigError) as caught:
            detect(config | {key: value})
        assert ("'gelu'" if key == "hidden_act" else "'longrope'") in str(caught.value)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        with pytest.raises(ConfigError, match=key):
            detect({name: value for name, value in config.items() if name != key})


def test_what_a_config_leaves_out() -> None:
    def spec(family: str, *left: str, **changes: Any) -> ModelSpec:
        config = PUBLISHED[family].config | {"model_type": family} | changes
        return detect({key: value for key, value in config.items() if key not in left})

    assert spec("mixtral").rope.theta == 1e6
    assert spec("qwen2_moe").rope.theta == 10000.0
    assert spec("mixtral", rope_theta=5.0).rope.theta == 5.0
    assert spec("qwen3").layers[0].attention.head_dim == 128
    assert spec("qwen3_moe", "head_dim").layers[0].attention.head_dim == 64
    windows = [
        layer.attention.sliding_window for layer in spec("qwen2", use_sliding_window=True, num_hidden_layers=30).layers
    ]
    assert windows == [None] * 28 + [4096] * 2
    assert spec("qwen3_moe", "num_experts", num_local_experts=128) == spec("qwen3_moe")
    assert all(layer.attention.qkv_bias and not layer.attention.out_bias for layer in spec("qwen2_moe").layers)
    deepseek = spec("deepseek", "n_shared_experts", "first_k_dense_replace")
    assert moe_of(deepseek, 0).shared is None
    assert moe_of(deepseek, 0).routed_scaling == 1.0
    assert moe_of(spec("deepseek"), 1).shared == MLPSpec(2816)
    assert isinstance(spec("deepseek").layers[0].mlp, MLPSpec)
    assert [isinstance(x.mlp, MoESpec) for x in spec("qwen2_moe", decoder_sparse_step=3).layers[:6]] == [
        False,
        False,
        True,
    ] * 2


def test_a_descriptor_is_short_and_knows_no_other_family() -> None:
    import alphaquant.models.families as package  # noqa: PLC0415

    root = Path(package.__file__).parent
    for family in FAMILIES:
        text = (root / f"{family}.py").read_text()
        assert len(text.splitlines()) <= 45
    for path in root.parent.rglob("*.py"):
        assert path.name == "registry.py" or "model_type" not in path.read_text(), path
