"""What a run notes: the routing, starved experts, the audit, the report."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.errors import AlphaQuantError, NumericsError
from alphaquant.formats import Scheme, parse_format
from alphaquant.models import attention_half, rope_for
from alphaquant.models.attention import rms_norm
from alphaquant.pipeline import LayerRecord, load, plan_sizes, prepare
from alphaquant.pipeline import layer as layer_module
from alphaquant.pipeline.records import ModuleRecord, summarize
from alphaquant.plan import ModuleKind
from alphaquant.solver import Effort, Method, Recipe

from . import tiny
from .spy import Spy

FAST = Recipe(effort=Effort.FAST)


def naive_routing(x_NLD, layer, served, original, spec, power):
    """Counts, score mass and effective samples of each expert, token by token."""
    top_k = spec.layers[0].mlp.top_k
    x_NLD = attention_half(x_NLD, served.layers[layer], spec, layer, rope_for(spec, x_NLD.shape[1], "cpu"))
    normed = rms_norm(x_NLD, original.layers[layer]["post_attention_layernorm.weight"], spec.rms_norm_eps)
    probs = F.linear(normed, original.layers[layer]["mlp.gate.weight"]).double().softmax(-1).flatten(0, 1)
    scores: list[list[float]] = [[] for _ in range(8)]
    for row in probs.tolist():
        for expert in sorted(range(8), key=lambda e: -row[e])[:top_k]:
            scores[expert].append(row[expert])
    effective = [sum(s**power for s in seen) ** 2 / sum(s ** (2 * power) for s in seen) for seen in scores]
    return [len(seen) for seen in scores], [sum(seen) for seen in scores], effective


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_routing_is_recorded_as_the_model_routes(olmoe, text, tmp_path, monkeypatch, power):
    spy = Spy().install(monkeypatch)
    recipe = Recipe(effort=Effort.FAST, routing_power=power)
    result = tiny.quantize(olmoe, tmp_path / "out", "int4:g32", text, recipe=recipe)
    served, original = load(tmp_path / "out"), load(olmoe)
    tokens = 24 * 32
    for layer, record in enumerate(result.records[:2]):
        routing = record.routing
        assert routing is not None
        assert sum(routing.tokens) == tokens * 2
        counts, mass, effective = naive_routing(spy.before[layer], layer, served, original, served.spec, power)
        assert routing.tokens == counts
        assert routing.score_mass == pytest.approx(mass, rel=1e-4)
        assert routing.effective_samples == pytest.approx(effective, rel=1e-4)
        for module in record.modules:
            if module.kind == "expert":
                expert = int(module.name.split(".")[5])
                assert module.tokens == counts[expert]
                assert module.effective_samples == pytest.approx(effective[expert], rel=1e-4)
            else:
                assert module.tokens == module.effective_samples == tokens
    stored = json.loads((tmp_path / "out/alphaquant/records/layer-00001.json").read_text())
    assert LayerRecord.from_dict(stored) == result.records[1]


def unloved(expert: int) -> dict[str, torch.Tensor]:
    """Changes to a model after which no token chooses this expert: a constant that only its router row sees."""
    tensors = tiny.random_tensors("olmoe")
    changes = {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1.0}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        changes[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(64)
        router = tensors[f"{prefix}.mlp.gate.weight"]
        router -= router.mean(1, keepdim=True)
        router[expert] -= 2.0
        changes[f"{prefix}.mlp.gate.weight"] = router
    return changes


def test_starved_experts_are_rounded_and_noted(text, tmp_path):
    model = tiny.write_model(tmp_path / "model", "olmoe", changes=unloved(3))
    recipe = Recipe(rtn_below=0.25)
    result = tiny.quantize(model, tmp_path / "out", "int4:g32", text, num_samples=48, recipe=recipe)
    starved = {
        f"model.layers.{record.layer}.mlp.experts.{expert}.{leaf}_proj": record.routing.tokens[expert]
        for record in result.records[:2]
        for expert, effective in enumerate(record.routing.effective_samples)
        for leaf in ("gate", "up", "down")
        if effective < recipe.rtn_below * 64
    }
    assert [record.routing.tokens[3] for record in result.records[:2]] == [0, 0]
    assert 6 <= len(starved) <= 24
    assert max(starved.values()) > 0, "some saw a little, expert 3 nothing"
    modules = {m.name: m for record in result.records for m in record.modules}
    assert {name for name, m in modules.items() if m.event is not None} == set(starved)
    for name, tokens in starved.items():
        module = modules[name]
        assert (module.method, module.tokens, module.damping) == ("rtn", tokens, 0.0)
        effective = f"{module.effective_samples:.0f}"
        assert module.event == f"rounded to nearest: {effective} effective samples for 64 inputs"
    assert {m.method for name, m in modules.items() if name not in starved} == {"gptq"}
    assert {event["module"] for event in result.report["events"]} == set(starved)
    assert sum(row.fallbacks for row in result.summary) == len(starved)
    # they are quantized well all the same, and the model is whole
    before, after = load(model), load(tmp_path / "out")
    for layer in range(2):
        w = before.layers[layer]["mlp.experts.up_proj.weight"][3]
        error = (after.layers[layer]["mlp.experts.up_proj.weight"][3] - w).norm() / w.norm()
        assert error < 0.15
    assert bool(after.logits(tiny.token_ids()).isfinite().all())


@pytest.mark.parametrize("length", [1, 2, 8])
def test_few_tokens_starve_every_expert(olmoe, tmp_path, length):
    """One token of calibration, too: experts with none, one and few rows; from two on there is something to go by."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([list(range(length))]))
    result = tiny.quantize(olmoe, tmp_path / "out", "int4:g32", rows, num_samples=1, seqlen=length)
    for record in result.records[:2]:
        assert sum(record.routing.tokens) == 2 * length
        experts = [module for module in record.modules if module.kind == "expert"]
        assert all((m.method == "rtn") == (m.effective_samples < 2) == (m.event is not None) for m in experts)
        assert any(m.method == "rtn" for m in experts)
    assert bool(load(tmp_path / "out").logits(tiny.token_ids()).isfinite().all())


def test_rounding_that_was_asked_for_is_no_event(olmoe, text, tmp_path):
    recipe = Recipe(method=Method.RTN)
    for name, source in (("with", text), ("without", None)):
        result = tiny.quantize(olmoe, tmp_path / name, "int4:g32", source, recipe=recipe, num_samples=1)
        assert result.report["events"] == []
        assert {m.method for record in result.records for m in record.modules} == {"rtn"}
        assert {row.fallbacks for row in result.summary} == {0}


def drop(monkeypatch, name, *, record: bool, codes: bool):
    """Let a layer lose one module on its way out."""
    original = layer_module.LayerQuantizer.layer

    def layer(*args):
        result = original(*args)
        if record:
            result.record.modules[:] = [m for m in result.record.modules if m.name != name]
        if codes:
            result.quantized.pop(name, None)
        return result

    monkeypatch.setattr(layer_module.LayerQuantizer, "layer", layer)


@pytest.mark.parametrize(("record", "codes"), [(True, True), (True, False), (False, True)])
def test_a_module_that_gets_lost_is_an_error(olmoe, tmp_path, monkeypatch, record, codes):
    name = "model.layers.1.mlp.experts.5.up_proj"
    drop(monkeypatch, name, record=record, codes=codes)
    with pytest.raises(AlphaQuantError, match=rf"1 modules differ between plan and result: {name}"):
        tiny.quantize(olmoe, tmp_path / "out", "int4:g32", None)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_the_audit_counts(olmoe, llama, tmp_path):
    assert tiny.quantize(olmoe, tmp_path / "a", "int4:g32", None).report["audit"] == {
        "targeted": 56,
        "quantized": 56,
        "left": 13,
    }
    plan = {"overrides": [{"pattern": "*.self_attn.*", "skip": True}], "default": {"wq": "int4", "group_size": 64}}
    assert tiny.quantize(llama, tmp_path / "b", plan, None).report["audit"] == {
        "targeted": 6,
        "quantized": 6,
        "left": 15,
    }


def test_the_report_adds_up(olmoe, text, tmp_path):
    result = tiny.quantize(olmoe, tmp_path / "out", tiny.SERVED_PLAN, text, recipe=FAST, command="alphaquant x")
    report = result.report
    assert json.loads(json.dumps(report)) == report
    assert report["version"] == 1
    assert report["command"] == "alphaquant x"
    assert report["model"]["family"] == "olmoe"
    assert report["calibration"]["num_samples"] == 24
    assert report["calibration"]["seqlen"] == 32
    assert report["recipe"]["method"] == "gptq"
    assert report["recipe"]["effort"] == "fast"
    assert report["dtype"] == "float32"
    shards = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert report["sizes"]["after_bytes"] == shards
    assert report["sizes"]["before_bytes"] == 4 * sum(t.numel() for t in tiny.random_tensors("olmoe").values())
    modules = [m for record in result.records for m in record.modules]
    bits = sum(m.bits_per_weight * m.num_weights for m in modules) / sum(m.num_weights for m in modules)
    assert report["sizes"]["bits_per_weight"] == pytest.approx(bits)
    assert sum(row.modules for row in result.summary) == len(modules) == report["audit"]["quantized"]
    seconds = report["seconds"]
    assert {"tokenize", "read", "calibrate", "solve", "propagate", "pack", "write", "total"} <= set(seconds)
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"] + 0.01
    assert report["peak_memory_bytes"] > 1 << 20
    for module in modules:
        assert 0 < module.relative_loss < 0.2, module
        assert module.bits_per_weight < 9


def test_sizes_are_known_before(olmoe, tmp_path):
    """The sizes that are shown before a run are those of the stored tensors, but for names and shapes."""
    sizes = plan_sizes(prepare(olmoe, tiny.as_plan(tiny.SERVED_PLAN)))
    result = tiny.quantize(olmoe, tmp_path / "out", tiny.SERVED_PLAN, None)
    assert sum(s.modules for s in sizes) == 69
    assert sum(s.before_bytes for s in sizes) == result.report["sizes"]["before_bytes"]
    for row in result.summary:
        match = next(s for s in sizes if (s.kind, s.scheme) == (row.kind, row.scheme))
        assert (match.modules, match.weights) == (row.modules, row.weights)
        assert 8 * match.after_bytes / match.weights == pytest.approx(row.bits_per_weight, rel=0.01)
    headers = 200 * len(list((tmp_path / "out").glob("*.safetensors"))) + 120 * 200
    after = sum(s.after_bytes for s in sizes)
    assert after <= result.report["sizes"]["after_bytes"] <= after + headers


def test_summary_weighs_bits_by_size():
    scheme = str(Scheme(parse_format("int4"), 32))

    def module(kind, num_weights, bits, loss, event=None):
        return ModuleRecord("m", kind, scheme, bits, num_weights, loss, loss, 1, 1.0, 0.1, "gptq", event)

    records = [
        LayerRecord(0, [module("expert", 100, 4.0, 0.1), module("attention", 50, 4.5, 0.3)]),
        LayerRecord(1, [module("expert", 300, 5.0, 0.3, "rounded to nearest")]),
    ]
    rows = summarize(records, list(ModuleKind))
    assert [row.kind for row in rows] == ["attention", "expert"]
    assert math.isclose(rows[1].bits_per_weight, 4.75)
    assert math.isclose(rows[1].relative_loss, 0.2)
    assert (rows[1].modules, rows[1].weights, rows[1].fallbacks) == (2, 400, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.experts.2.down_proj", "model.layers.0.input_layernorm", "lm_head", "model.embed_tokens"],
)
def test_weights_that_are_no_numbers_are_named(tmp_path, text, name, value):
    tensor = tiny.random_tensors("olmoe")[f"{name}.weight"]
    tensor.view(-1)[-1] = value
    model = tiny.write_model(tmp_path / "model", "olmoe", changes={f"{name}.weight": tensor})
    for source in (text, None):
        with pytest.raises(NumericsError) as caught:
            tiny.quantize(model, tmp_path / "out", "int4:g32", source, fresh=True)
        assert caught.value.where == f"{name}.weight"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ("model.layers.1.self_attn.o_proj", "layer 1, attention"),
        ("model.layers.1.mlp.experts.{}.down_proj", "layer 1, feed-forward"),
        ("model.layers.0.mlp.experts.{}.down_proj", "layer 0, feed-forward"),
    ],
)
@pytest.mark.parametrize("plan", ["int8:g64", "bf16"])
def test_activations_that_overflow_are_named(tmp_path, text, changed, where, plan):
    """Weights that are numbers, but too large for the type that the stream is in."""
    names = {changed.format(expert) for expert in range(8)}
    large = {f"{name}.weight": torch.randn(64, 64).clamp(-3, 3) * 1e38 for name in names}
    model = tiny.write_model(tmp_path / "model", "olmoe", changes=large)
    with pytest.raises(NumericsError, match="activations become NaN or infinite") as caught:
        tiny.quantize(model, tmp_path / "out", plan, text)
    assert caught.value.where == where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", [True, False])
def test_a_loss_that_is_no_number_is_named(tmp_path, text, source):
    """Weights whose squares overflow: the run cannot say how good it is, and must not write NaN into its records."""
    name = "model.layers.0.self_attn.q_proj"
    model = tiny.write_model(tmp_path / "model", "llama", changes={f"{name}.weight": torch.randn(64, 64) * 1e25})
    with pytest.raises(NumericsError, match="the loss is") as caught:
        tiny.quantize(model, tmp_path / "out", "int4:g32", text if source else None)
    assert caught.value.where == name
    assert not (tmp_path / "out").exists()
