"""Every family of mixtures and of Qwen: against transformers or a naive reference, and quantized end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from alphaquant.checkpoint import Checkpoint
from alphaquant.errors import CheckpointError, ConfigError, PlanError
from alphaquant.formats import dequantize
from alphaquant.layouts import QuantizedCheckpoint
from alphaquant.models import (
    FAMILIES,
    MLPSpec,
    ModelSpec,
    MoESpec,
    Source,
    check_tensors,
    detect,
    load_decoder,
    mlp_half,
    unfused,
)
from alphaquant.models.moe import route
from alphaquant.pipeline import load
from alphaquant.pipeline.collect import Collector
from alphaquant.plan import ModuleKind, Plan
from alphaquant.solver import Effort, Recipe
from pipeline import tiny as runs

from . import deepseek_reference, tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CLASSES = {"mixtral": "Mixtral", "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
MIXTRAL = {"num_local_experts": 6, "intermediate_size": 64}
QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = {"shared_expert_intermediate_size": 96}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral-window-top3": ("mixtral", MIXTRAL | {"sliding_window": 5, "num_experts_per_tok": 3, "head_dim": 12}),
    "qwen2_moe": ("qwen2_moe", QWEN | SHARED),
    "qwen2_moe-some-dense": (
        "qwen2_moe",
        QWEN | SHARED | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "qkv_bias": False},
    ),
    "qwen2_moe-normalised": ("qwen2_moe", QWEN | SHARED | {"norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3_moe", QWEN | {"head_dim": 32, "norm_topk_prob": True}),
    "qwen3_moe-some-dense": (
        "qwen3_moe",
        QWEN | {"mlp_only_layers": [2], "attention_bias": True, "norm_topk_prob": False},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_hidden_layers": 2,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-windows-tied": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}
DEEPSEEK = {
    **SIZES,
    "model_type": "deepseek",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "dtype": "float32",
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
}
DEEPSEEKS: dict[str, dict[str, Any]] = {
    "deepseek": {},
    "deepseek-normalised-scaled": {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_shared_experts": 1},
    "deepseek-scaled": {"routed_scaling_factor": 0.5, "n_shared_experts": None, "attention_bias": True},
    "deepseek-every-second": {"moe_layer_freq": 2, "num_hidden_layers": 4, "num_experts_per_tok": 3},
    "deepseek-top1": {"norm_topk_prob": True, "num_experts_per_tok": 1, "first_k_dense_replace": 0},
}
NEW = [*CLASSES, "deepseek"]
each_model = pytest.mark.parametrize("name", MODELS)
each_moe = pytest.mark.parametrize("name", [name for name in MODELS if "moe" in name or name.startswith("mixtral")])
each_deepseek = pytest.mark.parametrize("name", DEEPSEEKS)


def save_with_transformers(directory: Path, name: str) -> Any:
    """Write a tiny model of `MODELS` as transformers writes it."""
    import transformers  # noqa: PLC0415  (slow)

    family, particular = MODELS[name]
    config = getattr(transformers, f"{CLASSES[family]}Config")(**(SIZES | particular))
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).eval().requires_grad_(requires_grad=False)
    tiny.randomise(model)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory, safe_serialization=True)
    return model


def save_deepseek(directory: Path, name: str) -> dict[str, Any]:
    """Write a tiny DeepSeek-MoE with names and shapes spelled out here, not by the library."""
    config = {key: value for key, value in (DEEPSEEK | DEEPSEEKS[name]).items() if value is not None}
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (128, hidden), "lm_head": (128, hidden), "model.norm": (hidden,)}
    biases = {}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for projection, out in {"q": hidden, "k": kv, "v": kv, "o": hidden}.items():
            shapes[f"{at}.self_attn.{projection}_proj"] = (out, hidden)
            if config.get("attention_bias"):
                biases[f"{at}.self_attn.{projection}_proj.bias"] = (out,)
        shapes |= {f"{at}.input_layernorm": (hidden,), f"{at}.post_attention_layernorm": (hidden,)}
        blocks = {f"{at}.mlp": config["intermediate_size"]}
        if layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0:
            blocks = {f"{at}.mlp.experts.{expert}": inner for expert in range(config["n_routed_experts"])}
            shapes[f"{at}.mlp.gate"] = (config["n_routed_experts"], hidden)
            if shared := config.get("n_shared_experts"):
                blocks[f"{at}.mlp.shared_experts"] = shared * inner
        for block, width in blocks.items():
            shapes |= {f"{block}.gate_proj": (width, hidden), f"{block}.up_proj": (width, hidden)}
            shapes[f"{block}.down_proj"] = (hidden, width)
    module = torch.nn.ParameterDict()
    holder = torch.nn.Module()
    for full, shape in ({f"{key}.weight": shape for key, shape in shapes.items()} | biases).items():
        module[full.replace(".", "/")] = torch.nn.Parameter(torch.empty(shape))
    holder.tensors = module
    tiny.randomise(holder)
    directory.mkdir(parents=True)
    tensors = {key.replace("/", "."): value.detach() for key, value in module.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return config


class Made(NamedTuple):
    """A tiny model on disk, with the transformers model where there is one."""

    path: Path
    theirs: Any

    @property
    def tiny(self) -> tiny.Tiny:
        checkpoint = Checkpoint.open(self.path)
        return tiny.Tiny(self.theirs, checkpoint, detect(checkpoint.config))

    def tensors(self) -> dict[str, Tensor]:
        checkpoint = Checkpoint.open(self.path)
        return {name: checkpoint.read(name) for name in checkpoint.names()}


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Models by name, each made once; nothing may write into them."""
    made: dict[str, Made] = {}
    root = tmp_path_factory.mktemp("families")

    def one(name: str) -> Made:
        if name not in made:
            theirs = save_with_transformers(root / name, name) if name in MODELS else None
            if theirs is None:
                save_deepseek(root / name, name)
            runs.write_tokenizer(root / name / "tokenizer.json")
            made[name] = Made(root / name, theirs)
        return made[name]

    return one


def witness(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ids: Tensor, directory: Path) -> Tensor:
    """Logits of native tensors by transformers, read through its own names, or by the naive reference."""
    import transformers  # noqa: PLC0415  (slow)

    if config["model_type"] == "deepseek":
        return deepseek_reference.logits(tensors, config, ids)
    directory.mkdir()
    save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(config)))
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max())


def moe_of(spec: ModelSpec, layer: int) -> MoESpec:
    mlp = spec.layers[layer].mlp
    assert isinstance(mlp, MoESpec)
    return mlp


# --- Parity ---------------------------------------------------------------------------------------------------------


@each_model
def test_logits(get: Callable[[str], Made], name: str) -> None:
    model, ids = get(name).tiny, tiny.token_ids(vocab_size=128)
    found, truth = model.ours().logits(ids), model.theirs(ids).logits
    assert found.dtype == torch.float32
    assert truth.std() > 0.5  # else agreement says little
    assert error(found, truth) < 1e-4


@each_deepseek
def test_logits_of_deepseek(get: Callable[[str], Made], name: str) -> None:
    made, ids = get(name), tiny.token_ids(2, 9, vocab_size=128)
    model = made.tiny
    truth = deepseek_reference.logits(made.tensors(), model.checkpoint.config, ids)
    assert truth.std() > 0.5
    assert error(model.ours().logits(ids), truth) < 1e-4


@pytest.mark.parametrize("name", [*MODELS, *DEEPSEEKS])
def test_every_weight_shows_in_the_logits(get: Callable[[str], Made], name: str) -> None:
    decoder, ids = get(name).tiny.ours(), tiny.token_ids(4, 16, vocab_size=128)
    truth = decoder.logits(ids)  # what test_logits compares would notice an error in any of them
    for weights in (decoder.outer, *decoder.layers):
        for key, weight in weights.items():
            saved = weight.clone()
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
            assert error(decoder.logits(ids), truth) > 3e-3, key
            weight.copy_(saved)


@each_model
def test_tensors_are_those_that_transformers_writes(get: Callable[[str], Made], name: str) -> None:
    model = get(name).tiny
    assert model.spec.expected_tensors() == set(model.checkpoint.names())
    modules = {module.name: module for module in model.spec.modules()}
    assert len({module.alias for module in modules.values()}) == len(modules)
    for tensor in model.checkpoint.names():
        shape = model.checkpoint.info(tensor).shape
        if not tensor.endswith(".bias"):
            module = modules.pop(tensor.removesuffix(".weight"))
            assert (module.out_features, module.in_features) == (shape if len(shape) == 2 else (1, *shape))
    assert not modules


@each_moe
def test_experts_are_theirs(get: Callable[[str], Made], name: str) -> None:
    model = get(name).tiny
    layers = zip(model.ours().layers, model.theirs.model.layers, strict=True)
    for ours, theirs in layers:
        if not hasattr(theirs.mlp, "experts"):
            assert "mlp.gate.weight" not in ours
            continue
        gate, up = theirs.mlp.experts.gate_up_proj.chunk(2, 1)
        assert ours["mlp.experts.gate_proj.weight"].equal(gate)
        assert ours["mlp.experts.up_proj.weight"].equal(up)
        assert ours["mlp.experts.down_proj.weight"].equal(theirs.mlp.experts.down_proj)


@each_moe
def test_routing_is_theirs(get: Callable[[str], Made], name: str) -> None:
    model, ids = get(name).tiny, tiny.token_ids(4, 16, vocab_size=128)
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    hooks = [
        block.mlp.gate.register_forward_hook(
            lambda _, inputs, outputs, layer=layer: seen.__setitem__(layer, (inputs[0], outputs[1], outputs[2]))
        )
        for layer, block in enumerate(model.theirs.model.layers)
        if hasattr(block.mlp, "gate")
    ]
    model.theirs(ids)
    for hook in hooks:
        hook.remove()
    assert list(seen) == [i for i, layer in enumerate(model.spec.layers) if isinstance(layer.mlp, MoESpec)]
    decoder = model.ours()
    for layer, (x, scores, experts) in seen.items():
        choice = route(x.reshape(-1, x.shape[-1]), decoder.layers[layer]["mlp.gate.weight"], moe_of(model.spec, layer))
        assert choice.topk_ids_TK.equal(experts)
        assert error(choice.score_TK, scores) < 1e-6
        is_whole = name.startswith("mixtral") or name in ("qwen2_moe-normalised", "qwen3_moe")
        assert choice.score_TK.sum(-1).allclose(torch.ones(())) == is_whole


@each_deepseek
def test_routing_of_deepseek_is_the_references(get: Callable[[str], Made], name: str) -> None:
    model = get(name).tiny
    layer = next(i for i, layer in enumerate(model.spec.layers) if isinstance(layer.mlp, MoESpec))
    router = model.checkpoint.read(f"model.layers.{layer}.mlp.gate.weight")
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    choice = route(x, router, moe_of(model.spec, layer))
    for token in range(len(x)):
        truth = deepseek_reference.choose(x[token].double(), router.double(), model.checkpoint.config)
        assert choice.topk_ids_TK[token].tolist() == list(truth)
        assert choice.score_TK[token].tolist() == pytest.approx(list(truth.values()), rel=1e-5)


def test_windows_hide_what_lies_before_them(get: Callable[[str], Made]) -> None:
    windows = {
        "mixtral-window-top3": [5, 5, 5],
        "qwen2-windows": [None, 5, 5],
        "qwen2-types": [4, None],
        "qwen3-windows-tied": [None, 3, 3],
        "qwen2": [None, None, None],
        "qwen3_moe": [None, None, None],
    }
    for name, expected in windows.items():
        assert [layer.attention.sliding_window for layer in get(name).tiny.spec.layers] == expected


# --- Fused experts --------------------------------------------------------------------------------------------------


def fused(made: Made) -> dict[str, Tensor]:
    """The tensors of transformers' own model, experts in 3-D, where it shares none."""
    shared = {"lm_head.weight"} if made.tiny.spec.tie_embeddings else set()
    return {name: tensor for name, tensor in made.theirs.state_dict().items() if name not in shared}


@each_moe
def test_fused_experts_are_read_as_single_ones(get: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    made, ids = get(name), tiny.token_ids(vocab_size=128)
    model, tensors = made.tiny, fused(made)
    assert "model.layers.1.mlp.experts.gate_up_proj" in tensors or "some-dense" in name
    assert set(tensors) != set(model.checkpoint.names())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(model.checkpoint.config))
    loaded, expected = load(tmp_path), model.ours()
    for ours, truth in zip(loaded.layers, expected.layers, strict=True):
        assert ours.keys() == truth.keys()
        assert all(ours[key].equal(truth[key]) for key in truth)
    assert error(loaded.logits(ids), model.theirs(ids).logits) < 1e-4
    source = unfused(tiny.Source(Checkpoint.open(tmp_path)), model.spec)
    assert source.names() == model.checkpoint.names()
    for tensor in source.names():
        out = torch.empty(source.shape(tensor), dtype=torch.bfloat16)
        source.read_into(tensor, out)
        assert out.equal(model.checkpoint.read(tensor).bfloat16()), tensor


def test_a_fused_tensor_is_read_once_in_a_row(get: Callable[[str], Made], tmp_path: Path) -> None:
    made = get("qwen3_moe")
    save_file(fused(made), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(made.tiny.checkpoint.config))
    reads: list[str] = []

    class Counted(tiny.Source):
        def read_into(self, name: str, out: Tensor) -> None:
            reads.append(name)
            super().read_into(name, out)

    load_decoder(Counted(Checkpoint.open(tmp_path)), made.tiny.spec)
    assert len(reads) == len(set(reads)) == len(fused(made))


def test_single_experts_are_left_as_they_are(get: Callable[[str], Made]) -> None:
    for name in ("mixtral", "deepseek", "qwen2"):
        source = get(name).tiny.source
        assert unfused(source, get(name).tiny.spec) is source


def test_a_fused_tensor_of_another_shape_is_named(get: Callable[[str], Made]) -> None:
    model, tensors = get("qwen2_moe").tiny, fused(get("qwen2_moe"))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    gone: dict[str, Tensor | None] = {key: None for key in model.checkpoint.names() if key not in tensors}
    for wrong in (tensors[name].transpose(1, 2), tensors[name][:5], tensors[name][:, :64]):
        with pytest.raises(CheckpointError, match=name) as caught:
            load_decoder(tiny.Source(model.checkpoint, gone | tensors | {name: wrong.contiguous()}), model.spec)
        assert "[6, 128, 64]" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj"):
        load_decoder(tiny.Source(model.checkpoint, gone | tensors | {name: None}), model.spec)


# --- The shared expert's gate ---------------------------------------------------------------------------------------


def test_the_gate_weighs_the_shared_experts_hessian(get: Callable[[str], Made]) -> None:
    model = get("qwen2_moe").tiny
    weights, spec, power = model.ours().layers[1], model.spec, 1.0
    collector = Collector(spec.parameters(1), {Source.SHARED_IN, Source.SHARED_HIDDEN, Source.MLP_IN}, power)
    x = torch.randn(3, 11, 64, generator=torch.Generator().manual_seed(0))
    mlp_half(x, weights, spec, 1, tap=collector)
    x = x.flatten(0, 1).double()
    x = x * (x.square().mean(-1, keepdim=True) + spec.rms_norm_eps).rsqrt()
    x = x * weights["post_attention_layernorm.weight"]
    gate = 1 / (1 + torch.exp(-(x @ weights["mlp.shared_expert_gate.weight"].double().T)))
    assert gate.min() < 0.2
    assert gate.max() > 0.8
    first, second = (x @ weights[f"mlp.shared_expert.{part}_proj.weight"].double().T for part in ("gate", "up"))
    for source, inputs in ((Source.SHARED_IN, x), (Source.SHARED_HIDDEN, F.silu(first) * second)):
        truth = sum(g * torch.outer(row, row) for g, row in zip(gate[:, 0], inputs, strict=True)) / gate.sum()
        found = collector.hessians[source]
        assert found.normalized().shape[0] == 1
        torch.testing.assert_close(found.normalized()[0].double(), truth, rtol=1e-4, atol=1e-5)
        assert found.evidence.tokens_E.tolist() == [33]
        assert float(found.evidence.effective_E) == pytest.approx(float(gate.sum() ** 2 / gate.square().sum()))
    # router and gate read every token alike
    plain = collector.hessians[Source.MLP_IN].normalized()[0].double()
    torch.testing.assert_close(plain, x.T @ x / 33, rtol=1e-4, atol=1e-5)


def test_shared_experts_without_a_gate_weigh_every_token_alike(get: Callable[[str], Made]) -> None:
    model = get("deepseek").tiny
    collector = Collector(model.spec.parameters(1), {Source.SHARED_IN}, 1.0)
    mlp_half(torch.randn(2, 9, 64), model.ours().layers[1], model.spec, 1, tap=collector)
    assert collector.hessians[Source.SHARED_IN].evidence.effective_E.tolist() == [18.0]


def test_scaled_scores_are_what_the_hessians_weigh(get: Callable[[str], Made]) -> None:
    model = get("deepseek-normalised-scaled").tiny
    collector = Collector(model.spec.parameters(1), {Source.EXPERT_IN}, 1.0)
    mlp_half(torch.randn(2, 9, 64), model.ours().layers[1], model.spec, 1, tap=collector)
    assert float(collector.hessians[Source.EXPERT_IN].evidence.score_mass_E.sum()) == pytest.approx(2.5 * 18)


# --- End to end -----------------------------------------------------------------------------------------------------


def plans() -> dict[str, dict[str, Any]]:
    mixed = json.loads((CONFIGS / "gptq_mixed_precision.json").read_text())
    return {"served": runs.SERVED_PLAN, "humming": runs.HUMMING_PLAN, "mixed": mixed}


@pytest.mark.parametrize("family", NEW)
@pytest.mark.parametrize("plan", ["served", "humming", "mixed"])
def test_quantized_end_to_end(get: Callable[[str], Made], tmp_path: Path, text: Path, family: str, plan: str) -> None:
    """What is loaded computes what another implementation computes with the weights that the codes stand for."""
    made, ids = get(family), tiny.token_ids(2, 9, vocab_size=128)
    recipe = Recipe(effort=Effort.FAST)
    result = runs.quantize(made.path, tmp_path / "out", plans()[plan], text, recipe=recipe)
    stored = QuantizedCheckpoint.open(tmp_path / "out")
    formats = {stored.modules[name].scheme.format.name for name in stored.modules}
    assert len(formats) >= (5 if plan != "mixed" or family in ("qwen2_moe", "deepseek") else 3)
    assert result.report["model"]["architecture"] == FAMILIES[family].architecture
    tensors = made.tensors()
    replaced = {f"{name}.weight": dequantize(stored.read_quantized(name)) for name in stored.modules}
    linears = {
        m.name
        for m in made.tiny.spec.modules()
        if m.kind in (ModuleKind.ATTENTION, ModuleKind.MLP, ModuleKind.EXPERT, ModuleKind.SHARED_EXPERT)
    }
    left = {"model.layers.1.self_attn.k_proj"} if plan == "served" else set()
    assert set(stored.modules) == linears - left
    assert replaced.keys() <= tensors.keys()
    config = made.tiny.checkpoint.config
    found = load(tmp_path / "out").logits(ids)
    truth = witness(tensors | replaced, config, ids, tmp_path / "witness")
    assert error(found, truth) < 1e-3
    assert error(found, made.tiny.ours().logits(ids)) > 1e-2


def test_records_of_a_gated_shared_expert_count_its_gate(
    get: Callable[[str], Made], tmp_path: Path, text: Path
) -> None:
    result = runs.quantize(get("qwen2_moe").path, tmp_path / "out", "int4:g32", text, recipe=Recipe(effort=Effort.FAST))
    rows = [m for record in result.records for m in record.modules if m.kind == "shared_expert"]
    assert len(rows) == 3 * 3
    for row in rows:
        assert row.tokens == 24 * 32
        assert 0 < row.effective_samples < 0.98 * row.tokens


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


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.json")))
def test_the_configs_resolve_on_every_family(known: tuple[str, ModelSpec], config: str) -> None:
    family, spec = known
    plan, modules = Plan.load(CONFIGS / config), list(spec.modules())
    if (family, config) == ("deepseek", "gptq_example.json"):
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
        if family == "deepseek" and kind is ModuleKind.EXPERT and config == "gptq_olmoe_mixed.json":
            formats = {"mxfp4"}  # noqa: PLW2901  (its first layer is dense)
        assert by_kind[kind] in (formats, set()), kind
    has_experts = isinstance(spec.layers[-1].mlp, MoESpec)
    assert bool(by_kind[ModuleKind.EXPERT]) == has_experts
    assert bool(by_kind[ModuleKind.SHARED_EXPERT]) == (family in ("qwen2_moe", "deepseek"))
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
    for key, value in (("hidden_act", "gelu"), ("rope_scaling", {"type": "yarn", "factor": 4.0})):
        with pytest.raises(ConfigError) as caught:
            detect(config | {key: value})
        assert ("'gelu'" if key == "hidden_act" else "'yarn'") in str(caught.value)
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


def test_shared_experts_are_checked_under_their_native_name(get: Callable[[str], Made]) -> None:
    made = get("deepseek")
    check_tensors(made.tiny.source, made.tiny.spec)
    names = set(made.tensors())
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in names
    assert made.tiny.spec.expected_tensors() == names


def test_a_descriptor_is_short_and_knows_no_other_family() -> None:
    import alphaquant.models.families as package  # noqa: PLC0415

    root = Path(package.__file__).parent
    for family in FAMILIES:
        text = (root / f"{family}.py").read_text()
        assert len(text.splitlines()) <= 45
    for path in root.parent.rglob("*.py"):
        assert path.name == "registry.py" or "model_type" not in path.read_text(), path
