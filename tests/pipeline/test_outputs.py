"""What a run leaves on disk: every layout holds the same codes, and a model that reads them back computes the same."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import alphaquant
from alphaquant.checkpoint import Checkpoint
from alphaquant.errors import CheckpointError, OutputError
from alphaquant.formats import QuantizedTensor, dequantize
from alphaquant.layouts import QuantizedCheckpoint
from alphaquant.models import Decoder, detect, load_decoder
from alphaquant.pipeline import check_shards, export_checkpoint, load, save_single_file
from alphaquant.solver import Effort, Recipe

from . import tiny
from .spy import Spy

if TYPE_CHECKING:
    from pathlib import Path

FAMILIES = ("olmoe", "llama")
LAYOUTS = {"served": ("compressed-tensors", "humming", "dense"), "humming": ("humming", "dense")}
RUNS = [(family, plan, layout) for family in FAMILIES for plan, layouts in LAYOUTS.items() for layout in layouts]


class Run(NamedTuple):
    """A finished run: its directory, what was seen of it, and its report."""

    out: Path
    spy: Spy
    report: dict


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text, request):
    """Runs by family, plan and layout (None: chosen), each made once."""
    made: dict[tuple[str, str, str | None], Run] = {}

    def get(family: str, plan: str, layout: str | None) -> Run:
        key = (family, plan, layout)
        if key not in made:
            out = tmp_path_factory.mktemp("runs") / "out"
            with pytest.MonkeyPatch.context() as monkeypatch:
                spy = Spy().install(monkeypatch)
                model = request.getfixturevalue(family)
                result = tiny.quantize(
                    model, out, tiny.PLANS[plan], text, layout=layout, recipe=Recipe(effort=Effort.FAST)
                )
            made[key] = Run(out, spy, result.report)
        return made[key]

    return get


def original(model: Path) -> Decoder:
    checkpoint = Checkpoint.open(model)
    return load_decoder(checkpoint, detect(checkpoint.config))


def replaced(decoder: Decoder, quantized: dict[str, QuantizedTensor]) -> Decoder:
    """The decoder with the weights that the codes stand for, put in by name."""
    spec, left = decoder.spec, dict(quantized)
    for layer, weights in enumerate(decoder.layers):
        for parameter in spec.parameters(layer):
            for expert, name in enumerate(spec.module_names(layer, parameter)):
                if parameter.leaf == "weight" and name in left:
                    target = weights[parameter.key]
                    (target[expert] if parameter.num_experts else target).copy_(dequantize(left.pop(name)))
    for name in list(left):
        decoder.outer[f"{name}.weight"].copy_(dequantize(left.pop(name)))
    return decoder


def assert_same_codes(a: QuantizedTensor, b: QuantizedTensor, name: str) -> None:
    assert a.scheme == b.scheme, name
    for part in ("codes", "scale", "zero", "global_scale"):
        one, two = getattr(a, part), getattr(b, part)
        assert (one is None) == (two is None), (name, part)
        if one is not None:
            assert one.dtype == two.dtype, (name, part)
            assert torch.equal(one, two), (name, part)


@pytest.mark.parametrize(("family", "plan", "layout"), RUNS)
def test_what_is_loaded_is_what_was_solved(runs, request, family, plan, layout):
    run = runs(family, plan, layout)
    formats = {str(q.scheme.format.name) for q in run.spy.quantized.values()}
    assert len(formats) >= 5
    loaded, ids = load(run.out), tiny.token_ids()
    expected = replaced(original(request.getfixturevalue(family)), run.spy.quantized)
    # fp32 all through: served weights are those that later layers were calibrated on, bit for bit
    for index, weights in enumerate(loaded.layers):
        for key, weight in weights.items():
            assert torch.equal(weight, expected.layers[index][key]), key
            assert torch.equal(weight, run.spy.weights[index][key]), key
    before = original(request.getfixturevalue(family)).logits(ids)
    assert (loaded.logits(ids) - expected.logits(ids)).abs().max() < 1e-3
    assert (loaded.logits(ids) - before).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "plan", "layout"), [run for run in RUNS if run[2] != "dense"])
def test_codes_on_disk_are_the_solved_ones(runs, family, plan, layout):
    run = runs(family, plan, layout)
    stored = QuantizedCheckpoint.open(run.out)
    assert set(stored.modules) == set(run.spy.quantized)
    for name, q in run.spy.quantized.items():
        assert_same_codes(stored.read_quantized(name), q, name)


@pytest.mark.parametrize(
    ("plan", "expected", "method"), [("served", "compressed-tensors", "compressed-tensors"), ("humming",) * 3]
)
def test_the_most_widely_served_layout_is_chosen(runs, plan, expected, method):
    run = runs("olmoe", plan, None)
    config = json.loads((run.out / "config.json").read_text())
    assert run.report["layout"] == expected
    assert config["quantization_config"]["quant_method"] == method
    assert (run.out / "model-00001-of-00003.safetensors").read_bytes() == (
        runs("olmoe", plan, expected).out / "model-00001-of-00003.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(("family", "plan", "source"), [run for run in RUNS if run[2] != "dense"])
def test_export_is_lossless(runs, tmp_path, family, plan, source):
    run, ids = runs(family, plan, source), tiny.token_ids()
    stored = QuantizedCheckpoint.open(run.out)
    logits = load(run.out).logits(ids)
    for target in LAYOUTS[plan]:
        out = tmp_path / target
        size = export_checkpoint(run.out, out, target)
        assert size == sum(path.stat().st_size for path in out.glob("*.safetensors"))
        assert torch.equal(load(out).logits(ids), logits)
        # an export is what a run with that layout would have written
        for path in sorted(runs(family, plan, target).out.glob("*.safetensors")):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
        for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
            same = runs(family, plan, target).out / name
            assert (out / name).read_bytes() == same.read_bytes(), name
        if target == "dense":
            with pytest.raises(CheckpointError, match=r"alphaquant/modules\.json"):
                QuantizedCheckpoint.open(out)
            continue
        for name in stored.modules:
            assert_same_codes(QuantizedCheckpoint.open(out).read_quantized(name), stored.read_quantized(name), name)


def test_an_export_tells_of_itself(runs, tmp_path):
    run, out = runs("olmoe", "served", "compressed-tensors"), tmp_path / "humming"
    export_checkpoint(run.out, out, "humming")
    before, after = (json.loads((path / "alphaquant/report.json").read_text()) for path in (run.out, out))
    assert before["layout"] == "compressed-tensors"
    assert after["layout"] == "humming"
    assert after["sizes"]["after_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert after["summary"] == before["summary"]
    for note in ("plan.json", "records/layer-00001.json", "records/outer.json"):
        assert (out / "alphaquant" / note).read_bytes() == (run.out / "alphaquant" / note).read_bytes()


def test_a_copy_within_a_layout_does_not_hide_damage(runs, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(runs("olmoe", "served", "compressed-tensors").out, source)
    path = source / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    export_checkpoint(source, out, "compressed-tensors")
    assert [problem.file for problem in check_shards(out)] == [path.name]
    path.write_bytes(data + b"0" * 8)
    with pytest.raises(CheckpointError, match="bytes"):
        export_checkpoint(source, tmp_path / "other", "compressed-tensors")
    assert not (tmp_path / "other").exists()


def test_an_export_that_cannot_hold_the_plan_is_refused(runs, tmp_path):
    with pytest.raises(OutputError, match=r"compressed-tensors cannot hold .* g"):
        export_checkpoint(runs("olmoe", "humming", "humming").out, tmp_path / "out", "compressed-tensors")
    assert tiny.listing(tmp_path) == set()


def test_dense_weights_are_plain_tensors_in_the_models_type(runs, llama):
    run = runs("llama", "served", "dense")
    config = json.loads((run.out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    found = {}
    for path in run.out.glob("*.safetensors"):
        found |= load_file(path)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in load_file(llama / "model.safetensors").items()
    }
    for name, q in run.spy.quantized.items():
        assert torch.equal(found[f"{name}.weight"], dequantize(q))


@pytest.mark.parametrize(("family", "plan", "layout"), [("olmoe", *plan) for plan in (("served", None), RUNS[3][1:])])
def test_a_single_file_is_plain(runs, tmp_path, family, plan, layout):
    run = runs(family, plan, layout)
    save_single_file(run.out, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert tiny.listing(tmp_path) == {"model.pt"}
    assert sorted(content) == ["config", "modules", "tensors", "version"]
    assert content["version"] == 1
    assert content["config"] == json.loads((run.out / "config.json").read_text())
    assert content["modules"] == json.loads((run.out / "alphaquant/modules.json").read_text())
    stored = {}
    for path in run.out.glob("*.safetensors"):
        stored |= load_file(path)
    assert set(content["tensors"]) == set(stored)
    for name, tensor in stored.items():
        assert tensor.dtype == content["tensors"][name].dtype
        assert torch.equal(tensor.view(torch.uint8), content["tensors"][name].view(torch.uint8)), name


@pytest.mark.parametrize("shards", [1, 3])
def test_a_plan_that_leaves_everything_copies_it(tmp_path, text, shards):
    model = tiny.write_model(tmp_path / "model", "olmoe", shards=shards, dtype="bfloat16")
    result = tiny.quantize(model, tmp_path / "out", "bf16", text)
    assert result.report["audit"] == {"targeted": 0, "quantized": 0, "left": 69}
    assert result.report["sizes"]["bits_per_weight"] is None
    before, after = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    assert before.names() == after.names()
    for name in before.names():
        assert before.info(name) == after.info(name)
        assert torch.equal(before.read(name).view(torch.int16), after.read(name).view(torch.int16))
    assert before.config == after.config


def test_every_tensor_that_is_left_keeps_its_own_type(tmp_path, text):
    """A norm in fp32 beside bf16 weights is written as it was, not as it was computed with."""
    norm = torch.full((64,), 1.0 + 2.0**-20)
    name = "model.layers.1.input_layernorm.weight"
    model = tiny.write_model(tmp_path / "model", "llama", dtype="bfloat16", changes={name: norm})
    tiny.quantize(model, tmp_path / "out", "int4:g32", text)
    assert torch.equal(Checkpoint.open(tmp_path / "out").read(name), norm)


@pytest.mark.parametrize("text_given", [True, False])
def test_protected_modules_are_quantized_where_a_rule_names_them(olmoe, tmp_path, text, text_given):
    plan = {
        "default": {"wq": "int4", "group_size": 32},
        "overrides": [
            {"pattern": "lm_head", "wq": "int8", "group_size": 64},
            {"pattern": "model.embed_tokens", "wq": "int6", "group_size": 64},
            {"pattern": "*.mlp.gate", "wq": "fp8", "group_size": -1},
            {"pattern": "*.self_attn.*", "skip": True},
        ],
    }
    out = tmp_path / "out"
    result = tiny.quantize(olmoe, out, plan, text if text_given else None)
    schemes = {name: str(module.scheme) for name, module in QuantizedCheckpoint.open(out).modules.items()}
    assert schemes["lm_head"] == "int8 g64"
    assert schemes["model.embed_tokens"] == "int6 g64"
    assert schemes["model.layers.1.mlp.gate"] == "fp8 channel"
    assert not any("self_attn" in name for name in schemes)
    assert result.report["audit"] == {"targeted": 52, "quantized": 52, "left": 17}
    records = {m.name: m for record in result.records for m in record.modules}
    assert set(records) == set(schemes)
    # a look-up has no input to calibrate on, all others have
    asked = {name: "gptq" if text_given and name != "model.embed_tokens" else "rtn" for name in records}
    assert {name: m.method for name, m in records.items()} == asked
    assert records["lm_head"].tokens == records["model.layers.0.mlp.gate"].tokens == (24 * 32 if text_given else 0)
    assert records["model.embed_tokens"].event is None
    # close to the original, and for the quantized parts not it
    loaded, before, ids = load(out), original(olmoe), tiny.token_ids()
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        error = (loaded.outer[key] - before.outer[key]).norm() / before.outer[key].norm()
        assert 1e-4 < error < 0.05
    gate = loaded.layers[0]["mlp.gate.weight"]
    assert 1e-4 < (gate - before.layers[0]["mlp.gate.weight"]).norm() / gate.norm() < 0.05
    assert torch.equal(loaded.layers[0]["self_attn.q_proj.weight"], before.layers[0]["self_attn.q_proj.weight"])
    assert bool(loaded.logits(ids).isfinite().all())


def test_tied_embeddings_are_quantized_once(tmp_path, text):
    model = tiny.write_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    plan = {"default": {"wq": "none"}, "overrides": [{"pattern": "model.embed_tokens", "wq": "int4", "group_size": 32}]}
    tiny.quantize(model, tmp_path / "out", plan, text)
    loaded, before = load(tmp_path / "out"), original(model)
    assert set(QuantizedCheckpoint.open(tmp_path / "out").modules) == {"model.embed_tokens"}
    assert not torch.equal(loaded.outer["model.embed_tokens.weight"], before.outer["model.embed_tokens.weight"])
    assert "lm_head.weight" not in loaded.outer
    assert loaded.logits(tiny.token_ids()).shape == (4, 24, tiny.VOCAB)


def test_the_directory_holds_what_it_says(runs, olmoe):
    run = runs("olmoe", "served", None)
    assert tiny.listing(run.out) == {
        "README.md",
        "alphaquant",
        "alphaquant/manifest.json",
        "alphaquant/modules.json",
        "alphaquant/plan.json",
        "alphaquant/records",
        "alphaquant/records/layer-00000.json",
        "alphaquant/records/layer-00001.json",
        "alphaquant/records/outer.json",
        "alphaquant/report.json",
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    manifest = json.loads((run.out / "alphaquant/manifest.json").read_text())
    index = json.loads((run.out / "model.safetensors.index.json").read_text())
    stored = {}
    for number, shard in enumerate(manifest["shards"]):
        path = run.out / shard["name"]
        assert path.stat().st_size == shard["num_bytes"]
        names = set(load_file(path))
        assert names == set(shard["tensor_names"])
        if number < 2:
            assert all(name.startswith(f"model.layers.{number}.") for name in names)
        stored |= dict.fromkeys(names, shard["name"])
    assert index["weight_map"] == stored
    assert json.loads((run.out / "alphaquant/report.json").read_text()) == run.report
    assert (run.out / "tokenizer.json").read_bytes() == (olmoe / "tokenizer.json").read_bytes()
    plan = json.loads((run.out / "alphaquant/plan.json").read_text())
    assert tiny.as_plan(plan) == tiny.as_plan(tiny.SERVED_PLAN)


def test_it_still_loads_after_a_move(runs, tmp_path):
    shutil.copytree(runs("olmoe", "humming", None).out, tmp_path / "elsewhere")
    ids = tiny.token_ids()
    moved = alphaquant.load(f"{tmp_path}/elsewhere", dtype="bf16")
    assert moved.logits(ids).dtype == torch.bfloat16
    generated = moved.generate(ids[:1], 5)
    assert generated.shape == (1, 29)


def test_code_that_the_config_names_travels_along(tmp_path):
    """An engine asks for it, as for the first DeepSeek-MoE; code that nothing names stays where it is."""
    for name, extra in (("plain", {}), ("own", {"auto_map": {"AutoConfig": "configuration_deepseek.C"}})):
        model = tiny.write_model(tmp_path / name, "deepseek", **extra)
        (model / "configuration_deepseek.py").write_text("raise SystemExit('run')\n")
        tiny.quantize(model, tmp_path / f"{name}-out", "int4:g32", None)
        export_checkpoint(tmp_path / f"{name}-out", tmp_path / f"{name}-dense", "dense")
        for made in ("out", "dense"):
            assert (tmp_path / f"{name}-{made}" / "configuration_deepseek.py").exists() == (name == "own")


def test_linears_without_a_name_in_the_engine_get_their_rule(tmp_path):
    tiny.quantize(tiny.write_model(tmp_path / "model", "deepseek"), tmp_path / "out", "int4:g32", None)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "re:^$" in quantization["config_groups"]["group_0"]["targets"]
