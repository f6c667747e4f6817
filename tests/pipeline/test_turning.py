"""Runs of rotated models: what is written is a plain model, and everything that reads runs takes it."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

import alphaquant
from alphaquant.checkpoint import Checkpoint
from alphaquant.errors import ConfigError, OutputError
from alphaquant.models import RotationKind
from alphaquant.pipeline import (
    Calibration,
    evaluate_checkpoint,
    export_checkpoint,
    plan_sizes,
    prepare,
    quantize_checkpoint,
    turned,
)
from alphaquant.solver import Effort, Recipe
from alphaquant.verification import check_stored

from . import tiny
from .test_resume import Stop, result_of, stop_in_layer

FAST = Recipe(effort=Effort.FAST)


def run(model, out, plan, text, rotate, recipe=FAST, seed=0):
    calibration = Calibration(str(text), 24, 32, seed)
    prepared = turned(prepare(model, tiny.as_plan(plan)), rotate, seed=seed, calibration=calibration, recipe=recipe)
    return quantize_checkpoint(prepared, out, recipe=recipe, calibration=calibration)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("tied") / "model", "llama", tie_word_embeddings=True)


@pytest.mark.parametrize("rotate", ["hadamard", "block"])
@pytest.mark.parametrize("family", ["tied", "olmoe"])
def test_eight_bits_are_the_model(request, text, other_text, tmp_path, family, rotate):
    """Against the original: in its own coordinates, by the command's measurement, in two layouts."""
    model, out = request.getfixturevalue(family), tmp_path / "out"
    result = run(model, out, "int8:g32", text, rotate)
    config = json.loads((out / "config.json").read_text())
    assert not config.get("tie_word_embeddings")
    assert any(note.startswith(f"rotated: {rotate}, seed 0") for note in result.report["notes"])
    assert result.report["rotation"] == {"kind": rotate, "seed": 0}
    measure = partial(evaluate_checkpoint, data=str(other_text), seqlen=32, against=model)
    quality = measure(out)
    assert quality.agreement.kl < 1e-2
    assert quality.perplexity == pytest.approx(quality.agreement.original_perplexity, rel=0.03)
    assert check_stored(out).problems == ()
    export_checkpoint(out, tmp_path / "dense", "dense")
    assert measure(tmp_path / "dense").agreement.kl == pytest.approx(quality.agreement.kl, rel=1e-3)
    stored, source = Checkpoint.open(out), Checkpoint.open(model)
    assert not torch.allclose(stored.read("model.embed_tokens.weight"), source.read("model.embed_tokens.weight"))
    assert torch.equal(stored.read("model.norm.weight"), torch.ones_like(source.read("model.norm.weight")))


def test_a_tied_head_is_counted(tied):
    prepared = prepare(tied, tiny.as_plan("int4:g32"))
    rotated = turned(prepared, "hadamard", seed=0)
    head = tiny.VOCAB * 64 * 4
    assert rotated.total_bytes == prepared.total_bytes + head
    before, after = ({row.kind: row.after_bytes for row in plan_sizes(one)} for one in (prepared, rotated))
    assert "head" not in before
    assert after["head"] == head
    assert rotated.config["tie_word_embeddings"] is False
    assert turned(prepared, "none", seed=0).config["tie_word_embeddings"] is True


def test_a_stopped_run_goes_on_in_its_own_coordinates(olmoe, text, tmp_path, monkeypatch):
    run(olmoe, tmp_path / "whole", "int4:g32", text, "hadamard")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in_layer(patch, 1)
        with pytest.raises(Stop):
            run(olmoe, out, "int4:g32", text, "hadamard")
    with pytest.raises(OutputError, match=r"rotation was .*hadamard.* and is None"):
        run(olmoe, out, "int4:g32", text, "none")
    run(olmoe, out, "int4:g32", text, "hadamard")
    assert result_of(out) == result_of(tmp_path / "whole")


def test_seeds_and_kinds_give_other_codes(olmoe, text, tmp_path):
    prepared = prepare(olmoe, tiny.as_plan("int4:g32"))
    name = "model.layers.0.self_attn.q_proj.weight"
    read = [
        turned(prepared, kind, seed=seed).source.read(name)
        for kind, seed in (("none", 0), ("hadamard", 0), ("hadamard", 1), ("block", 0))
    ]
    assert all(not torch.equal(one, other) for i, one in enumerate(read) for other in read[:i])
    assert torch.equal(read[1], turned(prepared, "hadamard", seed=0).source.read(name))


def test_routers_are_refitted_in_rotated_coordinates(olmoe, text, tmp_path):
    recipe = Recipe(effort=Effort.FAST, repair_router=True)
    result = run(olmoe, tmp_path / "out", "int2:g32", text, "hadamard", recipe)
    assert result.report["routers"]["layers"] == 2
    first = result.records[0].repair
    assert first.agreement_before > 0.5, "the original's choices, as they are in its own coordinates"


def test_auto_takes_what_loses_least(llama, text, tmp_path, monkeypatch):
    """A channel of outliers, which a rotation spreads."""
    calibration = Calibration(str(text), 8, 32)
    choose = partial(turned, name="auto", seed=0, calibration=calibration, recipe=FAST)

    changes = {
        name: tensor.index_fill(0, torch.tensor([5]), 60.0)
        for name, tensor in tiny.random_tensors("llama").items()
        if name.endswith("layernorm.weight")
    }
    model = tiny.write_model(tmp_path / "outliers", "llama", changes=changes)
    chosen = choose(prepare(model, tiny.as_plan("int3:g32")))
    assert chosen.rotation.kind is not RotationKind.NONE
    assert chosen.rotation_note.startswith("loss of two layers by rotation: none ")
    assert chosen.rotation_note in chosen.notes
    eight = choose(prepare(llama, tiny.as_plan("int8:g32")))
    assert eight.rotation.kind in RotationKind


def test_what_is_refused(olmoe, tmp_path):
    prepared = prepare(olmoe, tiny.as_plan("int4:g32"))
    with pytest.raises(ConfigError, match="rotation is 'cayley'"):
        turned(prepared, "cayley", seed=0)
    with pytest.raises(ConfigError, match="auto measures on calibration tokens"):
        turned(prepared, "auto", seed=0)
    with pytest.raises(ConfigError, match="rotation is 'x'"):
        alphaquant.quantize(olmoe, tmp_path / "out", "int4:g32", rotate="x")
    assert not (tmp_path / "out").exists()
