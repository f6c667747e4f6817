"""Checkpoints that cannot be used: exit code 2, what, where and the remedy, no traceback, nothing half-written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from alphaquant.models import FAMILIES
from pipeline import tiny

if TYPE_CHECKING:
    from pathlib import Path

INT4 = ("--scheme", "int4:g32")


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def truncate(model: Path) -> None:
    path = model / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(model: Path) -> None:
    path = model / "part-0.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def lose_shard(model: Path) -> None:
    (model / "part-1.safetensors").unlink()


def lose_all(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()


def pickled(model: Path) -> None:
    lose_all(model)
    torch.save({}, model / "pytorch_model.bin")


def misplaced(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))


def absolute(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "/etc/passwd"
    index.write_text(json.dumps(content))


def more_layers(model: Path) -> None:
    edit(model / "config.json", num_hidden_layers=3)


def wider(model: Path) -> None:
    edit(model / "config.json", hidden_size=128)


CHECKPOINTS = {
    "truncated": (truncate, ("part-1.safetensors", "no valid safetensors file", "download")),
    "cut in the header": (cut_header, ("part-0.safetensors", "header")),
    "missing shard": (lose_shard, ("part-1.safetensors", "is not there", "model.safetensors.index.json")),
    "no weights": (lose_all, ("no *.safetensors", "model")),
    "pickle": (pickled, ("pytorch_model.bin", "refused", "save_pretrained(DIR, safe_serialization=True)")),
    "path outside": (misplaced, ("../elsewhere.safetensors", "model.norm.weight", "model.safetensors.index.json")),
    "absolute path": (absolute, ("/etc/passwd", "model.norm.weight")),
    "missing layer": (more_layers, ("model.layers.2.", "not in the checkpoint")),
    "wrong width": (wider, ("input_layernorm.weight", "[64]", "[128]", "config.json")),
    "unknown family": (
        lambda model: edit(model / "config.json", model_type="olmo"),
        ("'olmo'", f"known families: {', '.join(sorted(FAMILIES))}", "did you mean 'olmoe'?", "config.json"),
    ),
    "no family": (lambda model: edit(model / "config.json", model_type=None), ("model_type is None", "llama")),
    "missing key": (lambda model: edit(model / "config.json", num_experts=None), ("'num_experts'", "config.json")),
    "unknown activation": (lambda model: edit(model / "config.json", hidden_act="gelu"), ("'gelu'", "silu")),
    "too many experts": (lambda model: edit(model / "config.json", num_experts_per_tok=9), ("9", "8 experts")),
    "no config": (lambda model: (model / "config.json").unlink(), ("no config.json", "model")),
    "config is no JSON": (lambda model: (model / "config.json").write_text("{"), ("config.json", "not valid JSON")),
    "config is a list": (lambda model: (model / "config.json").write_text("[]"), ("config.json", "list")),
    "quantized already": (
        lambda model: edit(model / "config.json", quantization_config={"quant_method": "awq"}),
        ("is quantized already", "quantization_config", "original"),
    ),
}


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_broken_checkpoints(fails, model, tmp_path, text, fault):
    damage, says = CHECKPOINTS[fault]
    damage(model)
    expected = {"says": says}
    fails("quantize", model, *INT4, "--calib", text, "-o", tmp_path / "out", **expected)
    fails("inspect", model, **expected)
    fails("plan", model, *INT4, **expected)
    fails("eval", model, "--data", text, **expected)
    assert not (tmp_path / "out").exists()


def test_models_that_are_none(fails, tmp_path, text, monkeypatch):
    (tmp_path / "file").write_text("x")
    for verb in (("inspect",), ("plan", *INT4), ("quantize", *INT4, "-o", tmp_path / "out"), ("eval", "--data", text)):
        fails(verb[0], tmp_path / "nowhere", *verb[1:], says=("nowhere", "hub id"))
        fails(verb[0], tmp_path / "file", *verb[1:], says=("is a file", "config.json"))
    for verb in ("export", "report"):
        options = ("-o", tmp_path / "out")
        fails(verb, tmp_path / "nowhere", *options, says=("nowhere",))
        fails(verb, tmp_path, *options, says=(str(tmp_path),))
    import huggingface_hub  # noqa: PLC0415

    def offline(*_args, **_options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    fails("inspect", "someone/model", says=("'someone/model'", "no route to host", "the network"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers(fails, tmp_path, text, value):
    name = "model.layers.1.mlp.experts.6.up_proj.weight"
    tensor = tiny.random_tensors("olmoe")[name]
    tensor[3, 5] = float(value)
    model = tiny.write_model(tmp_path / "model", "olmoe", changes={name: tensor})
    says = (f"where: {name}", "NaN or infinity")
    fails("eval", model, "--data", text, "--seqlen", 32, says=says)
    out = ("-o", tmp_path / "out", "--fresh")
    fails("quantize", model, *INT4, "--calib", text, "--seqlen", 32, *out, says=says, keeps=True)
    fails("quantize", model, *INT4, "--method", "rtn", *out, says=says, keeps=True)
    fails("quantize", model, *INT4, "--method", "rtn", "--save", tmp_path / "x.pt", says=says, keeps=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".out.partial", "..x.pt.parts.partial"}


def test_activations_that_overflow(fails, tmp_path, text):
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(8)]
    large = {name: torch.randn(64, 64).clamp(-3, 3) * 1e38 for name in names}
    model = tiny.write_model(tmp_path / "model", "olmoe", changes=large, dtype="bfloat16")
    says = ("where: layer 1, feed-forward", "NaN or infinite in sample 0", "--dtype fp32")
    calib = ("--nsamples", 4, "--seqlen", 32, "--calib", text)
    fails("eval", model, "--data", text, "--seqlen", 32, says=says)
    fails("quantize", model, "--scheme", "int8:g32", *calib, "-o", tmp_path / "out", says=says, keeps=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".out.partial"}
