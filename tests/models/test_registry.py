"""Every family: its config is read as transformers reads it, its tensors are those on disk, errors name the fault."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from alphaquant.errors import ConfigError
from alphaquant.models import FAMILIES, MLPSpec, ModelSpec, MoESpec, Source, detect
from alphaquant.models.spec import QKNorm, RopeKind
from alphaquant.plan import ModuleKind

from . import families, tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    from alphaquant.plan import Module

each_family = pytest.mark.parametrize("family", FAMILIES)
each_model = pytest.mark.parametrize("name", tiny.MODELS)


@pytest.fixture(scope="session")
def get(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tiny.Tiny]:
    return tiny.zoo(tmp_path_factory.mktemp("registry"))


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A family's config.json; a change to None removes the key."""
    known = {*tiny.MODELS, *families.MODELS, *families.DEEPSEEKS}
    assert family in known, f"add a tiny model of the family {family}"
    config = tiny.config_of(family).to_dict() if family in tiny.MODELS else families.config_of(family)
    config |= changes
    removed = [key for key, value in changes.items() if value is None]
    return {key: value for key, value in config.items() if key not in removed}


def error_of(config: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as info:
        detect(config)
    return info.value


@each_family
def test_the_descriptor_is_read(family: str) -> None:
    config = config_of(family)
    spec = detect(config)
    assert spec.family == family
    assert spec.architecture == FAMILIES[family].architecture
    assert spec.num_layers == config["num_hidden_layers"]
    assert (spec.hidden_size, spec.vocab_size) == (config["hidden_size"], config["vocab_size"])
    assert spec.max_positions == config["max_position_embeddings"]
    assert spec.rms_norm_eps == config["rms_norm_eps"]
    for layer in spec.layers:
        assert layer.attention.num_heads == config["num_attention_heads"]
        is_routed = isinstance(layer.mlp, MoESpec)
        width = config.get("moe_intermediate_size") if is_routed else None
        assert layer.mlp.intermediate_size == (width or config["intermediate_size"])
    assert any(isinstance(layer.mlp, MoESpec) for layer in spec.layers) == ("num_experts_per_tok" in config)


@each_model
def test_tensors_are_those_that_transformers_writes(get: Callable[[str], tiny.Tiny], name: str) -> None:
    model = get(name)
    assert model.spec.expected_tensors() == set(model.checkpoint.names())


@each_model
def test_modules_are_the_weights_on_disk(get: Callable[[str], tiny.Tiny], name: str) -> None:
    model = get(name)
    modules = list(model.spec.modules())
    by_name = {module.name: module for module in modules}
    assert len(by_name) == len(modules) == len({module.alias for module in modules})
    for tensor in model.checkpoint.names():
        shape = model.checkpoint.info(tensor).shape
        if tensor.endswith(".bias"):
            continue
        module = by_name.pop(tensor.removesuffix(".weight"))
        assert (module.out_features, module.in_features) == (shape if len(shape) == 2 else (1, *shape))
        assert (module.kind is ModuleKind.NORM) == (len(shape) == 1)
    assert not by_name


@each_model
def test_every_linear_of_transformers_is_a_module(get: Callable[[str], tiny.Tiny], name: str) -> None:
    model = get(name)
    kinds = {module.name: module.kind for module in model.spec.modules()}
    for path, layer in model.theirs.named_modules():
        if isinstance(layer, nn.Linear) and not (path == "lm_head" and model.spec.tie_embeddings):
            assert path in kinds
    # experts are one 3-D tensor inside transformers: count the matrices
    fused = [p for n, p in model.theirs.named_parameters() if p.ndim == 3]
    matrices = sum(p.shape[0] * (2 if "gate_up" in n else 1) for n, p in model.theirs.named_parameters() if p.ndim == 3)
    assert sum(kind is ModuleKind.EXPERT for kind in kinds.values()) == matrices
    assert bool(fused) == name.startswith("olmoe")


def module(spec: ModelSpec, name: str) -> Module:
    return next(module for module in spec.modules() if module.name == name)


def test_modules_of_olmoe(get: Callable[[str], tiny.Tiny]) -> None:
    spec = get("olmoe").spec
    modules = list(spec.modules())
    assert all(module.name == module.alias for module in modules)
    assert [module.name for module in modules][:2] == ["model.embed_tokens", "model.layers.0.input_layernorm"]
    assert [module.name for module in modules][-2:] == ["model.norm", "lm_head"]
    kinds = [module.kind for module in modules]
    counts = {kind: kinds.count(kind) for kind in ModuleKind}
    assert counts == {
        ModuleKind.ATTENTION: 2 * 4,
        ModuleKind.MLP: 0,
        ModuleKind.EXPERT: 2 * 6 * 3,
        ModuleKind.SHARED_EXPERT: 0,
        ModuleKind.ROUTER: 2,
        ModuleKind.SHARED_EXPERT_GATE: 0,
        ModuleKind.NORM: 2 * 4 + 1,
        ModuleKind.EMBEDDING: 1,
        ModuleKind.HEAD: 1,
    }
    for name, kind, shape in (
        ("model.embed_tokens", ModuleKind.EMBEDDING, (96, 32)),
        ("model.layers.1.self_attn.q_norm", ModuleKind.NORM, (1, 32)),
        ("model.layers.1.self_attn.o_proj", ModuleKind.ATTENTION, (32, 32)),
        ("model.layers.0.mlp.gate", ModuleKind.ROUTER, (6, 32)),
        ("model.layers.1.mlp.experts.5.gate_proj", ModuleKind.EXPERT, (24, 32)),
        ("model.layers.0.mlp.experts.0.down_proj", ModuleKind.EXPERT, (32, 24)),
        ("lm_head", ModuleKind.HEAD, (96, 32)),
    ):
        found = module(spec, name)
        assert (found.kind, found.out_features, found.in_features) == (kind, *shape)
    quantizable = {module.kind for module in modules if module.quantizable_by_default}
    assert quantizable == {ModuleKind.ATTENTION, ModuleKind.EXPERT}


def test_modules_of_dense_families(get: Callable[[str], tiny.Tiny]) -> None:
    grouped = get("llama-grouped-biased").spec
    assert (module(grouped, "model.layers.0.self_attn.k_proj").out_features) == 16
    assert module(grouped, "model.layers.0.mlp.down_proj").kind is ModuleKind.MLP
    wide = get("mistral").spec  # heads are wider than hidden / heads
    assert module(wide, "model.layers.0.self_attn.q_proj").out_features == 48
    assert module(wide, "model.layers.0.self_attn.o_proj").in_features == 48
    assert module(wide, "model.layers.0.self_attn.v_proj").out_features == 24


def test_a_tied_head_is_no_module(get: Callable[[str], tiny.Tiny]) -> None:
    for name in ("llama-tied-linear", "olmoe-all-experts"):
        assert all(module.kind is not ModuleKind.HEAD for module in get(name).spec.modules())


def test_linears_that_share_an_input_say_so(get: Callable[[str], tiny.Tiny]) -> None:
    def sources(name: str) -> dict[str, Source | None]:
        return {p.role: p.source for p in get(name).spec.parameters(0) if p.leaf == "weight"}

    attention = {
        "input_layernorm": None,
        "self_attn.q_proj": Source.ATTENTION_IN,
        "self_attn.k_proj": Source.ATTENTION_IN,
        "self_attn.v_proj": Source.ATTENTION_IN,
        "self_attn.o_proj": Source.ATTENTION_OUT,
        "post_attention_layernorm": None,
    }
    assert sources("olmoe") == attention | {
        "self_attn.q_norm": None,
        "self_attn.k_norm": None,
        "mlp.gate": Source.MLP_IN,
        "mlp.experts.*.gate_proj": Source.EXPERT_IN,
        "mlp.experts.*.up_proj": Source.EXPERT_IN,
        "mlp.experts.*.down_proj": Source.EXPERT_HIDDEN,
    }
    dense = attention | {
        "mlp.gate_proj": Source.MLP_IN,
        "mlp.up_proj": Source.MLP_IN,
        "mlp.down_proj": Source.MLP_HIDDEN,
    }
    assert sources("llama-grouped-biased") == sources("mistral") == dense


def test_a_shared_expert_and_its_gate_are_parameters(get: Callable[[str], tiny.Tiny]) -> None:
    spec = get("olmoe").spec
    moe = spec.layers[0].mlp
    assert isinstance(moe, MoESpec)
    layer = replace(spec.layers[0], mlp=replace(moe, shared=MLPSpec(40), shared_gate=True))
    spec = replace(spec, layers=(layer,))
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in spec.expected_tensors()
    up, gate = (module(spec, f"model.layers.0.mlp.{name}") for name in ("shared_expert.up_proj", "shared_expert_gate"))
    assert (up.kind, up.out_features, up.in_features) == (ModuleKind.SHARED_EXPERT, 40, 32)
    assert (gate.kind, gate.out_features, gate.in_features) == (ModuleKind.SHARED_EXPERT_GATE, 1, 32)
    assert up.quantizable_by_default
    assert not gate.quantizable_by_default
    found = {p.role: p.source for p in spec.parameters(0)}
    assert found["mlp.shared_expert.gate_proj"] is Source.SHARED_IN
    assert found["mlp.shared_expert.down_proj"] is Source.SHARED_HIDDEN
    assert found["mlp.shared_expert_gate"] is Source.MLP_IN


def test_native_names_differ_from_aliases_where_a_family_renames(get: Callable[[str], tiny.Tiny]) -> None:
    renames = {"mlp.gate": "block.router", "mlp.experts.*.gate_proj": "block.experts.*.w1"}
    spec = replace(get("olmoe").spec, renames=renames)
    found = {module.alias: module.name for module in spec.modules()}
    assert found["model.layers.1.mlp.gate"] == "model.layers.1.block.router"
    assert found["model.layers.1.mlp.experts.4.gate_proj"] == "model.layers.1.block.experts.4.w1"
    assert found["model.layers.1.mlp.experts.4.up_proj"] == "model.layers.1.mlp.experts.4.up_proj"
    assert "model.layers.0.block.experts.5.w1.weight" in spec.expected_tensors()
    assert "model.layers.0.mlp.experts.5.gate_proj.weight" not in spec.expected_tensors()
    keys = [p.key for p in spec.parameters(0)]
    assert "mlp.experts.gate_proj.weight" in keys  # what the decoder reads stays canonical


@each_family
def test_an_unknown_activation_is_named(family: str) -> None:
    error = error_of(config_of(family, hidden_act="gelu_pytorch_tanh"))
    assert "hidden_act" in str(error)
    assert "gelu_pytorch_tanh" in str(error)
    assert "silu" in str(error)
    assert error.where


@each_family
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_an_unknown_rope_is_named(family: str, key: str) -> None:
    for section in ("rope_parameters", "rope_scaling"):
        config = config_of(family, rope_parameters=None)
        config[section] = {key: "longrope", "factor": 4.0}
        error = error_of(config)
        assert key in str(error)
        assert "'longrope'" in str(error)
        for kind in RopeKind:
            assert kind.value in str(error)


@pytest.mark.parametrize("name", ["gemma2", "olmo", "", None, 3])
def test_an_unknown_family_lists_the_known_ones(name: Any) -> None:
    config = config_of("olmoe")
    config["model_type"] = name
    error = error_of(config)
    assert repr(name) in str(error)
    for family in FAMILIES:
        assert family in (error.remedy or "")
    assert ("did you mean 'olmoe'" in (error.remedy or "")) == (name == "olmo")


REQUIRED = (
    "hidden_size",
    "hidden_act",
    "vocab_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)


@each_family
def test_a_missing_key_is_named(family: str) -> None:
    config = config_of(family)
    experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config][:1]
    keys = (*REQUIRED, *experts, "num_experts_per_tok") if experts and not family.startswith("qwen") else REQUIRED
    for key in keys:
        for config in (config_of(family, **{key: None}), config_of(family) | {key: None}):
            error = error_of(config)
            assert repr(key) in str(error)
            assert error.where
            assert key in (error.remedy or "")


@each_family
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    if family not in tiny.MODELS:
        pytest.skip("test_families does the same, or transformers has no such family")
    config = config_of(family)
    cls = type(tiny.config_of(family))
    for key in sorted(config.keys() - {"model_type", "dtype"}):
        left = {name: value for name, value in config.items() if name != key}
        try:
            spec = detect(left)
        except ConfigError as error:
            assert key in str(error)  # noqa: PT017
            continue
        assert spec == detect(cls(**left).to_dict()), key


@each_family
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", "4"),
        ("num_hidden_layers", True),
        ("num_attention_heads", 4.0),
        ("num_attention_heads", 0),
        ("hidden_size", -32),
        ("vocab_size", 1 << 40),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-5"),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 0),
        ("dtype", "int8"),
        ("dtype", ["float32"]),
        ("rope_parameters", "default"),
        ("hidden_act", ["silu"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key(family: str, key: str, value: Any) -> None:
    error = error_of(config_of(family) | {key: value})
    assert key in str(error)
    assert repr(value) in str(error)
    assert error.where


@each_family
def test_heads_that_do_not_divide_are_an_error(family: str) -> None:
    error = error_of(config_of(family) | {"num_key_value_heads": 3})
    assert "num_key_value_heads 3" in str(error)
    if family == "qwen3" or "qk_rope_head_dim" in config_of(family):  # their heads do not follow from the hidden size
        return
    config = config_of(family, head_dim=None)
    error = error_of(config | {"num_attention_heads": 5, "num_key_value_heads": 5})
    assert f"hidden_size {config['hidden_size']}" in str(error)
    assert "num_attention_heads 5" in str(error)


def test_more_experts_a_token_than_experts_is_an_error() -> None:
    error = error_of(config_of("olmoe", num_experts_per_tok=7))
    assert "num_experts_per_tok 7" in str(error)
    assert "6 experts" in str(error)


def test_variants_reach_the_descriptor(get: Callable[[str], tiny.Tiny]) -> None:
    clipped = get("olmoe-normalised-clipped").spec.layers[0]
    assert clipped.attention.clip_qkv == 0.8
    assert clipped.attention.qk_norm is QKNorm.FULL
    assert isinstance(clipped.mlp, MoESpec)
    assert clipped.mlp.normalize_top_k
    assert get("olmoe").spec.layers[0].attention.clip_qkv is None
    assert get("olmoe-bias-top1").spec.layers[0].attention.qkv_bias
    biased = get("llama-grouped-biased").spec.layers[0]
    assert (biased.attention.qkv_bias, biased.attention.out_bias) == (True, True)
    assert biased.mlp == MLPSpec(48, bias=True)
    assert (biased.attention.num_heads, biased.attention.num_kv_heads) == (4, 2)
    assert get("mistral").spec.layers[1].attention.sliding_window == 5
    assert get("mistral-unlimited").spec.layers[1].attention.sliding_window is None
    assert get("mistral").spec.layers[0].attention.head_dim == 12


def test_rope_is_read_in_the_words_of_transformers_4_and_5() -> None:
    linear = {"factor": 3.0}
    five = detect(config_of("llama") | {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, **linear}})
    for key in ("rope_type", "type"):
        four = config_of("llama", rope_parameters=None) | {
            "rope_theta": 300.0,
            "rope_scaling": {key: "linear", **linear},
        }
        assert detect(four).rope == five.rope
    plain = config_of("llama", rope_parameters=None) | {"rope_theta": 300.0, "rope_scaling": None}
    assert detect(plain).rope.theta == 300.0
    assert detect(plain).rope.kind is RopeKind.DEFAULT
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        rope = dict(tiny.MODELS["llama-llama3"][1]["rope_parameters"])
        assert detect(config_of("llama") | {"rope_parameters": rope}).rope.kind is RopeKind.LLAMA3
        del rope[key]
        assert repr(key) in str(error_of(config_of("llama") | {"rope_parameters": rope}))


def test_the_dtype_is_read_in_the_words_of_transformers_4_and_5() -> None:
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        assert detect(config_of("llama") | {"dtype": name}).dtype is dtype
        assert detect(config_of("llama", dtype=None) | {"torch_dtype": name}).dtype is dtype
    assert detect(config_of("llama", dtype=None)).dtype is torch.float32
