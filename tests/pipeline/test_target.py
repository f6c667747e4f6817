"""Weights moved toward the original's outputs first: which rows are paired, what is gained, and the same bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import alphaquant
from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.errors import ConfigError
from alphaquant.formats import Inputs, dequantize
from alphaquant.gptq import GPTQConfig, gptq_quantize_model
from alphaquant.models import Source, read_layer
from alphaquant.models.attention import rms_norm
from alphaquant.pipeline import check_shards, prepare
from alphaquant.pipeline import layer as layer_module
from alphaquant.pipeline.collect import Collector
from alphaquant.pipeline.layer import LayerQuantizer, Limits
from alphaquant.pipeline.stream import half_function
from alphaquant.solver import Effort, Method, Recipe
from models.families import MODELS, zoo

from . import tiny
from .test_resume import Stop, result_of, stop_in_layer

PLAIN = Recipe(effort=Effort.FAST, equalize=False)
TARGET = dataclasses.replace(PLAIN, asymmetric_target=1.0)
PLAN = {"default": {"wq": "int8", "group_size": 32}}
FAMILIES = [*(name for name in MODELS if name != "mixtral-window-top3"), "deepseek"]  # 48 inputs take no group of 32


@pytest.fixture(scope="module")
def get(tmp_path_factory):
    return zoo(tmp_path_factory.mktemp("target"))


def layer_of(directory, recipe, *, shift, plan=None, limits=None, num_samples=64):
    """A layer quantized behind a stream that is the original's, bent; its result, the streams, and its weights."""
    prepared = prepare(directory, tiny.as_plan(plan or PLAN))
    spec = prepared.spec
    weights = read_layer(prepared.source, spec, 1, torch.float32)
    generator = torch.Generator().manual_seed(1)
    original_NLD = torch.randn(num_samples, 32, spec.hidden_size, generator=generator)
    bend_DD = torch.randn(spec.hidden_size, spec.hidden_size, generator=generator) / spec.hidden_size**0.5
    x_NLD = original_NLD + shift * original_NLD @ bend_DD
    before = x_NLD.clone(), original_NLD.clone()
    own = {key: weight.clone() for key, weight in weights.items()}
    quantizer = LayerQuantizer(spec, prepared.schemes, recipe, limits=limits or Limits())
    result = quantizer.layer(1, weights, x_NLD, original_NLD)
    return result, (x_NLD, original_NLD), before, weights, own, spec


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_comes_closer(get, family):
    """Fine codes, so that nearly all of the error is what came in: some of it is made up for."""
    errors = []
    for recipe in (PLAIN, TARGET):
        _, (x_NLD, original_NLD), *_ = layer_of(get(family).path, recipe, shift=0.2, num_samples=256)
        errors.append(float((x_NLD - original_NLD).norm()))
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("left", ["*.self_attn.*", "*.mlp.*"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "llama"])
def test_equal_streams_move_nothing(get, family, left):
    plan = PLAN | {"overrides": [{"pattern": left, "skip": True}]}
    plain, target = (layer_of(get(family).path, recipe, shift=0.0, plan=plan)[0] for recipe in (PLAIN, TARGET))
    assert [m.sha256 for m in target.record.modules] == [m.sha256 for m in plain.record.modules]


def test_what_is_quantized_is_nearest_to_the_originals_output(get):
    """Of the first linears of a half-layer that no rounding comes before: dense least squares in float64."""
    _, _, (x_NLD, original_NLD), weights, own, spec = layer_of(get("llama").path, TARGET, shift=0.2)
    norm = own["input_layernorm.weight"]
    x_TD, original_TD = (rms_norm(x, norm, spec.rms_norm_eps).flatten(0, 1).double() for x in (x_NLD, original_NLD))
    for key in ("self_attn.q_proj.weight", "self_attn.v_proj.weight"):
        goal_TO = original_TD @ own[key].double().T

        def error(w_OI, goal_TO=goal_TO):
            return float((x_TD @ w_OI.double().T - goal_TO).norm() / goal_TO.norm())

        best = error(torch.linalg.lstsq(x_TD, goal_TO).solution.T)
        assert best < error(weights[key]) < 1.1 * best < 0.5 * error(own[key])


@torch.no_grad()
def test_rows_are_paired_token_by_token_and_expert_by_expert(get, monkeypatch):
    """Beside every row of an expert lies what the original has of the same token: its router would choose others."""
    found, show = {}, Collector.show

    def spy(self, source, rows):
        found[source] = rows
        show(self, source, rows)

    monkeypatch.setattr(Collector, "show", spy)
    _, _, (x_NLD, original_NLD), _, own, spec = layer_of(get("olmoe").path, TARGET, shift=0.5, num_samples=4)
    before = {"x": x_NLD, "original": original_NLD}
    # attention is hardly changed by codes of eight bits: the feed-forward's inputs are read from its own pairs
    inputs = found[Source.EXPERT_IN]
    counts = inputs.routing.counts_E.tolist()
    whole = found[Source.MLP_IN]
    assert whole.x_RI.shape == (4 * 32, spec.hidden_size)
    token_R = torch.cdist(inputs.x_RI, whole.x_RI).argmin(1)
    assert torch.equal(inputs.x_RI, whole.x_RI[token_R])
    assert torch.equal(inputs.original_RI, whole.original_RI[token_R])
    hidden = found[Source.EXPERT_HIDDEN]
    names = [f"mlp.experts.{name}.weight" for name in ("gate_proj", "up_proj")]
    for expert, rows in enumerate(torch.arange(sum(counts)).split(counts)):
        gate, up = (F.linear(inputs.original_RI[rows], own[name][expert]) for name in names)
        assert torch.allclose(hidden.original_RI[rows], F.silu(gate) * up, atol=1e-5)
    own_choice = (whole.original_RI @ own["mlp.gate.weight"].T).topk(spec.layers[1].mlp.top_k).indices
    used = inputs.routing.choice.topk_ids_TK
    differing = (own_choice.sort().values != used.sort().values).any(1)
    assert differing.float().mean() > 0.2, "the original alone would have chosen others"
    # and in the attention: all tokens in their order
    rows = found[Source.ATTENTION_IN]
    norm = own["input_layernorm.weight"]
    for mine, stream in ((rows.x_RI, before["x"]), (rows.original_RI, before["original"])):
        assert torch.allclose(mine, rms_norm(stream, norm, spec.rms_norm_eps).flatten(0, 1), atol=1e-5)


def test_rounded_inputs_are_made_up_for(get):
    """The same stream on both sides: what is missing is what rounding of the inputs takes."""
    plan = {"default": {"wq": "int8", "aq": "int8", "group_size": -1}}
    plain, target = (layer_of(get("llama").path, recipe, shift=0.0, plan=plan)[0] for recipe in (PLAIN, TARGET))
    assert [m.sha256 for m in target.record.modules] != [m.sha256 for m in plain.record.modules]
    assert Inputs() != target.quantized[target.record.modules[0].name].scheme.inputs


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_what_is_worked_on_together_changes_nothing(get, family):
    recipe = dataclasses.replace(TARGET, equalize=True)
    small = Limits(hessian_bytes=4 * 64**2, workspace_weights=64 * 64)
    whole, *_ = layer_of(get(family).path, recipe, shift=0.2)
    parts, *_ = layer_of(get(family).path, recipe, shift=0.2, limits=small)
    assert [m.sha256 for m in parts.record.modules] == [m.sha256 for m in whole.record.modules]


@pytest.mark.parametrize("which", ["x", "original"])
def test_rows_that_are_no_numbers_are_left_out_with_their_pair(get, which, monkeypatch):
    """One hidden row of infinities, on either side, in a hundred and more: noted, and neither sum is spoiled."""
    show = Collector.show

    def spoil(self, source, rows):
        if source is Source.MLP_HIDDEN:
            field = {"x": "x_RI", "original": "original_RI"}[which]
            spoiled = getattr(rows, field).clone()
            spoiled[7, 3] = torch.inf
            rows = rows._replace(**{field: spoiled})
        show(self, source, rows)

    monkeypatch.setattr(Collector, "show", spoil)
    result, *_ = layer_of(get("llama").path, TARGET, shift=0.2)
    assert [note for note in result.record.events if "1 of 2048 inputs" in note]
    assert all(torch.isfinite(dequantize(q)).all() for q in result.quantized.values())


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3"])
def test_a_choice_takes_the_routers_place(get, family):
    prepared = prepare(get(family).path, tiny.as_plan(PLAN))
    spec = prepared.spec
    weights = read_layer(prepared.source, spec, 1, torch.float32)
    x = torch.randn(2, 16, spec.hidden_size, generator=torch.Generator().manual_seed(3))
    feed = layer_module.feed
    choice = layer_module.Shown()
    half_function(feed, weights, spec, 1, x, choice)(x)
    plain = half_function(feed, weights, spec, 1, x)(x)
    assert torch.equal(half_function(feed, weights, spec, 1, x, None, choice.choice)(x), plain)
    other = choice.choice._replace(topk_ids_TK=(choice.choice.topk_ids_TK + 1) % spec.layers[1].mlp.num_experts)
    assert not torch.allclose(half_function(feed, weights, spec, 1, x, None, other)(x), plain, atol=1e-3)


WHOLE = {
    "default": {"wq": "int2", "group_size": 32},
    "overrides": [{"pattern": "*.experts.[2-3].*", "wq": "int8", "aq": "int8"}, {"pattern": "lm_head", "wq": "int8"}],
}
USED = Recipe(effort=Effort.FAST, asymmetric_target=0.5, tune_steps=2, repair_router=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("target-run")
    model = tiny.write_model(folder / "model", "olmoe", dtype="bfloat16")
    tiny.quantize(model, folder / "out", WHOLE, text, num_samples=32, recipe=USED)
    return model, folder / "out"


def test_a_stopped_run_ends_with_the_same_bytes(run, text, tmp_path, monkeypatch):
    model, whole = run
    with monkeypatch.context() as patch:
        stop_in_layer(patch, 1)
        with pytest.raises(Stop):
            tiny.quantize(model, tmp_path / "out", WHOLE, text, num_samples=32, recipe=USED)
    tiny.quantize(model, tmp_path / "out", WHOLE, text, num_samples=32, recipe=USED)
    assert result_of(tmp_path / "out") == result_of(whole)
    assert check_shards(whole) == []


def test_less_memory_gives_the_same_bytes(run, text, tmp_path, monkeypatch):
    model, whole = run
    held = Limits(hessian_bytes=4 * 64**2, workspace_weights=1 << 12, holds_stream=True)
    monkeypatch.setattr("alphaquant.pipeline.run.common_limits", lambda *_: held)
    tiny.quantize(model, tmp_path / "out", WHOLE, text, num_samples=32, recipe=USED)
    assert result_of(tmp_path / "out") == result_of(whole)


def test_in_memory_it_is_the_same(run, text):
    model, out = run
    ids = calibration_tokens(
        str(text), load_tokenizer(model), num_samples=32, seqlen=32, seed=0, vocab_size=tiny.VOCAB
    ).ids
    config = GPTQConfig(effort="fast", asymmetric_target=0.5, tune_steps=2, repair_router=True)
    modules = gptq_quantize_model(alphaquant.load(model), [ids], WHOLE, config, "cpu")
    written = alphaquant.load(out)
    for layer, weights in enumerate(written.layers):
        for parameter in written.spec.parameters(layer):
            for expert, name in enumerate(written.spec.module_names(layer, parameter)):
                if name in modules and parameter.leaf == "weight":
                    stored = weights[parameter.key][expert] if parameter.num_experts else weights[parameter.key]
                    assert torch.equal(dequantize(modules[name], stored.dtype), stored)


def test_who_pairs():
    assert not Recipe().pairs
    assert not Recipe(effort=Effort.BEST).pairs
    assert Recipe(asymmetric_target=0.25).pairs
    assert not Recipe(asymmetric_target=0.25, method=Method.RTN).pairs
    assert GPTQConfig(asymmetric_target=1).pairs
    for value in (-0.1, 1.5, "much"):
        with pytest.raises(ConfigError, match=f"asymmetric_target is {value!r}"):
            GPTQConfig(asymmetric_target=value)
