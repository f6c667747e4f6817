"""Activations that are no numbers: found where they arise, left out up to one sample in a hundred, an error beyond."""

from __future__ import annotations

import json

import pytest
import torch

from alphaquant.errors import NumericsError
from alphaquant.models import Routing, Source, detect
from alphaquant.pipeline import layer as layer_module
from alphaquant.pipeline import load, run_status
from alphaquant.pipeline.collect import Collector, Reading, widths
from alphaquant.solver import Effort, HessianSum, Recipe

from . import tiny
from .test_records import unloved
from .test_resume import result_of, stop_in_layer

FAST = Recipe(effort=Effort.FAST)
ODD = tiny.VOCAB - 1  # a word that no text holds


def poisoned(directory):
    """A model in which one word alone drives the second feed-forward out of the range of fp16.

    Its embedding lies in a direction that no other word has, and layer 1 blows that direction up.
    """
    tensors = tiny.random_tensors("llama")
    changes = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "proj" in name and not name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[:, 0] = 0  # nothing but what is meant reads the first channel
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0  # and nothing writes it
        changes[name] = tensor
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0
    embedding[ODD] = 0
    embedding[ODD, 0] = 8.0
    for projection in ("gate_proj", "up_proj"):
        changes[f"model.layers.1.mlp.{projection}.weight"][5, 0] = 400.0
    return tiny.write_model(directory, "llama", changes=changes)


def rows(path, num_samples, bad=()):
    """Random rows of tokens, of which the bad ones hold the odd word."""
    ids = tiny.token_ids(num_samples, 16)
    for sample in bad:
        ids[sample, 7] = ODD
    path.write_text(json.dumps(ids.tolist()))
    return path


def quantize(model, out, text, num_samples, **options):
    return tiny.quantize(
        model, out, "int4:g32", text, num_samples=num_samples, seqlen=16, recipe=FAST, dtype="fp16", **options
    )


def test_one_sample_in_a_hundred_is_left_out(tmp_path):
    model = poisoned(tmp_path / "model")
    text = rows(tmp_path / "rows.json", 100, bad=[41])
    report = quantize(model, tmp_path / "out", text, 100).report
    said = [f"{event['module']}: {event['event']}" for event in report["events"]]
    assert len(said) == 2, said
    assert said[0] == (
        "layer 1: layer 1, feed-forward: 1 of 1600 inputs of mlp.down_proj are NaN or infinite, "
        "and left out of the Hessian"
    )
    assert "sample" in said[1]
    assert "model.layers.1.mlp.down_proj" in said[1]
    assert "left out" in said[1]
    record = json.loads((tmp_path / "out/alphaquant/records/layer-00001.json").read_text())
    assert len(record["events"]) == 2
    assert bool(load(tmp_path / "out").logits(tiny.token_ids()).isfinite().all())
    # the samples that are left are calibrated on as if it had never been
    without = quantize(model, tmp_path / "without", rows(tmp_path / "good.json", 100), 100)
    assert without.report["events"] == []


@pytest.mark.parametrize("bad", [[3, 41], [3]])
def test_more_is_an_error(tmp_path, bad):
    num_samples = 100 if len(bad) > 1 else 99
    text = rows(tmp_path / "rows.json", num_samples, bad=bad)
    with pytest.raises(NumericsError, match="activations become NaN or infinite in sample") as caught:
        quantize(poisoned(tmp_path / "model"), tmp_path / "out", text, num_samples)
    assert caught.value.where == "layer 1, feed-forward"
    assert "model.layers.1.mlp.down_proj" in caught.value.what


def test_what_is_left_out_stays_so_after_a_stop(tmp_path, monkeypatch):
    model, text = poisoned(tmp_path / "model"), rows(tmp_path / "rows.json", 100, bad=[41])
    for name, where in (("whole", None), ("stopped", "head")):
        if where is not None:
            with monkeypatch.context() as patch:
                patch.setattr(layer_module.LayerQuantizer, where, lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    quantize(model, tmp_path / name, text, 100)
            assert run_status(tmp_path / name).done == 2
        quantize(model, tmp_path / name, text, 100)
    assert result_of(tmp_path / "whole") == result_of(tmp_path / "stopped")


def test_rows_that_are_no_numbers_stay_out_of_a_hessian():
    """Of their own expert, with their counts and scores."""
    spec = detect(tiny.CONFIGS["olmoe"])
    parameters = spec.parameters(0)
    x, score = torch.randn(7, 64), torch.rand(7)
    x[2, 5], x[6, 0] = float("nan"), float("inf")
    counts = torch.tensor([0, 3, 0, 3, 1, 0, 0, 0])
    reading = Reading(Source.EXPERT_IN)
    wanted = {reading: range(widths(parameters)[Source.EXPERT_IN][0])}
    collector = Collector(parameters, wanted, 1.0)
    collector(Source.EXPERT_IN, x, Routing(counts, score))
    good = torch.tensor([0, 1, 3, 4, 5])
    expected = HessianSum(8, 64, 1.0)
    expected.add(x[good], [0, 2, 0, 3, 0, 0, 0, 0], score[good])
    found = collector.hessians[reading]
    assert torch.equal(found.sum_EII, expected.sum_EII)
    assert found.evidence.tokens_E.tolist() == [0, 2, 0, 3, 0, 0, 0, 0]
    assert collector.rows == {reading: [2, 7]}


def test_strict_makes_an_error_of_a_fallback(tmp_path, text):
    model = tiny.write_model(tmp_path / "model", "olmoe", changes=unloved(3))
    with pytest.raises(NumericsError, match=r"--strict: rounded to nearest: . effective samples") as caught:
        tiny.quantize(model, tmp_path / "out", "int4:g32", text, strict=True, recipe=FAST)
    assert caught.value.where.startswith("model.layers.0.mlp.experts.")
    assert not (tmp_path / ".out.partial").exists()


def test_strict_looks_at_what_was_done_before(tmp_path, text, monkeypatch):
    model = tiny.write_model(tmp_path / "model", "olmoe", changes=unloved(3))
    with monkeypatch.context() as patch:
        stop_in_layer(patch, 1)
        with pytest.raises(BaseException):  # noqa: B017
            tiny.quantize(model, tmp_path / "out", "int4:g32", text, recipe=FAST)
    with pytest.raises(NumericsError, match="--strict"):
        tiny.quantize(model, tmp_path / "out", "int4:g32", text, strict=True, recipe=FAST)
    assert run_status(tmp_path / "out").done == 1
    assert tiny.quantize(model, tmp_path / "out", "int4:g32", text, recipe=FAST).report["events"]
    with pytest.raises(NumericsError, match="--strict"):  # also when all of it is done
        tiny.quantize(model, tmp_path / "out", "int4:g32", text, strict=True, recipe=FAST)


def test_strict_is_quiet_when_all_is_well(tmp_path, llama, text):
    tiny.quantize(llama, tmp_path / "out", "int4:g32", text, strict=True, recipe=FAST)
