"""Half-layers tuned to the original's stream: what falls, what is kept, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import alphaquant
from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.errors import ConfigError
from alphaquant.formats import FORMATS, ScaleKind, Scheme, dequantize, pool_rows, quantize, round_scale
from alphaquant.formats.codec import quantize_with
from alphaquant.gptq import GPTQConfig, gptq_quantize_model
from alphaquant.models import read_layer
from alphaquant.pipeline import check_shards, prepare
from alphaquant.pipeline import layer as layer_module
from alphaquant.pipeline.layer import LayerQuantizer, Limits
from alphaquant.pipeline.pace import Pace
from alphaquant.pipeline.tuning import Objective, Tunable, tune
from alphaquant.report import write_report
from alphaquant.solver import Effort, Method, Recipe, leanings, places
from alphaquant.verification import check_stored
from models.families import MODELS, zoo
from solver.oracle import default_schemes

from . import tiny
from .test_resume import Stop, result_of, stop_in_layer

TUNE = Recipe(effort=Effort.FAST, tune_steps=12)
UNTUNED = dataclasses.replace(TUNE, tune_steps=0, damping=TUNE.tuned_damping)
SCHEMES = [*default_schemes(), Scheme(FORMATS["fp8_block"], 128)]
PLAN = {
    "default": {"wq": "int2", "group_size": 32},
    "overrides": [{"pattern": "*o_proj", "wq": "mxfp4"}, {"pattern": "*gate_proj", "wq": "int3"}],
}


@pytest.fixture(scope="module")
def get(tmp_path_factory):
    return zoo(tmp_path_factory.mktemp("tuning"))


def layer_of(directory, plan, recipe, layer=1, limits=None, num_samples=256):
    """Record, codes and weights of a layer, the stream behind it, and the original's."""
    prepared = prepare(directory, tiny.as_plan(plan))
    weights = read_layer(prepared.source, prepared.spec, layer, torch.float32)
    x_NLD = torch.randn(num_samples, 32, prepared.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    original_NLD = x_NLD.clone()
    quantizer = LayerQuantizer(prepared.spec, prepared.schemes, recipe, limits=limits or Limits())
    result = quantizer.layer(layer, weights, x_NLD, original_NLD)
    return result, weights, x_NLD, original_NLD


FAMILIES = [*(name for name in MODELS if name != "mixtral-window-top3"), "deepseek"]  # 48 inputs take no group of 32


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_comes_closer_and_codes_and_weights_agree(get, family):
    directory = get(family).path
    found, errors = {}, {}
    for steps in (0, 12):
        recipe = dataclasses.replace(TUNE, tune_steps=steps)
        found[steps], weights, x_NLD, original_NLD = layer_of(directory, PLAN, recipe)
        errors[steps] = float((x_NLD - original_NLD).norm() / original_NLD.norm())
    assert errors[12] < 0.97 * errors[0]
    result = found[12]
    assert [record.half for record in result.record.tuning] == ["layer 1, attention", "layer 1, feed-forward"]
    for record in result.record.tuning:
        assert record.kept
        assert record.loss_after < record.loss_before
        assert 0 < record.moved < 0.5
        assert record.tokens == 32 * 32
    assert found[0].record.tuning == []
    before, spec = found[0].quantized, prepare(directory, tiny.as_plan(PLAN)).spec
    assert result.quantized.keys() == before.keys()
    assert any(not torch.equal(q.codes, before[name].codes) for name, q in result.quantized.items())
    hashes = {module.name: module.sha256 for module in result.record.modules}
    assert hashes == {name: q.sha256() for name, q in result.quantized.items()}
    for parameter in spec.parameters(1):
        for expert, name in enumerate(spec.module_names(1, parameter)):
            if name in result.quantized and parameter.leaf == "weight":
                stored = weights[parameter.key][expert] if parameter.num_experts else weights[parameter.key]
                assert torch.equal(dequantize(result.quantized[name]), stored)
                assert not stored.requires_grad


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_format_can_be_tuned(scheme):
    """From plain rounding there is much to gain: inputs are correlated."""
    width = max(32, scheme.group_size)
    objective, weights, tunable = objective_of(torch.arange(128), 128, 16, width, scheme)
    start = tunable.quantized
    record, tuned = tune(objective, weights, [tunable], 48, seed=0)
    assert record.kept
    assert record.loss_after < 0.9 * record.loss_before
    q = tuned["m"]
    assert torch.equal(dequantize(q), weights["w"])
    again = quantize_with(dequantize(q), q.scheme, q.scale, q.zero, q.global_scale)
    assert torch.equal(dequantize(again), weights["w"]), "codes are those of values on the grid"
    assert not torch.equal(q.codes, start.codes[0])
    moved = not torch.equal(q.scale, start.scale[0])
    assert moved or scheme.format.scale is not ScaleKind.MODEL or scheme.format.bits == 8, "finer than they are stored"
    assert not moved or scheme.format.scale is ScaleKind.MODEL
    assert torch.equal(round_scale(q.scale, scheme), q.scale), "scales are stored exactly"
    assert torch.equal(pool_rows(q.scale, scheme, torch.amax), q.scale), "rows of a block share theirs"


def test_what_gets_worse_is_not_kept(get, monkeypatch):
    fine = {"default": {"wq": "int6", "group_size": 32}}
    plain, before, *_ = layer_of(get("olmoe").path, fine, UNTUNED)
    monkeypatch.setattr(places, "_CODE_RATE", 3.0)
    monkeypatch.setattr(places, "_SCALE_RATE", 1.0)
    tuned, after, *_ = layer_of(get("olmoe").path, fine, TUNE)
    for record in tuned.record.tuning:
        assert not record.kept
        assert record.loss_after > record.loss_before
    assert [m.sha256 for m in tuned.record.modules] == [m.sha256 for m in plain.record.modules]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_gradients_that_are_no_numbers_change_nothing(get, monkeypatch):
    plain, *_ = layer_of(get("llama").path, PLAN, UNTUNED)
    loss = Objective.loss
    monkeypatch.setattr(Objective, "loss", lambda *args: loss(*args) * (math.nan if torch.is_grad_enabled() else 1.0))
    tuned, *_ = layer_of(get("llama").path, PLAN, TUNE)
    assert [m.sha256 for m in tuned.record.modules] == [m.sha256 for m in plain.record.modules]
    assert not any(record.kept for record in tuned.record.tuning)


def test_what_is_worked_on_together_changes_nothing(get):
    small = Limits(hessian_bytes=4 * 64**2, workspace_weights=64 * 64)
    whole, weights, *_ = layer_of(get("olmoe").path, PLAN, TUNE)
    parts, others, *_ = layer_of(get("olmoe").path, PLAN, TUNE, limits=small)
    assert whole.record.tuning == parts.record.tuning
    assert all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.parametrize("num_samples", [1, 2, 9])
def test_few_samples(get, num_samples):
    result, *_ = layer_of(get("llama").path, PLAN, TUNE, num_samples=num_samples)
    assert all(record.tokens == 32 for record in result.record.tuning), "one sample judges"


def objective_of(samples, num_samples=16, length=8, width=32, scheme=None):
    """One matrix of rounded weights, and what it is tuned to."""
    generator = torch.Generator().manual_seed(0)
    mix_II = torch.randn(width, width, generator=generator) / width**0.5
    x_NLD = torch.randn(num_samples, length, width, generator=generator) @ mix_II
    w_OI = torch.randn(width, width, generator=generator)
    q = quantize(w_OI[None], scheme or Scheme(FORMATS["int2"], width))
    weights = {"w": dequantize(q)[0].clone()}
    target_NLD = x_NLD + x_NLD @ w_OI.T
    objective = Objective(lambda x: x + x @ weights["w"].T, x_NLD, target_NLD, samples, "here", Pace())
    return objective, weights, Tunable("w", ["m"], None, q, leanings(w_OI[None], None, q))


@torch.no_grad()
def test_memory_that_runs_out_is_noted_and_nothing_is_lost(monkeypatch):
    """Gradients of pieces are those of the whole, from the first piece again."""
    objective, weights, tunable = objective_of(torch.arange(16))
    own = weights["w"].requires_grad_()
    objective.descend(torch.arange(16), [own])
    whole = own.grad
    loss, sizes = Objective.loss, []

    def narrow(self, some):
        sizes.append(len(some))
        if len(some) > 4 or len(sizes) == 4:  # it runs out in the second piece of four, too
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return loss(self, some)

    monkeypatch.setattr(Objective, "loss", narrow)
    objective.descend(torch.arange(16), [own])
    assert sizes == [16, 8, 4, 4, *[2] * 8]
    assert torch.allclose(own.grad, whole, rtol=1e-4)
    assert len(objective.notes) == 3
    assert "2 samples at a time" in objective.notes[-1]
    own.requires_grad_(False)
    record, _ = tune(objective, weights, [tunable], 8, seed=0)
    assert record.kept


def test_samples_that_are_left_out_do_not_bear_on_it():
    kept = torch.tensor([sample for sample in range(16) if sample not in (3, 10)])
    found = []
    for fault in (0.0, math.nan):
        objective, weights, tunable = objective_of(kept)
        objective.x_NLD[[3, 10]] += fault
        objective.target_NLD[[3, 10]] += fault
        record, tuned = tune(dataclasses.replace(objective), weights, [tunable], 8, seed=0)
        assert record.kept
        found.append((record, tuned["m"].sha256()))
    assert found[0] == found[1]


def test_held_out_samples_do_not_bear_on_what_is_tuned():
    found = []
    for other in (0.0, 0.5):
        objective, weights, tunable = objective_of(torch.arange(16))
        objective.x_NLD[7::8] += other
        record, tuned = tune(objective, weights, [tunable], 8, seed=0)
        assert record.kept
        found.append((record.loss_before, tuned["m"].codes))
    assert found[0][0] != found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_massive_tokens_do_not_decide():
    objective, *_ = objective_of(torch.arange(16))
    square_NL = objective.target_NLD.square().sum(-1)
    objective.target_NLD[0, 0] *= 1000
    objective.target_NLD[1, 1] *= 0.001
    divisor_NL = dataclasses.replace(objective).divisor_NL
    assert divisor_NL[0, 0] == pytest.approx(1e6 * float(square_NL[0, 0]))
    assert divisor_NL[1, 1] == divisor_NL.min() == pytest.approx(float(square_NL.median()), rel=0.05)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A model with rounded inputs somewhere, and its tuned run."""
    folder = tmp_path_factory.mktemp("tuned")
    model = tiny.write_model(folder / "model", "olmoe", dtype="bfloat16")
    result = tiny.quantize(model, folder / "out", WHOLE, text, num_samples=32, recipe=TUNE)
    return model, folder / "out", result


WHOLE = {
    "default": {"wq": "int2", "group_size": 32},
    "overrides": [{"pattern": "*.experts.[2-3].*", "wq": "int8", "aq": "int8"}],
}


def test_a_tuned_run_is_whole(run):
    _, out, result = run
    assert sum(record.kept for layer in result.records for record in layer.tuning) > 0
    assert check_stored(out).problems == ()
    assert check_shards(out) == []
    halves = result.report["tuning"]["halves"]
    assert halves == 2 * (len(result.records) - 1)
    assert result.report["seconds"]["tune"] > 0


def test_the_report_shows_every_half_layer(run, tmp_path):
    _, out, result = run
    html, markdown = (path.read_text() for path in write_report(out, tmp_path))
    records = [record for layer in result.records for record in layer.tuning]
    for record in records:
        change = f"{record.loss_before:.4%} to {record.loss_after:.4%}, {record.moved:.2%} of codes moved"
        assert html.count(f"{record.half}: {change}") == 2, "a point before and one after"
        assert f"| {record.half} | {record.loss_before:.4%} | {record.loss_after:.4%} |" in markdown


def test_a_stopped_run_ends_with_the_same_bytes(run, text, tmp_path, monkeypatch):
    model, whole, _ = run
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in_layer(patch, 1)
        with pytest.raises(Stop):
            tiny.quantize(model, out, WHOLE, text, num_samples=32, recipe=TUNE)
    tiny.quantize(model, out, WHOLE, text, num_samples=32, recipe=TUNE)
    assert result_of(out) == result_of(whole)


def test_less_memory_gives_the_same_bytes(run, text, tmp_path, monkeypatch):
    model, whole, _ = run
    held = layer_module.Limits(hessian_bytes=4 * 64**2, workspace_weights=1 << 12, holds_stream=True)
    monkeypatch.setattr("alphaquant.pipeline.run.common_limits", lambda *_: held)
    tiny.quantize(model, tmp_path / "out", WHOLE, text, num_samples=32, recipe=TUNE)
    assert result_of(tmp_path / "out") == result_of(whole)


def test_in_memory_it_is_the_same(run, text):
    model, out, _ = run
    ids = calibration_tokens(
        str(text), load_tokenizer(model), num_samples=32, seqlen=32, seed=0, vocab_size=tiny.VOCAB
    ).ids
    modules = gptq_quantize_model(alphaquant.load(model), [ids], WHOLE, GPTQConfig(effort="fast", tune_steps=12), "cpu")
    written = alphaquant.load(out)
    spec = written.spec
    for layer, weights in enumerate(written.layers):
        for parameter in spec.parameters(layer):
            for expert, name in enumerate(spec.module_names(layer, parameter)):
                if name in modules and parameter.leaf == "weight":
                    stored = weights[parameter.key][expert] if parameter.num_experts else weights[parameter.key]
                    assert torch.equal(dequantize(modules[name], stored.dtype), stored)


def test_who_tunes():
    assert Recipe().tuning == Recipe(effort=Effort.FAST).tuning == 0
    assert Recipe(effort=Effort.BEST).tuning == 96
    assert Recipe(effort=Effort.BEST, tune_steps=0).tuning == 0
    assert Recipe(tune_steps=7).tuning == 7
    assert Recipe(tune_steps=7, method=Method.RTN).tuning == 0
    with pytest.raises(ConfigError, match="tune_steps is -1"):
        GPTQConfig(tune_steps=-1)
    assert GPTQConfig(effort="best").tuning == 96


def test_without_calibration_nothing_is_tuned(olmoe, tmp_path):
    result = tiny.quantize(olmoe, tmp_path / "out", "int4:g32", None, recipe=Recipe(effort=Effort.BEST))
    assert not any(layer.tuning for layer in result.records)
