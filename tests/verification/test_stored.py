"""`verify`: whatever happens to a directory after its run is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaquant.errors import CheckpointError
from alphaquant.layouts import QuantizedCheckpoint
from alphaquant.pipeline import export_checkpoint
from alphaquant.pipeline.manifest import file_sha256
from alphaquant.verification import check_stored
from pipeline import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory, olmoe):
    """A run of seven formats, calibrated by nothing; nothing may write into it."""
    out = tmp_path_factory.mktemp("verified") / "out"
    tiny.quantize(olmoe, out, tiny.SERVED_PLAN, None)
    return out


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def shard_of(directory, index):
    return sorted(directory.glob("*.safetensors"))[index]


def rehash(directory):
    """Make the manifest agree with the files, as one would who did not only lose a bit."""
    path = directory / "alphaquant" / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        shard["sha256"] = file_sha256(directory / shard["name"])
        shard["num_bytes"] = (directory / shard["name"]).stat().st_size
    manifest["files"] = {name: file_sha256(directory / name) for name in manifest["files"]}
    path.write_text(json.dumps(manifest))


def test_a_run_and_all_its_exports_are_well(run, tmp_path):
    modules = len(json.loads((run / "alphaquant" / "modules.json").read_text())["modules"])
    found = check_stored(run)
    assert (found.problems, found.layout, found.modules, found.uncompared) == ((), "compressed-tensors", modules, 0)
    for layout, compared in (("humming", modules), ("dense", 0)):
        export_checkpoint(run, tmp_path / layout, layout)
        found = check_stored(tmp_path / layout)
        assert (found.problems, found.layout, found.modules, found.uncompared) == ((), layout, compared, 0)


@pytest.mark.parametrize("place", range(10))
def test_a_flipped_bit_is_named(copy, place):
    files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "manifest.json")
    path = files[place * 7 % len(files)] if place < 5 else shard_of(copy, place % 3)
    data = bytearray(path.read_bytes())
    data[(len(data) - 1) * (place + 1) // 10] ^= 1 << place % 8
    path.write_bytes(data)
    named = [problem for problem in check_stored(copy).problems if problem.where == path.relative_to(copy).as_posix()]
    assert named, path
    assert named[0].what


def test_a_flipped_code_is_named_by_its_module_even_where_the_hashes_agree(copy):
    path = shard_of(copy, 0)
    tensors = load_file(path)
    name = "model.layers.0.mlp.experts.3.up_proj.weight_packed"
    tensors[name][1, 1] ^= 4
    save_file(tensors, path, {"format": "pt"})
    rehash(copy)
    assert [problem.where for problem in check_stored(copy).problems] == [name.removesuffix(".weight_packed")]


def test_a_changed_scale_is_named(copy):
    path = shard_of(copy, 1)
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight_scale"
    tensors[name][0, 0] += 1
    save_file(tensors, path, {"format": "pt"})
    rehash(copy)
    assert [problem.where for problem in check_stored(copy).problems] == [name.removesuffix(".weight_scale")]


def test_a_lost_shard_and_a_cut_one(copy):
    lost, cut = shard_of(copy, 0), shard_of(copy, 1)
    size = cut.stat().st_size
    with cut.open("r+b") as file:
        file.truncate(size - 1)
    lost.unlink()
    problems = {problem.where: problem.what for problem in check_stored(copy).problems}
    assert "cannot be read" in problems[lost.name]
    assert f"it has {size - 1} bytes, and {size} were written" in problems[cut.name]


def test_a_module_that_the_table_lost(copy):
    path = copy / "alphaquant" / "records" / "layer-00000.json"
    record = json.loads(path.read_text())
    record["modules"].append(record["modules"][0] | {"name": "model.layers.0.mlp.gate"})
    record["modules"][0]["sha256"] = ""
    path.write_text(json.dumps(record))
    rehash(copy)
    found = check_stored(copy)
    assert [problem.where for problem in found.problems] == ["model.layers.0.mlp.gate"]
    assert found.uncompared == 1
    path.write_text("[]")
    rehash(copy)
    assert [problem.where for problem in check_stored(copy).problems] == ["alphaquant/records/layer-00000.json"]


def test_a_directory_that_is_no_run(olmoe):
    with pytest.raises(CheckpointError, match="no manifest"):
        check_stored(olmoe)


def test_codes_have_one_hash_in_every_layout(run, tmp_path):
    export_checkpoint(run, tmp_path / "humming", "humming")
    ours, theirs = QuantizedCheckpoint.open(run), QuantizedCheckpoint.open(tmp_path / "humming")
    name = "model.layers.0.self_attn.o_proj"
    q = ours.read_quantized(name)
    assert q.sha256() == theirs.read_quantized(name).sha256()
    for field in ("codes", "scale", "global_scale"):
        tensor = getattr(q, field).clone().reshape(-1)
        tensor[-1] += 1
        changed = replace(q, **{field: tensor.reshape(getattr(q, field).shape)})
        assert changed.sha256() != q.sha256()
    assert torch.equal(q.codes, ours.read_quantized(name).codes)
