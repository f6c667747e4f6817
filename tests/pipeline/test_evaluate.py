"""Perplexity and agreement against a naive computation in fp64."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from alphaquant.calibration import evaluation_windows, load_tokenizer
from alphaquant.checkpoint import Checkpoint
from alphaquant.errors import CalibrationError, CheckpointError, ConfigError, NumericsError
from alphaquant.layouts import open_source
from alphaquant.models import detect, load_decoder, moe
from alphaquant.pipeline import evaluate, evaluate_checkpoint, stream

from . import tiny

LENGTH, WINDOWS = 24, 21


@pytest.fixture(scope="module", params=["olmoe", "llama"])
def pair(request, tmp_path_factory, text):
    """An original and its quantization."""
    model, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("evaluate") / "out"
    tiny.quantize(model, out, "int3:g32", text)
    return model, out


def naive_windows(model, text):
    """The ids of each window: the words' numbers, cut from the start."""
    words = [int(word[1:]) for word in text.read_text().split()]
    return [words[i * LENGTH : (i + 1) * LENGTH] for i in range(WINDOWS)]


def naive_log_probs(path, windows):
    """Log-probabilities `[N, L - 1, V]` in fp64."""
    source = open_source(path)
    decoder = load_decoder(source, detect(source.config), torch.float64)
    return torch.stack([decoder.logits(torch.tensor([ids]))[0, :-1].log_softmax(-1) for ids in windows])


def naive_nll(log_probs, windows):
    """Mean negative log-likelihood of each window, token by token."""
    return [
        -sum(log_probs[n][i][ids[i + 1]].item() for i in range(LENGTH - 1)) / (LENGTH - 1)
        for n, ids in enumerate(windows)
    ]


def evaluated(path, text, **options):
    return evaluate_checkpoint(path, data=str(text), seqlen=LENGTH, max_windows=WINDOWS, **options)


def test_perplexity_is_the_naive_one(pair, other_text):
    for path in pair:
        windows = naive_windows(path, other_text)
        nll = naive_nll(naive_log_probs(path, windows), windows)
        quality = evaluated(path, other_text)
        assert quality.perplexity == pytest.approx(math.exp(statistics.mean(nll)), rel=1e-5)
        stderr = math.exp(statistics.mean(nll)) * statistics.stdev(nll) / math.sqrt(WINDOWS)
        assert quality.stderr == pytest.approx(stderr, rel=1e-4)
        assert quality.tokens == WINDOWS * (LENGTH - 1)
        assert quality.windows == WINDOWS
        assert quality.agreement is None


def test_agreement_is_the_naive_one(pair, other_text):
    model, out = pair
    windows = naive_windows(model, other_text)
    p, q = naive_log_probs(model, windows), naive_log_probs(out, windows)
    kl = [[(p[n, i].exp() * (p[n, i] - q[n, i])).sum().item() for i in range(LENGTH - 1)] for n in range(WINDOWS)]
    per_window = [statistics.mean(row) for row in kl]
    agreement = evaluated(out, other_text, against=model).agreement
    assert agreement.kl == pytest.approx(statistics.mean(per_window), rel=1e-4)
    assert agreement.kl_stderr == pytest.approx(statistics.stdev(per_window) / math.sqrt(WINDOWS), rel=1e-3)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert agreement.top1_agreement == pytest.approx(same, abs=0.005)
    assert agreement.original_perplexity == pytest.approx(evaluated(model, other_text).perplexity, rel=1e-9)
    assert 0.2 < agreement.top1_agreement < 0.999


def routed(path, windows, monkeypatch):
    """The experts of every token, layer by layer, as the model itself routes: lists of sets."""
    found, route = [], moe.route

    def spy(*args):
        choice = route(*args)
        found.append([set(row) for row in choice.topk_ids_TK.tolist()])
        return choice

    monkeypatch.setattr(moe, "route", spy)
    source = open_source(path)
    load_decoder(source, detect(source.config), torch.float32).logits(torch.tensor(windows))
    monkeypatch.undo()
    return found


def test_router_agreement_is_the_naive_one(olmoe, tmp_path, text, other_text, monkeypatch):
    out = tmp_path / "out"
    tiny.quantize(olmoe, out, "int2:g32", text)
    windows = naive_windows(olmoe, other_text)
    ours, original = (routed(path, windows, monkeypatch) for path in (out, olmoe))
    wanted = [
        statistics.mean(len(a & b) / len(b) for a, b in zip(*layer, strict=True))
        for layer in zip(ours, original, strict=True)
    ]
    agreement = evaluated(out, other_text, against=olmoe, dtype="fp32").agreement
    assert agreement.router_by_layer == pytest.approx(wanted, abs=2e-3)
    assert agreement.router == pytest.approx(statistics.mean(wanted), abs=2e-3)
    assert 0.3 < agreement.router < 0.995


def test_router_agreement_of_equal_and_of_dense_models(olmoe, llama, other_text, monkeypatch):
    same = evaluated(olmoe, other_text, against=olmoe).agreement
    assert set(same.router_by_layer) == {1.0}
    dense = evaluated(llama, other_text, against=llama).agreement
    assert (dense.router_by_layer, dense.router) == ((), None)
    monkeypatch.setattr(evaluate, "_ROUTED_TOKENS", 5)  # less than a window: one is compared all the same
    assert set(evaluated(olmoe, other_text, against=olmoe).agreement.router_by_layer) == {1.0}


def test_a_model_agrees_with_itself(pair, other_text):
    for path in pair:
        agreement = evaluated(path, other_text, against=path).agreement
        assert agreement.kl == 0.0
        assert agreement.kl_stderr == 0.0
        assert agreement.top1_agreement == 1.0


def test_chunks_do_not_matter(pair, other_text, monkeypatch):
    model, out = pair
    whole = evaluated(out, other_text, against=model)
    monkeypatch.setattr(stream, "CHUNK_TOKENS", 2 * LENGTH)
    monkeypatch.setattr(evaluate, "_HEAD_TOKENS", 5 * LENGTH)
    parts = evaluated(out, other_text, against=model)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert parts.stderr == pytest.approx(whole.stderr, rel=1e-4)
    assert parts.agreement.kl == pytest.approx(whole.agreement.kl, rel=1e-4)
    assert parts.agreement.top1_agreement == pytest.approx(whole.agreement.top1_agreement, abs=1e-2)


def test_windows_come_from_the_start_side_by_side(pair, other_text):
    model, _ = pair
    batch = evaluation_windows(
        str(other_text), load_tokenizer(model), seqlen=LENGTH, max_windows=WINDOWS, vocab_size=tiny.VOCAB
    )
    assert batch.ids.tolist() == naive_windows(model, other_text)
    everything = evaluate_checkpoint(model, data=str(other_text), seqlen=250)
    assert everything.windows == 3000 // 250


def test_one_window_has_no_error_bar(llama, other_text):
    quality = evaluate_checkpoint(llama, data=str(other_text), seqlen=16, max_windows=1)
    assert quality.stderr == 0.0
    assert quality.tokens == 15


def test_bf16_is_near_fp32(pair, other_text):
    model, _ = pair
    fp32, bf16 = (evaluated(model, other_text, dtype=dtype).perplexity for dtype in ("fp32", "bf16"))
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.02)


def test_a_sharded_model_scores_the_same(tmp_path, other_text):
    scores = {evaluated(tiny.write_model(tmp_path / f"{n}", "olmoe", shards=n), other_text) for n in (1, 5)}
    assert len(scores) == 1


def test_other_vocabularies_cannot_be_compared(pair, tmp_path, other_text):
    other = tiny.write_model(tmp_path / "other", "llama", vocab_size=160)
    with pytest.raises(ConfigError, match="128 and 160"):
        evaluated(pair[0], other_text, against=other)


def test_a_token_outside_the_vocabulary(tmp_path, other_text):
    model = tiny.write_model(tmp_path / "model", "llama", vocab_size=100)
    with pytest.raises(CalibrationError, match="outside the model's vocabulary of 100"):
        evaluated(model, other_text)


def test_a_window_of_one_token(llama, other_text):
    with pytest.raises(CalibrationError, match="predicts nothing"):
        evaluate_checkpoint(llama, data=str(other_text), seqlen=1)


def test_codes_that_are_gone_are_an_error(pair, tmp_path, other_text):
    """A directory whose table and weights disagree is not evaluated as if it were dense."""
    _, out = pair
    for path in out.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(out)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    table = tmp_path / "alphaquant/modules.json"
    content = json.loads(table.read_text())
    lost = content["modules"].pop("model.layers.0.self_attn.q_proj")
    table.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        evaluated(tmp_path, other_text)
    content["modules"]["model.layers.0.self_attn.q_proj"] = lost | {"format": "int4"}
    table.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="implies"):
        evaluated(tmp_path, other_text)


def test_an_exploding_model_is_an_error(tmp_path, other_text):
    """Logits so large that perplexity has no number: an error that says so, not a traceback."""
    head = tiny.random_tensors("llama")["lm_head.weight"] * 1e4
    model = tiny.write_model(tmp_path / "model", "llama", changes={"lm_head.weight": head})
    with pytest.raises(NumericsError, match="perplexity") as caught:
        evaluated(model, other_text)
    assert caught.value.remedy
    head = head.clamp(-1, 1) * 3e38
    model = tiny.write_model(tmp_path / "inf", "llama", changes={"lm_head.weight": head})
    with pytest.raises(NumericsError, match="perplexity"):
        evaluated(model, other_text)


def test_nothing_is_written(pair, other_text):
    before = [(path, path.stat().st_mtime_ns) for path in sorted(pair[1].rglob("*"))]
    evaluated(pair[1], other_text, against=pair[0])
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted(pair[1].rglob("*"))]
    assert Checkpoint.open(pair[1])
