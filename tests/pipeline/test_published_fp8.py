"""A checkpoint as DeepSeek-V3 is published: FP8 with scales for blocks, and a layer for multi-token prediction."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaquant.errors import CheckpointError
from alphaquant.pipeline import evaluate_checkpoint, export_checkpoint, load, plan_sizes, prepare
from alphaquant.plan import Plan

from . import tiny

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = (24, 40)  # neither divides the widths
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
PREDICTION = "model.layers.2."


def _blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 codes, scales, and the weight that they stand for."""
    grid = [-(-size // step) for size, step in zip(weight.shape, BLOCK, strict=True)]
    scale, expanded = torch.empty(grid), torch.empty_like(weight)
    for row in range(grid[0]):
        for column in range(grid[1]):
            part = tuple(slice(i * step, (i + 1) * step) for i, step in zip((row, column), BLOCK, strict=True))
            scale[row, column] = weight[part].abs().max() / 448
            expanded[part] = scale[row, column]
    codes = (weight / expanded).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * expanded


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """A model in FP8, and its twin in the floats that it stands for."""
    root = tmp_path_factory.mktemp("published")
    twin = tiny.write_model(root / "twin", "deepseek_v3", num_nextn_predict_layers=1)
    fp8 = tiny.write_model(root / "fp8", "deepseek_v3", num_nextn_predict_layers=1, quantization_config=FP8)
    tensors = load_file(twin / "model.safetensors")
    copied = {
        name.replace(".layers.1.", ".layers.2."): tensor for name, tensor in tensors.items() if ".layers.1." in name
    }
    extra = {f"{PREDICTION}eh_proj.weight": torch.randn(64, 128), f"{PREDICTION}enorm.weight": torch.ones(64)}
    tensors |= {name: tensor.clone() for name, tensor in copied.items()} | extra
    stored = {}
    for name, tensor in list(tensors.items()):
        stored[name] = tensor
        if name.endswith(("_proj.weight", "_with_mqa.weight")):
            stored[name], stored[f"{name}_scale_inv"], tensors[name] = _blocks(tensor)
    save_file(stored, fp8 / "model.safetensors", {"format": "pt"})
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    return fp8, twin


def test_it_quantizes_to_the_bytes_of_its_twin(models, text, tmp_path):
    plan = Plan.from_dict(tiny.SERVED_PLAN)
    assert plan_sizes(prepare(models[0], plan)) == plan_sizes(prepare(models[1], plan))
    reports = [tiny.quantize(model, tmp_path / model.name, tiny.SERVED_PLAN, text).report for model in models]
    assert reports[0]["notes"] == reports[1]["notes"]
    fp8, twin = tmp_path / "fp8", tmp_path / "twin"
    shards = sorted(path.name for path in twin.glob("*.safetensors"))
    assert len(shards) == 3
    for name in (*shards, "config.json", "alphaquant/modules.json", "model.safetensors.index.json"):
        assert (fp8 / name).read_bytes() == (twin / name).read_bytes(), name
    assert json.loads((fp8 / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"


def test_it_is_what_a_result_is_compared_with(models, text, tmp_path):
    out = tmp_path / "out"
    tiny.quantize(models[0], out, tiny.SERVED_PLAN, text)
    qualities = [
        evaluate_checkpoint(out, data=str(text), seqlen=32, max_windows=4, against=original) for original in models
    ]
    assert qualities[0] == qualities[1]
    assert qualities[0].agreement.kl > 1e-4
    ids = tiny.token_ids()
    assert load(models[0]).logits(ids).equal(load(models[1]).logits(ids))


def test_layers_for_prediction_go_along(models, text, tmp_path):
    fp8, twin = models
    result = tiny.quantize(fp8, tmp_path / "out", tiny.SERVED_PLAN, text)
    expected = {k: v for k, v in load_file(twin / "model.safetensors").items() if k.startswith(PREDICTION)}
    assert f"{len(expected)} tensors of layers for multi-token prediction go along" in " ".join(result.report["notes"])
    for target in ("humming", "dense"):
        export_checkpoint(tmp_path / "out", tmp_path / target, target)
    for name in ("out", "humming", "dense"):
        last = load_file(tmp_path / name / "model-00003-of-00003.safetensors")
        found = {k: v for k, v in last.items() if k.startswith(PREDICTION)}
        assert found.keys() == expected.keys()
        assert all(found[k].equal(expected[k]) for k in expected)
        assert load(tmp_path / name).logits(tiny.token_ids()).equal(load(tmp_path / "out").logits(tiny.token_ids()))
    modules = [k.removesuffix(".weight") for k in expected if k.endswith("_proj.weight")]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [t.removeprefix("re:") for group in config["config_groups"].values() for t in group["targets"]]
    assert not [m for m in modules for target in targets if re.match(target, m)]
    ignored = [pattern.removeprefix("re:") for pattern in config["ignore"]]
    assert all(any(re.match(pattern, m) for pattern in ignored) for m in modules)


def test_a_layer_behind_the_last_needs_the_configs_word(models, tmp_path):
    plan = Plan.from_shorthand("int4:g32")
    path = tmp_path / "model"
    path.mkdir()
    save_file(load_file(models[1] / "model.safetensors"), path / "model.safetensors")
    config = json.loads((models[1] / "config.json").read_text())
    for changes in ({"num_nextn_predict_layers": 0}, {"model_type": "deepseek_v3", "num_nextn_predict_layers": None}):
        (path / "config.json").write_text(json.dumps(config | changes))
        if changes["num_nextn_predict_layers"] is None:
            prepare(path, plan)  # the family's own number
            continue
        with pytest.raises(CheckpointError, match=r"no place for: model\.layers\.2\."):
            prepare(path, plan)
