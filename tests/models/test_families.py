"""Every family of mixtures and of Qwen: against transformers or a naive reference, and quantized end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.checkpoint import Checkpoint
from alphaquant.errors import CheckpointError, ConfigError
from alphaquant.formats import dequantize
from alphaquant.gptq import GPTQConfig, detect_moe_architecture, gptq_quantize_model
from alphaquant.layouts import QuantizedCheckpoint
from alphaquant.models import (
    FAMILIES,
    ModelSpec,
    MoESpec,
    Source,
    attention_half,
    check_tensors,
    detect,
    load_decoder,
    mlp_half,
    rope_for,
    unfused,
)
from alphaquant.models.moe import route
from alphaquant.pipeline import load
from alphaquant.pipeline.collect import Collector, Reading
from alphaquant.plan import ModuleKind
from alphaquant.solver import Effort, Recipe
from api.test_gptq import ARCHITECTURES
from pipeline import tiny as runs

from . import deepseek_reference, tiny
from .families import DEEPSEEKS, MODELS, Made, witness, zoo

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CONFIGS = Path(__file__).parents[2] / "configs"
each_model = pytest.mark.parametrize("name", MODELS)
DENSE = ("llama", "mistral", "qwen2", "qwen3")
each_moe = pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model[0] not in DENSE])
each_deepseek = pytest.mark.parametrize("name", DEEPSEEKS)


@pytest.fixture(scope="session")
def get(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    return zoo(tmp_path_factory.mktemp("families"))


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
        if tensor.endswith(".weight"):
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
        moe = moe_of(model.spec, layer)
        choice = route(x.reshape(-1, x.shape[-1]), decoder.layers[layer], moe)
        order = experts.argsort(-1)  # theirs are not always sorted by score
        found = choice.topk_ids_TK.argsort(-1)
        assert choice.topk_ids_TK.gather(-1, found).equal(experts.gather(-1, order))
        assert error(choice.score_TK.gather(-1, found), scores.gather(-1, order)) < 1e-6
        assert choice.score_TK.sum(-1).allclose(torch.tensor(moe.routed_scaling)) == moe.normalize_top_k


@each_deepseek
def test_routing_of_deepseek_is_the_references(get: Callable[[str], Made], name: str) -> None:
    model = get(name).tiny
    layer = next(i for i, layer in enumerate(model.spec.layers) if isinstance(layer.mlp, MoESpec))
    router = model.checkpoint.read(f"model.layers.{layer}.mlp.gate.weight")
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    choice = route(x, {"mlp.gate.weight": router}, moe_of(model.spec, layer))
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
    loaded, expected = load_decoder(tiny.Source(Checkpoint.open(tmp_path)), model.spec), model.ours()
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
        assert source.read(tensor).equal(model.checkpoint.read(tensor)), tensor
        assert source.info(tensor) == model.checkpoint.info(tensor)


def test_a_fused_tensor_is_read_once_in_a_row(get: Callable[[str], Made], tmp_path: Path) -> None:
    made = get("qwen3_moe")
    save_file(fused(made), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(made.tiny.checkpoint.config))
    reads: list[str] = []

    class Counted(tiny.Source):
        def read(self, name: str) -> Tensor:
            reads.append(name)
            return super().read(name)

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


# --- Latent attention and the router's correction ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("deepseek_v")])
def test_the_tap_sees_what_their_linears_read(get: Callable[[str], Made], name: str) -> None:
    model, ids = get(name).tiny, tiny.token_ids(vocab_size=128)
    block, seen = model.theirs.model.layers[0], {}
    readers = {
        Source.ATTENTION_IN: "kv_a_proj_with_mqa",
        Source.KV_LATENT: "kv_b_proj",
        Source.ATTENTION_OUT: "o_proj",
    }
    if model.spec.layers[0].attention.q_rank is not None:
        readers[Source.QUERY_LATENT] = "q_b_proj"
    hooks = [
        getattr(block.self_attn, linear).register_forward_hook(
            lambda _, inputs, __, source=source: seen.__setitem__(source, inputs[0].flatten(0, -2))
        )
        for source, linear in readers.items()
    ]
    x = model.theirs(ids, output_hidden_states=True).hidden_states[0]
    for hook in hooks:
        hook.remove()
    tapped: dict[Source, Tensor] = {}
    weights, rope = model.ours().layers[0], rope_for(model.spec, ids.shape[1], "cpu")
    out = attention_half(
        x, weights, model.spec, 0, rope, tap=lambda source, x, routing=None: tapped.__setitem__(source, x)
    )
    assert out is x
    assert tapped.keys() == seen.keys()
    for source, truth in seen.items():
        assert error(tapped[source].flatten(0, -2), truth) < 1e-5, source
    sources = {p.role.removeprefix("self_attn."): p.source for p in model.spec.parameters(0) if p.source}
    assert all(sources[linear] is source for source, linear in readers.items())


def test_the_correction_keeps_its_32_bits(get: Callable[[str], Made], tmp_path: Path) -> None:
    """Rounded to bf16 it would choose other experts; it goes into the output as it came."""
    made = get("deepseek_v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    truth = made.tensors()[name]
    assert not truth.bfloat16().float().equal(truth)
    assert made.tiny.ours(torch.bfloat16).layers[1]["mlp.gate.e_score_correction_bias"].equal(truth)
    runs.quantize(made.path, tmp_path / "out", "int4:g32", None)
    assert Checkpoint.open(tmp_path / "out").read(name).equal(truth)


# --- The shared expert's gate ---------------------------------------------------------------------------------------


def test_the_gate_weighs_the_shared_experts_hessian(get: Callable[[str], Made]) -> None:
    model = get("qwen2_moe").tiny
    weights, spec, power = model.ours().layers[1], model.spec, 1.0
    sources = (Source.SHARED_IN, Source.SHARED_HIDDEN, Source.MLP_IN)
    wanted = {Reading(source): range(1) for source in sources}
    collector = Collector(spec.parameters(1), wanted, power)
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
        found = collector.hessians[Reading(source)]
        assert found.normalized().shape[0] == 1
        torch.testing.assert_close(found.normalized()[0].double(), truth, rtol=1e-4, atol=1e-5)
        assert found.evidence.tokens_E.tolist() == [33]
        assert float(found.evidence.effective_E) == pytest.approx(float(gate.sum() ** 2 / gate.square().sum()))
    # router and gate read every token alike
    plain = collector.hessians[Reading(Source.MLP_IN)].normalized()[0].double()
    torch.testing.assert_close(plain, x.T @ x / 33, rtol=1e-4, atol=1e-5)


def test_shared_experts_without_a_gate_weigh_every_token_alike(get: Callable[[str], Made]) -> None:
    model = get("deepseek").tiny
    collector = Collector(model.spec.parameters(1), {Reading(Source.SHARED_IN): range(1)}, 1.0)
    mlp_half(torch.randn(2, 9, 64), model.ours().layers[1], model.spec, 1, tap=collector)
    assert collector.hessians[Reading(Source.SHARED_IN)].evidence.effective_E.tolist() == [18.0]


def test_scaled_scores_are_what_the_hessians_weigh(get: Callable[[str], Made]) -> None:
    model = get("deepseek-normalised-scaled").tiny
    experts = range(model.spec.layers[1].mlp.num_experts)
    collector = Collector(model.spec.parameters(1), {Reading(Source.EXPERT_IN): experts}, 1.0)
    mlp_half(torch.randn(2, 9, 64), model.ours().layers[1], model.spec, 1, tap=collector)
    assert float(collector.hessians[Reading(Source.EXPERT_IN)].evidence.score_mass_E.sum()) == pytest.approx(2.5 * 18)


# --- End to end -----------------------------------------------------------------------------------------------------


def plans() -> dict[str, dict[str, Any]]:
    mixed = json.loads((CONFIGS / "gptq_mixed_precision.json").read_text())
    return {"served": runs.SERVED_PLAN, "humming": runs.HUMMING_PLAN, "mixed": mixed}


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ARCHITECTURES.keys()))
def test_in_memory_as_from_disk(get: Callable[[str], Made], tmp_path: Path, text: Path, family: str) -> None:
    """As tests/api has it of other families: the command's codes, bit for bit; then what they stand for is computed."""
    made, ids, plan = get(family), tiny.token_ids(2, 9, vocab_size=128), plans()["served"]
    recipe = GPTQConfig(effort=Effort.FAST)
    runs.quantize(made.path, tmp_path / "out", plan, text, recipe=recipe, num_samples=8)
    stored, model = QuantizedCheckpoint.open(tmp_path / "out"), type(made.theirs).from_pretrained(made.path).eval()
    model.requires_grad_(requires_grad=False)
    tokens = calibration_tokens(
        str(text), load_tokenizer(made.path), num_samples=8, seqlen=32, seed=0, vocab_size=128
    ).ids
    assert detect_moe_architecture(model) == FAMILIES[family].architecture
    found = gptq_quantize_model(model, tokens.split(3), plan, recipe, "cpu")
    assert list(found) == [name for name in stored.modules if name in found]
    assert found.keys() == stored.modules.keys()
    for name, ours in found.items():
        theirs = stored.read_quantized(name)
        assert ours.codes.equal(theirs.codes), name
        assert dequantize(ours).equal(dequantize(theirs)), name
    assert error(model(ids).logits, load(tmp_path / "out").logits(ids)) < 1e-4


def test_records_of_a_gated_shared_expert_count_its_gate(
    get: Callable[[str], Made], tmp_path: Path, text: Path
) -> None:
    result = runs.quantize(get("qwen2_moe").path, tmp_path / "out", "int4:g32", text, recipe=Recipe(effort=Effort.FAST))
    rows = [m for record in result.records for m in record.modules if m.kind == "shared_expert"]
    assert len(rows) == 3 * 3
    for row in rows:
        assert row.tokens == 24 * 32
        assert 0 < row.effective_samples < 0.98 * row.tokens


def test_shared_experts_are_checked_under_their_native_name(get: Callable[[str], Made]) -> None:
    made = get("deepseek")
    check_tensors(made.tiny.source, made.tiny.spec)
    names = set(made.tensors())
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in names
    assert made.tiny.spec.expected_tensors() == names


# --- Config ---------------------------------------------------------------------------------------------------------


@each_model
def test_what_a_config_leaves_out_is_what_transformers_takes(get: Callable[[str], Made], name: str) -> None:
    made = get(name)
    config = made.theirs.config.to_dict()
    for key in sorted(config.keys() - {"model_type", "dtype"}):
        left = {other: value for other, value in config.items() if other != key}
        try:
            spec = detect(left)
        except ConfigError as error:
            assert key in str(error) or key == "num_local_experts"  # noqa: PT017  (num_experts, where published)
            continue
        assert spec == detect(type(made.theirs.config)(**left).to_dict()), key
