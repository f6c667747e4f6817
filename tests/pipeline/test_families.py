"""A run goes through families that route, share experts and name things in other ways."""

from __future__ import annotations

import pytest
import torch

from alphaquant.layouts import QuantizedCheckpoint
from alphaquant.pipeline import evaluate_checkpoint, export_checkpoint, load

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
