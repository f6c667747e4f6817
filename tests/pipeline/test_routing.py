"""Routing of the model as it is: what transformers' own routers choose; experts that see little are named."""

from __future__ import annotations

import json
import math

import pytest
import torch

from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.pipeline import Calibration, RoutingRecord, measure_routing, prepare
from alphaquant.pipeline.records import LayerRecord

from . import tiny

SAMPLES, LENGTH = 12, 32


def measured(model, text):
    prepared = prepare(model, tiny.as_plan("bf16"))
    return measure_routing(prepared, Calibration(str(text), SAMPLES, LENGTH))


def transformers_routing(directory, text):
    """Router probabilities `[T, E]` of every layer, and the shared expert's gates `[T]`, seen by hooks."""
    import transformers  # noqa: PLC0415  (slow)

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    gates = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "shared_expert_gate"):
            layer.mlp.shared_expert_gate.register_forward_hook(lambda *seen: gates.append(seen[2].sigmoid().flatten()))
    ids = calibration_tokens(
        str(text), load_tokenizer(directory), num_samples=SAMPLES, seqlen=LENGTH, seed=0, vocab_size=tiny.VOCAB
    ).ids
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    return [each.double().softmax(-1) for each in logits], gates


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_routing_is_that_of_transformers(family, text, tmp_path):
    model = tiny.write_model(tmp_path / "model", family, num_key_value_heads=2)
    report = measured(model, text)
    probs, gates = transformers_routing(model, text)
    assert [layer.layer for layer in report.layers] == [0, 1]
    assert report.calibration["num_samples"] * report.calibration["seqlen"] == SAMPLES * LENGTH
    for layer, probs_TE in zip(report.layers, probs, strict=True):
        score_TK, chosen_TK = probs_TE.topk(2, -1)
        scores = [score_TK[chosen_TK == expert] for expert in range(8)]
        counts = [len(seen) for seen in scores]
        record, facts = layer.record, layer.to_dict()
        assert record.tokens == counts
        assert record.score_mass == pytest.approx([float(seen.sum()) for seen in scores], rel=1e-4)
        effective = [float(seen.sum() ** 2 / seen.square().sum()) for seen in scores]
        assert record.effective_samples == pytest.approx(effective, rel=1e-4)
        shares = [count / sum(counts) for count in counts]
        assert facts["entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares if p) / math.log(8))
        assert facts["expert_entropy"] == pytest.approx([-p * math.log(p or 1) / math.log(8) for p in shares])
        assert facts["coverage"] == pytest.approx([value / 64 for value in effective], rel=1e-4)
        assert facts["covered"] == sum(value >= 64 for value in effective) / 8
        assert 0 < facts["covered"] < 1, "the test sees both kinds"
    assert [layer.gate is not None for layer in report.layers] == [bool(gates)] * 2
    for layer, gate_T in zip(report.layers, gates, strict=False):
        shared = layer.to_dict()["shared_gate"]
        assert shared["tokens"] == SAMPLES * LENGTH
        assert shared["mean"] == layer.gate == pytest.approx(float(gate_T.mean()), rel=1e-4)
        effective = float(gate_T.sum() ** 2 / gate_T.square().sum())
        assert shared["effective_samples"] == pytest.approx(effective, rel=1e-4)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_a_run_that_changes_nothing_records_the_same(family, text, tmp_path):
    model = tiny.write_model(tmp_path / "model", family)
    plan = {"default": {"wq": "bf16"}, "overrides": [{"pattern": "lm_head", "wq": "int8", "group_size": 32}]}
    result = tiny.quantize(model, tmp_path / "out", plan, text, num_samples=SAMPLES, seqlen=LENGTH)
    report = measured(model, text)
    found = {record.layer: record.routing for record in result.records if record.routing is not None}
    assert found == {layer.layer: layer.record for layer in report.layers}
    assert list(found) == ([1] if family == "deepseek" else [0, 1]), "its first layer is dense"
    assert all((routing.shared is not None) == (family == "qwen2_moe") for routing in found.values())
    stored = json.loads((tmp_path / "out/alphaquant/records/layer-00001.json").read_text())
    assert LayerRecord.from_dict(stored) == result.records[1]


def test_starved_and_dead_experts_are_told_apart():
    record = RoutingRecord([0, 100, 24, 276], [0.0] * 4, [0.0] * 4)
    assert (record.dead, record.starved) == ([0], [2])
    assert record.load == [0.0, 1.0, 0.24, 2.76]
    assert RoutingRecord([25, 100, 99, 176], [0.0] * 4, [0.0] * 4).starved == [], "a quarter is not less than a quarter"
    assert RoutingRecord([5] * 4, [1.0] * 4, [1.0] * 4).entropy == pytest.approx(1)
    assert RoutingRecord([5] * 4, [1.0] * 4, [1.0] * 4).expert_entropy == pytest.approx([0.25] * 4)
    assert RoutingRecord([7], [1.0], [1.0]).entropy == 1, "of one expert, as of a shared one, the load is even"
    assert RoutingRecord([5, 0, 0, 0], [1.0] * 4, [1.0] * 4).entropy == 0
    nothing = RoutingRecord([0, 0], [0.0] * 2, [0.0] * 2)
    assert (nothing.dead, nothing.starved, nothing.entropy) == ([0, 1], [], 0)
    older = {"tokens": [1], "score_mass": [1.0], "effective_samples": [1.0]}
    assert RoutingRecord.from_dict(older).shared is None
