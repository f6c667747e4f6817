"""Routers refitted to the original's choices: what is kept, where it goes, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import alphaquant
from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.checkpoint import Checkpoint
from alphaquant.errors import ConfigError, OutputError
from alphaquant.gptq import GPTQConfig, gptq_quantize_model
from alphaquant.models import attention_half, detect, expert_choice, read_layer, rope_for
from alphaquant.pipeline import check_shards, export_checkpoint
from alphaquant.pipeline import layer as layer_module
from alphaquant.pipeline.distributed import SOLO
from alphaquant.pipeline.repair import ROUTER, refit_router
from alphaquant.pipeline.stream import chunks, embed
from alphaquant.solver import Effort, Recipe
from alphaquant.verification import check_stored

from . import tiny
from .test_resume import Stop, result_of, stop_in_layer

REPAIR = Recipe(effort=Effort.FAST, repair_router=True)
FAMILIES = ["olmoe", "mixtral", "qwen2_moe", "deepseek", "deepseek_v2", "deepseek_v3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """Directories of models and of their runs at two bits with repair, by family, each made once."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny.write_model(folder / "model", family, dtype="bfloat16")
            result = tiny.quantize(model, folder / "out", "int2:g32", text, num_samples=32, recipe=REPAIR)
            made[family] = model, folder / "out", result
        return made[family]

    return get


def router_names(model):
    spec = detect(json.loads((model / "config.json").read_text()))
    names = {}
    for layer in range(spec.num_layers):
        for parameter in spec.parameters(layer):
            if parameter.key == ROUTER:
                names[layer] = spec.tensor_names(layer, parameter)[0]
    return names


def calibration_ids(model, text):
    return calibration_tokens(
        str(text), load_tokenizer(model), num_samples=32, seqlen=32, seed=0, vocab_size=tiny.VOCAB
    ).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_scores_come_closer_and_the_router_is_written(run, family):
    model, out, result = run(family)
    names = router_names(model)
    assert names
    source, stored = Checkpoint.open(model), Checkpoint.open(out)
    kept = 0
    for record in result.records:
        repair = record.repair
        assert (repair is not None) == (record.layer in names)
        if repair is None:
            continue
        assert repair.tokens == 32 * 32 // 4
        assert repair.kept == (repair.kl_after < repair.kl_before)
        name = names[record.layer]
        before, after = source.read(name), stored.read(name)
        assert after.dtype == torch.bfloat16
        assert torch.equal(before, after) != repair.kept
        kept += repair.kept
    assert kept, "two bits move the stream enough for a refit to pay"
    assert result.report["routers"]["kept"] == kept
    assert check_stored(out).problems == ()


def test_equal_streams_leave_the_router_alone(run):
    model, _, _ = run("deepseek_v3")
    spec = detect(json.loads((model / "config.json").read_text()))
    weights = read_layer(Checkpoint.open(model), spec, 1, torch.float32)
    x = torch.randn(8, 32, spec.hidden_size, generator=torch.Generator().manual_seed(0))
    refitted, record = refit_router(x, x.clone(), weights, spec, 1, chunks(8, 32), SOLO)
    assert torch.equal(refitted, weights[ROUTER].to(spec.dtype))
    assert not record.kept
    assert record.agreement_before == record.agreement_after == 1.0


@pytest.mark.parametrize("num_samples", [1, 2, 3, 64])
def test_a_turned_stream_is_turned_back(run, num_samples):
    """The inputs are the original's times a rotation: the refitted router undoes it, fitted on enough samples."""
    model, _, _ = run("mixtral")
    spec = detect(json.loads((model / "config.json").read_text()))
    spec = dataclasses.replace(spec, dtype=torch.float32)
    weights = read_layer(Checkpoint.open(model), spec, 0, torch.float32)
    weights["post_attention_layernorm.weight"].fill_(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 32, spec.hidden_size, generator=generator)
    turn = torch.linalg.qr(torch.randn(spec.hidden_size, spec.hidden_size, generator=generator)).Q
    router = weights[ROUTER].clone()
    refitted, record = refit_router(x @ turn, x, weights, spec, 0, chunks(num_samples, 32), SOLO)
    assert torch.equal(weights[ROUTER], router), "it is not put in place"
    assert record.tokens == 32 * num_samples // min(4, num_samples)
    if num_samples == 1:
        assert not record.kept, "nothing is left to fit on"
        assert torch.equal(refitted, router)
    if num_samples == 64:
        assert record.kept
        assert record.agreement_before < 0.6 < 0.95 < record.agreement_after
        assert (refitted - router @ turn).norm() < 0.1 * router.norm()


def test_held_out_samples_do_not_bear_on_the_fit(run):
    model, _, _ = run("mixtral")
    spec = detect(json.loads((model / "config.json").read_text()))
    weights = read_layer(Checkpoint.open(model), spec, 0, torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, original = torch.randn(2, 12, 16, spec.hidden_size, generator=generator)
    other = x.clone()
    other[3::4] = torch.randn(3, 16, spec.hidden_size, generator=generator)
    one, before = refit_router(x, original, weights, spec, 0, chunks(12, 16), SOLO)
    two, after = refit_router(other, original, weights, spec, 0, chunks(12, 16), SOLO)
    assert torch.equal(one, two)
    assert before.kl_after != after.kl_after


@torch.no_grad()
def test_experts_are_calibrated_on_what_the_refitted_router_chooses(run, text):
    model, out, result = run("olmoe")
    assert result.records[0].repair.kept
    original, written = alphaquant.load(model), alphaquant.load(out)
    spec, rope = written.spec, rope_for(written.spec, 32, "cpu")
    x = embed(calibration_ids(model, text), written.outer["model.embed_tokens.weight"])
    x = attention_half(x, written.layers[0], spec, 0, rope)
    counts = []
    for router in (written.layers[0][ROUTER], original.layers[0][ROUTER]):
        choice = expert_choice(x, written.layers[0] | {ROUTER: router}, spec, 0)
        counts.append(choice.topk_ids_TK.flatten().bincount(minlength=8).tolist())
    assert result.records[0].routing.tokens == counts[0] != counts[1]


@pytest.mark.parametrize("layout", ["dense", "humming"])
def test_an_export_has_the_refitted_router(run, tmp_path, layout):
    model, out, _ = run("olmoe")
    export_checkpoint(out, tmp_path / layout, layout)
    for name in router_names(model).values():
        assert torch.equal(Checkpoint.open(tmp_path / layout).read(name), Checkpoint.open(out).read(name))
    assert check_shards(tmp_path / layout) == []


def test_a_stopped_run_ends_with_the_same_bytes(run, text, tmp_path, monkeypatch):
    model, whole, _ = run("olmoe")
    out = tmp_path / "out"
    for layer in (1, 1):
        with monkeypatch.context() as patch:
            stop_in_layer(patch, layer)
            with pytest.raises(Stop):
                tiny.quantize(model, out, "int2:g32", text, num_samples=32, recipe=REPAIR)
    with pytest.raises(OutputError, match=r"recipe\.repair_router was True and is False"):
        tiny.quantize(model, out, "int2:g32", text, num_samples=32, recipe=Recipe(effort=Effort.FAST))
    tiny.quantize(model, out, "int2:g32", text, num_samples=32, recipe=REPAIR)
    assert result_of(out) == result_of(whole)


def test_less_memory_gives_the_same_bytes(run, text, tmp_path, monkeypatch):
    """Both streams are then kept in files."""
    model, whole, _ = run("olmoe")
    held = layer_module.Limits(hessian_bytes=4 * 64**2, workspace_weights=1 << 12, holds_stream=True)
    monkeypatch.setattr("alphaquant.pipeline.run.common_limits", lambda *_: held)
    tiny.quantize(model, tmp_path / "out", "int2:g32", text, num_samples=32, recipe=REPAIR)
    assert result_of(tmp_path / "out") == result_of(whole)


def test_in_memory_it_is_the_same(run, text):
    model, out, _ = run("olmoe")
    decoder, ids = alphaquant.load(model), calibration_ids(model, text)
    gptq_quantize_model(decoder, [ids], "int2:g32", GPTQConfig(effort="fast", repair_router=True), "cpu")
    stored = Checkpoint.open(out)
    for layer, name in router_names(model).items():
        assert torch.equal(decoder.layers[layer][ROUTER], stored.read(name))


def test_what_cannot_be_refitted_is_refused(llama, olmoe, text, tmp_path):
    with pytest.raises(ConfigError, match="llama has no routers to refit"):
        tiny.quantize(llama, tmp_path / "out", "int4:g32", text, recipe=REPAIR)
    with pytest.raises(ConfigError, match="routers are refitted on calibration tokens"):
        tiny.quantize(olmoe, tmp_path / "out", "int4:g32", None, recipe=REPAIR)
    assert list(tmp_path.iterdir()) == []
