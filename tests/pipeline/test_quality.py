"""What calibration buys, and that a run says the same twice."""

from __future__ import annotations

import json

import pytest
import torch

from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.errors import CalibrationError
from alphaquant.pipeline import evaluate_checkpoint, load, stream
from alphaquant.solver import Effort, Method, Recipe

from . import tiny


@pytest.fixture(scope="module", params=["olmoe", "llama"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("effort", [Effort.FAST, Effort.DEFAULT])
@pytest.mark.parametrize("scheme", ["int3:g32", "mxfp4"])
def test_gptq_is_closer_to_the_original_than_rounding(model, text, other_text, tmp_path, effort, scheme):
    """By KL to the original, on the calibration's text and on another of its kind."""
    quality = {}
    for method in Method:
        out = tmp_path / method.value
        tiny.quantize(model, out, scheme, text, num_samples=96, recipe=Recipe(method=method, effort=effort))
        quality[method] = [
            evaluate_checkpoint(out, data=str(data), seqlen=32, max_windows=64, against=model).agreement.kl
            for data in (text, other_text)
        ]
    for gptq, rtn in zip(quality[Method.GPTQ], quality[Method.RTN], strict=True):
        assert 1e-4 < gptq < 0.85 * rtn


def test_more_bits_are_closer(model, text, tmp_path):
    kl = []
    for bits in (2, 3, 4, 8):
        tiny.quantize(model, tmp_path / f"{bits}", f"int{bits}:g32", text)
        kl.append(evaluate_checkpoint(tmp_path / f"{bits}", data=str(text), seqlen=32, against=model).agreement.kl)
    assert kl[0] > 2 * kl[1] > 4 * kl[2] > 40 * kl[3] > 0


def test_two_runs_are_the_same_bytes(model, text, tmp_path):
    for name in ("a", "b"):
        tiny.quantize(model, tmp_path / name, tiny.SERVED_PLAN, text)
    names = tiny.listing(tmp_path / "a")
    assert names == tiny.listing(tmp_path / "b")
    for name in sorted(names):
        path = tmp_path / "a" / name
        if path.is_file() and path.name not in ("report.json", "manifest.json"):  # which hold times
            assert path.read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_resharded_model_gives_the_same_bytes(text, tmp_path):
    for shards in (1, 4):
        tiny.write_model(tmp_path / f"model-{shards}", "olmoe", shards=shards)
        tiny.quantize(tmp_path / f"model-{shards}", tmp_path / f"out-{shards}", "int4:g32", text)
    for path in (tmp_path / "out-1").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out-4" / path.name).read_bytes()


def test_another_seed_draws_other_tokens(llama, text, tmp_path):
    tokenizer = load_tokenizer(llama)
    drawn = [
        calibration_tokens(str(text), tokenizer, num_samples=4, seqlen=8, seed=seed, vocab_size=128).ids
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_rounding_without_calibration_needs_no_tokenizer(tmp_path, text):
    model = tiny.write_model(tmp_path / "model", "olmoe", tokenizer=False)
    rtn = Recipe(method=Method.RTN)
    result = tiny.quantize(model, tmp_path / "out", "int4:g32", None, recipe=rtn)
    assert result.report["calibration"] is None
    assert all(record.routing is None for record in result.records)
    assert load(tmp_path / "out").logits(tiny.token_ids()).shape == (4, 24, tiny.VOCAB)
    with pytest.raises(CalibrationError, match=r"no tokenizer\.json"):
        tiny.quantize(model, tmp_path / "out2", "int4:g32", text)


def test_token_files_need_no_tokenizer(tmp_path, text):
    with_one = tiny.write_model(tmp_path / "with", "llama")
    without = tiny.write_model(tmp_path / "without", "llama", tokenizer=False)
    tokens = calibration_tokens(
        str(text), load_tokenizer(with_one), num_samples=24, seqlen=32, seed=0, vocab_size=tiny.VOCAB
    )
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(tokens.ids.tolist()))
    tiny.quantize(with_one, tmp_path / "a", "int4:g32", text)
    tiny.quantize(without, tmp_path / "b", "int4:g32", rows)
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_chunks_change_next_to_nothing(model, text, tmp_path, monkeypatch):
    """Sums are made chunk by chunk: their order shows in the last digits of a Hessian, and hardly ever in a code."""
    tiny.quantize(model, tmp_path / "whole", "int4:g32", text)
    monkeypatch.setattr(stream, "CHUNK_TOKENS", 5 * 32)
    tiny.quantize(model, tmp_path / "parts", "int4:g32", text)
    ids = tiny.token_ids()
    whole, parts, original = (load(path).logits(ids) for path in (tmp_path / "whole", tmp_path / "parts", model))
    assert (whole - parts).norm() < 0.2 * (whole - original).norm()
    first = [load(tmp_path / name).layers[0]["self_attn.q_proj.weight"] for name in ("whole", "parts")]
    assert (first[0] != first[1]).float().mean() < 0.01


def test_windows_are_no_longer_than_the_model(tmp_path, text):
    """A longer window than the model has positions for is cut, and the report says so."""
    model = tiny.write_model(tmp_path / "model", "llama", max_position_embeddings=16)
    result = tiny.quantize(model, tmp_path / "out", "int4:g32", text, num_samples=4, seqlen=64)
    assert result.report["calibration"]["seqlen"] == 16
    assert any("16" in warning and "64" in warning for warning in result.report["warnings"])


def test_fewer_windows_than_asked_for_is_a_warning(llama, tmp_path, text):
    result = tiny.quantize(llama, tmp_path / "out", "int4:g32", text, num_samples=4000, seqlen=32)
    assert result.report["calibration"]["num_samples"] == 4000 // 32
    assert any("4000 asked for" in warning for warning in result.report["warnings"])
