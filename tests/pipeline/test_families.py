"""A run goes through families that route, share experts and name things in other ways."""

from __future__ import annotations

import json

import pytest
import torch

from alphaquant.checkpoint import Checkpoint
from alphaquant.errors import CheckpointError
from alphaquant.layouts import QuantizedCheckpoint
from alphaquant.pipeline import evaluate_checkpoint, export_checkpoint, load, plan_sizes, prepare
from alphaquant.plan import Plan

from . import tiny
from .spy import Spy

TOKENS = 24 * 32


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS.keys() - {"olmoe", "llama"}))
def test_a_family_goes_through(family, text, tmp_path, monkeypatch):
    model = tiny.write_model(tmp_path / "model", family)
    spy = Spy().install(monkeypatch)
    result = tiny.quantize(model, tmp_path / "out", tiny.SERVED_PLAN, text)
    monkeypatch.undo()
    audit = result.report["audit"]
    assert audit["targeted"] == audit["quantized"] == len(spy.quantized) > 30
    for record in result.records[:2]:
        assert record.routing is None or sum(record.routing.tokens) == 2 * TOKENS
    assert result.records[1].routing is not None
    for module in (m for record in result.records for m in record.modules if m.kind == "shared_expert"):
        assert module.tokens == TOKENS
        assert 0 < module.effective_samples <= TOKENS
    loaded, ids = load(tmp_path / "out"), tiny.token_ids()
    for layer, weights in enumerate(loaded.layers):
        for key, weight in weights.items():
            assert torch.equal(weight, spy.weights[layer][key]), key
    stored = QuantizedCheckpoint.open(tmp_path / "out")
    assert set(stored.modules) == set(spy.quantized)
    for target in ("humming", "dense"):
        export_checkpoint(tmp_path / "out", tmp_path / target, target)
        assert torch.equal(load(tmp_path / target).logits(ids), loaded.logits(ids))
    quality = evaluate_checkpoint(tmp_path / "out", data=str(text), seqlen=32, max_windows=8, against=model)
    assert 1e-4 < quality.agreement.kl < 0.5


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_shared_experts_are_asked_for_as_others_are(family, text, tmp_path):
    """Shared experts are seen by every token; the gate of one weighs them where there is a gate."""
    model = tiny.write_model(tmp_path / "model", family)
    result = tiny.quantize(model, tmp_path / "out", "int4:g32", text)
    shared = [m for record in result.records for m in record.modules if m.kind == "shared_expert"]
    assert shared
    for module in shared:
        assert (module.effective_samples == pytest.approx(TOKENS)) is (family == "deepseek")


MIXTURES = sorted(tiny.CONFIGS.keys() - {"llama"})


@pytest.mark.parametrize("family", MIXTURES)
def test_fused_experts_quantize_to_the_same_bytes(family, text, tmp_path):
    twin = tiny.write_model(tmp_path / "model", family, dtype="bfloat16")
    fused = tiny.write_fused(tmp_path / "fused", twin)
    assert "model.layers.1.mlp.experts.gate_up_proj" in Checkpoint.open(fused).names()
    plan = Plan.from_dict(tiny.SERVED_PLAN)
    assert plan_sizes(prepare(fused, plan)) == plan_sizes(prepare(twin, plan))
    for model in (twin, fused):
        tiny.quantize(model, tmp_path / f"{model.name}-out", tiny.SERVED_PLAN, text)
    ours, theirs = tmp_path / "fused-out", tmp_path / "model-out"
    shards = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert len(shards) == 3
    for name in (*shards, "model.safetensors.index.json", "config.json", "alphaquant/modules.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    for record in sorted((theirs / "alphaquant" / "records").iterdir()):
        assert json.loads((ours / "alphaquant" / "records" / record.name).read_text()) == json.loads(record.read_text())
    qualities = [
        evaluate_checkpoint(ours, data=str(text), seqlen=32, max_windows=4, against=against)
        for against in (twin, fused)
    ]
    assert qualities[0] == qualities[1]
    assert torch.equal(load(fused).logits(tiny.token_ids()), load(twin).logits(tiny.token_ids()))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_transposed_fused_experts_are_refused_before_any_work(family, tmp_path):
    twin = tiny.write_model(tmp_path / "model", family, intermediate_size=96, moe_intermediate_size=96)
    fused = tiny.write_fused(tmp_path / "fused", twin, transposed=True)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.gate_up_proj has shape \[8, 64, 192\]"):
        prepare(fused, Plan.from_shorthand("int4:g32"))
