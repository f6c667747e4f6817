"""A directory of the final name is whole; a run that fails leaves what was there before, and what it has committed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alphaquant.errors import CheckpointError, OutputError
from alphaquant.pipeline import check_output, export_checkpoint, load, run_status, rundir, save_single_file
from alphaquant.pipeline import layer as layer_module
from alphaquant.pipeline import walk as walk_module

from . import tiny

INT4 = "int4:g32"


class Interruption(BaseException):
    """Not an `Exception`: as a user's Ctrl-C."""


def fail_in_layer(monkeypatch, layer, error):
    """Let the run fail once it reaches a layer, with the layers before it written."""
    original = layer_module.LayerQuantizer.layer

    def broken(quantizer, index, *args):
        if index == layer:
            raise error
        return original(quantizer, index, *args)

    monkeypatch.setattr(layer_module.LayerQuantizer, "layer", broken)


def snapshot(directory: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize("error", [RuntimeError("broken"), Interruption(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("out", ["out", "deep/er/out"])
def test_a_run_that_fails_before_a_layer_is_done_leaves_nothing(llama, tmp_path, monkeypatch, error, out):
    fail_in_layer(monkeypatch, 0, error)
    with pytest.raises(type(error)):
        tiny.quantize(llama, tmp_path / out, INT4, None)
    assert tiny.listing(tmp_path) == set()


@pytest.mark.parametrize("error", [RuntimeError("broken"), Interruption(), OSError(28, "No space left on device")])
def test_a_run_that_fails_later_keeps_its_layers(llama, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch:
        fail_in_layer(patch, 1, error)
        with pytest.raises(type(error)):
            tiny.quantize(llama, tmp_path / "deep/out", INT4, None)
    assert {name.split("/")[1] for name in tiny.listing(tmp_path) if "/" in name} == {".out.partial"}
    assert run_status(tmp_path / "deep/out").done == 1
    tiny.quantize(llama, tmp_path / "deep/out", INT4, None)
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}


def test_a_failing_run_leaves_what_others_put_beside_it(llama, tmp_path, monkeypatch):
    original = walk_module.read_layer

    def read_layer(*args):
        (tmp_path / "deep/note").write_text("mine")
        return original(*args)

    monkeypatch.setattr(walk_module, "read_layer", read_layer)
    fail_in_layer(monkeypatch, 0, RuntimeError)
    with pytest.raises(RuntimeError):
        tiny.quantize(llama, tmp_path / "deep/er/out", INT4, None)
    assert tiny.listing(tmp_path) == {"deep", "deep/note"}


def test_the_directory_appears_only_at_the_end(llama, tmp_path, monkeypatch):
    seen = []
    original = rundir.RunDir.finish

    def finish(*args):
        original(*args)
        seen.append(tiny.listing(tmp_path))

    monkeypatch.setattr(rundir.RunDir, "finish", finish)
    tiny.quantize(llama, tmp_path / "out", INT4, None)
    assert not any(name == "out" or name.startswith("out/") for name in seen[0])
    assert {name.split("/")[0] for name in tiny.listing(tmp_path)} == {"out"}


def test_an_empty_directory_may_be_filled(llama, tmp_path):
    (tmp_path / "out").mkdir()
    tiny.quantize(llama, tmp_path / "out", INT4, None)
    load(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_something_else_is_not_overwritten(llama, tmp_path, kind):
    if kind == "directory":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("mine")
    else:
        (tmp_path / "out").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="already exists") as caught:
        tiny.quantize(llama, tmp_path / "out", INT4, None)
    assert "--overwrite" in caught.value.remedy
    assert snapshot(tmp_path) == before
    tiny.quantize(llama, tmp_path / "out", INT4, None, overwrite=True)
    load(tmp_path / "out")
    assert not (tmp_path / "out/thesis.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_overwriting_happens_at_the_end(llama, tmp_path, monkeypatch):
    tiny.quantize(llama, tmp_path / "out", INT4, None)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        fail_in_layer(patch, 1, RuntimeError())
        with pytest.raises(RuntimeError):
            tiny.quantize(llama, tmp_path / "out", "int8:g32", None, overwrite=True)
    kept = snapshot(tmp_path)
    assert {name: content for name, content in kept.items() if not name.startswith(".out.partial")} == before
    with pytest.raises(OutputError, match=r"plan\.default\.wq was 'int8' and is 'int4'") as caught:
        tiny.quantize(llama, tmp_path / "out", INT4, None, overwrite=True)
    assert "--fresh" in caught.value.remedy
    tiny.quantize(llama, tmp_path / "out", "int8:g32", None, overwrite=True)
    after = snapshot(tmp_path)
    assert after.keys() == before.keys()
    assert after["out/config.json"] != before["out/config.json"]


def test_a_move_that_fails_puts_the_old_one_back(llama, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    before = snapshot(tmp_path)
    rename = Path.rename

    def broken(path, target):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken)
        with pytest.raises(OutputError, match="Input/output error") as caught:
            tiny.quantize(llama, tmp_path / "out", INT4, None, overwrite=True)
    assert ".out.partial" in caught.value.kept
    after = snapshot(tmp_path)
    assert {name: content for name, content in after.items() if not name.startswith(".out.partial")} == before
    tiny.quantize(llama, tmp_path / "out", INT4, None, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    load(tmp_path / "out")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", [".", "..", "inner", "inner/most", "link", "../x/../model"])
def test_the_model_itself_is_never_the_output(tmp_path, overwrite, out):
    model = tiny.write_model(tmp_path / "home/model", "llama")
    (model / "link").symlink_to(model)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="is, holds or lies in the model itself"):
        tiny.quantize(model, model / out, INT4, None, overwrite=overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "path", ["/dev/null/x", "/dev/null/x/y/z", "/proc/nowhere/x", f"/tmp/{'x' * 300}", "/tmp/{}/y".format("x" * 300)]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_cannot_be_written(llama, path, overwrite):
    with pytest.raises(OutputError, match="cannot be") as caught:
        tiny.quantize(llama, Path(path), INT4, None, overwrite=overwrite)
    assert caught.value.remedy
    assert path[:20] in str(caught.value)


def test_an_output_in_a_loop_of_links(llama, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for out in (tmp_path / "a", tmp_path / "a/out"):
        with pytest.raises(OutputError, match="cannot be written"):
            tiny.quantize(llama, out, INT4, None)
    assert tiny.listing(tmp_path) == {"a", "b"}


def test_it_is_refused_before_any_work(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(walk_module, "read_outer", lambda *_: pytest.fail("work was done"))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError):
        tiny.quantize(llama, tmp_path / "out", INT4, tmp_path / "no-such-text")


def test_an_export_is_as_careful(llama, tmp_path, monkeypatch):
    tiny.quantize(llama, tmp_path / "out", INT4, None)
    before = snapshot(tmp_path)
    for target in (tmp_path / "out", tmp_path / "out/in", tmp_path):
        with pytest.raises(OutputError):
            export_checkpoint(tmp_path / "out", target, "dense", overwrite=True)
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        export_checkpoint(tmp_path / "out", tmp_path / "thesis", "dense")
    (tmp_path / "thesis").unlink()
    add_shard = rundir.RunDir.add_shard

    def broken(run, tensors):
        if len(run.shards) == 1:
            raise RuntimeError
        return add_shard(run, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(rundir.RunDir, "add_shard", broken)
        with pytest.raises(RuntimeError):
            export_checkpoint(tmp_path / "out", tmp_path / "dense", "dense")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_an_export_of_damaged_records(llama, tmp_path, content):
    tiny.quantize(llama, tmp_path / "out", INT4, None)
    (tmp_path / "out/alphaquant/report.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"report\.json holds no JSON object"):
        export_checkpoint(tmp_path / "out", tmp_path / "dense", "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("path", ["/dev/null/x.pt", "/dev/null/x/y.pt", "{}/out"])
def test_a_single_file_that_cannot_be_written(llama, tmp_path, path):
    tiny.quantize(llama, tmp_path / "out", INT4, None)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="cannot be written") as caught:
        save_single_file(tmp_path / "out", Path(path.format(tmp_path)))
    assert caught.value.remedy
    assert snapshot(tmp_path) == before


def test_output_checks_are_quiet_when_all_is_well(llama, tmp_path):
    check_output(tmp_path / "new/er", llama, overwrite=False)
    assert tiny.listing(tmp_path) == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_single_file_that_is_interrupted(llama, tmp_path, monkeypatch, error):
    tiny.quantize(llama, tmp_path / "out", INT4, None)
    (tmp_path / "x.pt").write_text("old")

    def broken(_content, path):
        path.write_text("half")
        raise error

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        save_single_file(tmp_path / "out", tmp_path / "x.pt", remove_source=True)
    assert snapshot(tmp_path) == {"x.pt": b"old"}
