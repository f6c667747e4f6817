"""Rounded inputs: what is calibrated, evaluated and loaded is what an engine computes, and the export says so."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.calibration import evaluation_windows, load_tokenizer
from alphaquant.formats import Activation, Inputs, round_inputs
from alphaquant.layouts import QuantizedCheckpoint
from alphaquant.models import Source, attention_half, mlp_half, rope_for
from alphaquant.models.linear import _ServedWeights, expert_linear, linear
from alphaquant.pipeline import evaluate_checkpoint, export_checkpoint, load
from alphaquant.pipeline.collect import Collector, Reading
from alphaquant.plan import Plan

from . import tiny
from .spy import Spy
from .test_outputs import assert_same_codes, original, replaced

# experts of one layer differ in what they round their inputs to
PLAN = {
    "default": {"wq": "int8", "aq": "int8", "group_size": -1},
    "overrides": [
        {"pattern": "*.k_proj", "aq": "bf16"},
        {"pattern": "model.layers.1.self_attn.*", "wq": "int4", "group_size": 32, "aq": "bf16"},
        {"pattern": "*.mlp.experts.[0-3].*", "wq": "fp8", "aq": "fp8"},
        {"pattern": "*.mlp.experts.2.up_proj", "aq": "bf16"},
        {"pattern": "*.mlp.experts.7.*", "skip": True},
    ],
}
# humming alone holds these
HUMMING = {
    "default": {"wq": "int4", "aq": "fp8", "group_size": 32},
    "overrides": [{"pattern": "*.mlp.experts.*", "wq": "mxfp4"}, {"pattern": "*.o_proj", "aq": "int8"}],
}


def rounding_by_weight(decoder, schemes):
    """`F.linear` that looks up by the weight's memory what its module rounds inputs to."""
    activations = {}
    for layer, weights in enumerate(decoder.layers):
        for parameter in decoder.spec.parameters(layer):
            for expert, name in enumerate(decoder.spec.module_names(layer, parameter)):
                if schemes.get(name) is not None:
                    weight = weights[parameter.key]
                    weight = weight[expert] if parameter.num_experts else weight
                    activations[weight.data_ptr()] = schemes[name].activation
    plain = F.linear

    def linear(x, weight, bias=None):
        activation = activations.get(weight.data_ptr(), Activation.BF16)
        if activation is Activation.BF16:
            return plain(x, weight, bias)
        values, scale = round_inputs(x, activation)
        return plain((values.double() * scale.double()).to(x.dtype), weight, bias)

    return linear, set(activations.values())


@pytest.fixture(scope="module")
def run(olmoe, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("rounded") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        spy = Spy().install(monkeypatch)
        tiny.quantize(olmoe, out, PLAN, text)
    return out, spy


def test_what_is_loaded_rounds_as_its_plan_says(run, olmoe, monkeypatch):
    out, spy = run
    schemes = {name: q.scheme for name, q in spy.quantized.items()}
    loaded, ids = load(out).logits(tiny.token_ids()), tiny.token_ids()
    expected = replaced(original(olmoe), spy.quantized)
    unrounded = expected.logits(ids)
    linear, used = rounding_by_weight(expected, schemes)
    assert used == set(Activation)
    monkeypatch.setattr(F, "linear", linear)
    rounded = expected.logits(ids)
    monkeypatch.undo()
    # a last bit of difference may tip an input over to the next step, and with it what follows of its sequence
    assert ((loaded - rounded).abs() > 1e-3).float().mean() < 0.02
    assert ((loaded - unrounded).abs() > 1e-3).float().mean() > 0.5


def test_the_quantized_stream_is_what_will_be_served(run, olmoe, monkeypatch):
    """Later layers are calibrated on what rounded inputs make of the layers before them."""
    _, spy = run
    decoder = replaced(original(olmoe), spy.quantized)
    linear, _ = rounding_by_weight(decoder, {name: q.scheme for name, q in spy.quantized.items()})
    monkeypatch.setattr(F, "linear", linear)
    rope = rope_for(decoder.spec, spy.before[0].shape[1], "cpu")
    for layer, weights in enumerate(decoder.layers):
        x = attention_half(spy.before[layer], weights, decoder.spec, layer, rope)
        difference = (mlp_half(x, weights, decoder.spec, layer) - spy.after[layer]).abs().amax(-1)
        # a last bit of difference may tip an input over to the next step, and with it all of its token
        assert (difference > 1e-4).float().mean() < 0.02, layer


def test_hessians_are_of_rounded_inputs(olmoe):
    spec = original(olmoe).spec
    keys = [Reading(Source.ATTENTION_IN, Inputs(activation)) for activation in Activation]
    collector = Collector(spec.parameters(0), dict.fromkeys(keys, range(1)), 1.0)
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-1, 1, 64)
    collector(Source.ATTENTION_IN, x)
    found = {}
    for key in keys:
        rows = x.flatten(0, 1)
        if key.inputs.activation is not Activation.BF16:
            values, scale = round_inputs(rows, *key.inputs)
            rows = values * scale
        found[key] = collector.hessians[key].normalized([0])[0]
        torch.testing.assert_close(found[key], rows.T @ rows / 100, rtol=1e-4, atol=1e-5)
    assert (found[keys[0]] - found[keys[1]]).abs().max() > 1e-3


def test_evaluation_computes_as_what_is_loaded(run, text):
    out, _ = run
    quality = evaluate_checkpoint(out, data=str(text), seqlen=32, max_windows=8)
    windows = evaluation_windows(str(text), load_tokenizer(out), seqlen=32, max_windows=8, vocab_size=tiny.VOCAB)
    loss = F.cross_entropy(load(out).logits(windows.ids)[:, :-1].flatten(0, 1), windows.ids[:, 1:].flatten().long())
    assert quality.perplexity == pytest.approx(loss.exp().item(), rel=1e-3)


@pytest.mark.parametrize(("plan", "layout"), [(PLAN, "compressed-tensors"), (PLAN, "humming"), (HUMMING, "humming")])
def test_rounding_is_declared_and_survives_conversion(olmoe, tmp_path, plan, layout):
    out = tmp_path / "out"
    result = tiny.quantize(olmoe, out, plan, None, layout=layout)
    schemes = Plan.from_dict(plan).resolve(list(original(olmoe).spec.modules())).schemes
    table = json.loads((out / "alphaquant/modules.json").read_text())["modules"]
    for name, entry in table.items():
        assert Activation(entry.get("activation", "bf16")) is schemes[name].activation, name
    assert {m.scheme.rpartition("×")[2] for r in result.records for m in r.modules} >= {"int8", "fp8"}
    export_checkpoint(out, tmp_path / "humming", "humming")
    export_checkpoint(tmp_path / "humming", tmp_path / "again", layout)
    stored, again = (QuantizedCheckpoint.open(path) for path in (out, tmp_path / "again"))
    for name in stored.modules:
        assert_same_codes(again.read_quantized(name), stored.read_quantized(name), name)
    assert (tmp_path / "again/config.json").read_bytes() == (out / "config.json").read_bytes()
    ids = tiny.token_ids()
    assert torch.equal(load(tmp_path / "humming").logits(ids), load(out).logits(ids))


@pytest.mark.parametrize("aq", ["int8", "fp8"])
@pytest.mark.parametrize("experts", [False, True], ids=["linear", "experts"])
def test_gradients_pass_rounded_inputs(aq, experts):
    """Those of the inputs as if they were not rounded, those of the weight by what they are rounded to."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 32, generator=generator)
    w = torch.randn(2, 8, 32, generator=generator)
    counts = torch.tensor([5, 7])
    inputs = Inputs(Activation(aq))
    weights = _ServedWeights({"m.weight": w if experts else w[0]}, {"m.weight": (inputs,) * (2 if experts else 1)})

    def product(x):
        return expert_linear(x, counts, weights, "m") if experts else linear(x, weights, "m")

    with torch.no_grad():
        plain = product(x)
    x.requires_grad_()
    weights["m.weight"].requires_grad_()
    out = product(x)
    assert torch.allclose(out, plain, atol=1e-5)
    slope = torch.randn(out.shape, generator=generator)
    out.backward(slope)
    values, scale = round_inputs(x.detach(), *inputs)
    rounded = values * scale
    own = w.repeat_interleave(counts, 0) if experts else w[:1].expand(12, -1, -1)
    assert torch.allclose(x.grad, torch.einsum("ro,roi->ri", slope, own.detach()), atol=1e-5)
    parts = [slice(0, 5), slice(5, 12)] if experts else [slice(0, 12)]
    expected = torch.stack([slope[part].T @ rounded[part] for part in parts])
    assert torch.allclose(weights["m.weight"].grad, expected if experts else expected[0], atol=1e-4)
