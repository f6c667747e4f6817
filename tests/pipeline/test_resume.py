"""A run that was stopped goes on from its last committed layer, and ends with the same bytes."""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from alphaquant.errors import CalibrationError, CheckpointError, OutputError
from alphaquant.pipeline import check_shards, export_checkpoint, run_status
from alphaquant.pipeline import layer as layer_module
from alphaquant.pipeline import run as run_module
from alphaquant.pipeline import staging as staging_module
from alphaquant.pipeline.rundir import RunDir
from alphaquant.solver import Backend, Effort, Method, Recipe

from . import tiny

PLAN = tiny.SERVED_PLAN


class Stop(BaseException):
    """Not an `Exception`: as a user's Ctrl-C."""


def stop_in_layer(monkeypatch, layer):
    original = layer_module.LayerQuantizer.layer

    def broken(quantizer, index, *args):
        if index == layer:
            raise Stop
        return original(quantizer, index, *args)

    monkeypatch.setattr(layer_module.LayerQuantizer, "layer", broken)


def result_of(out: Path) -> dict[str, bytes]:
    """Everything that a run is a function of nothing but its inputs for: shards, records, and what describes them."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("report.json", "manifest.json")
    }


def files_below(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text, request):
    """Uninterrupted runs, by family, each made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("whole") / "out"
            tiny.quantize(request.getfixturevalue(family), made[family], PLAN, text)
        return made[family]

    return get


@pytest.fixture
def stopped(olmoe, text, tmp_path, monkeypatch):
    """The output of a run that was stopped in its second layer; there is only what it left of the first."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in_layer(patch, 1)
        with pytest.raises(Stop):
            tiny.quantize(olmoe, out, PLAN, text)
    assert not out.exists()
    return out


@pytest.mark.parametrize("family", ["olmoe", "llama"])
@pytest.mark.parametrize("layout", [None, "dense"])
def test_it_goes_on_and_ends_with_the_same_bytes(whole, request, text, tmp_path, monkeypatch, family, layout):
    model, out = request.getfixturevalue(family), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in_layer(patch, 1)
        with pytest.raises(Stop):
            tiny.quantize(model, out, PLAN, text, layout=layout)
    seen = []
    original = layer_module.LayerQuantizer.layer

    def layer(quantizer, index, *args):
        seen.append(index)
        return original(quantizer, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(layer_module.LayerQuantizer, "layer", layer)
        result = tiny.quantize(model, out, PLAN, text, layout=layout)
    assert seen == [1], "the first layer is not done again"
    expected = whole(family) if layout is None else tmp_path / "expected"
    if layout is not None:
        tiny.quantize(model, expected, PLAN, text, layout=layout)
    assert result_of(out) == result_of(expected)
    one, other = (json.loads((path / "alphaquant/report.json").read_text()) for path in (out, expected))
    assert len(result.report["sessions"]) == 2
    for key in ("events", "summary", "sizes", "audit", "warnings", "recipe"):
        assert one[key] == other[key], key
    assert one["seconds"].keys() == other["seconds"].keys()
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "expected"}


def test_it_is_stopped_again_and_again(whole, olmoe, text, tmp_path, monkeypatch):
    """Behind the last layer too, where nothing but embedding and head are left, and behind those."""
    out = tmp_path / "out"
    places = [(layer_module.LayerQuantizer, "layer"), (layer_module.LayerQuantizer, "head")]
    for owner, name in [*places, (run_module.RunDir, "finish"), (Path, "rename")]:
        with monkeypatch.context() as patch:
            stop_in_layer(patch, 1)
            if name != "layer":
                patch.undo()

                def broken(*_args):
                    raise Stop

                patch.setattr(owner, name, broken)
            with pytest.raises(Stop):
                tiny.quantize(olmoe, out, PLAN, text)
        assert not out.exists()
    assert [run_status(out).done, run_status(out).total, run_status(out).starts] == [3, 3, 4]
    tiny.quantize(olmoe, out, PLAN, text)
    assert result_of(out) == result_of(whole("olmoe"))


@pytest.mark.parametrize("strength", [0.0, 0.2], ids=["alone", "beside the original's"])
def test_activations_do_not_move_while_they_are_written(olmoe, text, tmp_path, monkeypatch, strength):
    recipe = Recipe(asymmetric_target=strength)
    original, writers = RunDir.commit, []

    def late(run, *args, **kwargs):
        writers.append(threading.current_thread())
        time.sleep(0.5)
        original(run, *args, **kwargs)

    def stop(phase, layer, num_layers, tokens=0):
        if (phase, layer) == ("calibrate", 1) and "propagate" in seen:
            raise Stop
        seen[:] = [*seen, phase] if layer == 1 else []

    seen: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "commit", late)
        with pytest.raises(Stop):
            tiny.quantize(olmoe, tmp_path / "out", PLAN, text, recipe=recipe, progress=stop)
    assert len(writers) == 1
    assert writers[0] is not threading.main_thread()
    for name in ("out", "whole"):
        tiny.quantize(olmoe, tmp_path / name, PLAN, text, recipe=recipe)
    assert result_of(tmp_path / "out") == result_of(tmp_path / "whole")


def test_without_calibration(olmoe, tmp_path, monkeypatch):
    recipe = Recipe(method=Method.RTN, effort=Effort.FAST)
    with monkeypatch.context() as patch:
        stop_in_layer(patch, 1)
        with pytest.raises(Stop):
            tiny.quantize(olmoe, tmp_path / "out", PLAN, None, recipe=recipe)
    for out in ("out", "whole"):
        tiny.quantize(olmoe, tmp_path / out, PLAN, None, recipe=recipe)
    assert result_of(tmp_path / "out") == result_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": Recipe(effort=Effort.FAST)}, "recipe.effort was 'default' and is 'fast'"),
        ({"recipe": Recipe(routing_power=2.0)}, "recipe.routing_power was 1.0 and is 2.0"),
        ({"plan": "int4:g32"}, "plan.overrides was"),
        ({"layout": "humming"}, "layout was 'compressed-tensors' and is 'humming'"),
        ({"num_samples": 23}, "tokens.shape[0] was 24 and is 23"),
        ({"dtype": "bf16"}, "dtype was 'float32' and is 'bfloat16'"),
        ({"text": None}, "tokens was {'"),
    ],
)
def test_what_bears_on_the_result_may_not_change(stopped, olmoe, text, change, named):
    before = files_below(stopped.parent)
    options = {"text": text, **change}
    plan, given = options.pop("plan", PLAN), options.pop("text")
    with pytest.raises(OutputError) as caught:
        tiny.quantize(olmoe, stopped, plan, given, **options)
    assert named in caught.value.what
    assert "--fresh" in caught.value.remedy
    assert {k: v for k, v in files_below(stopped.parent).items() if not k.endswith("/lock")} == {
        k: v for k, v in before.items() if not k.endswith("/lock")
    }
    tiny.quantize(olmoe, stopped, plan, given, fresh=True, **options)


def test_another_model_of_the_same_shapes_is_noticed(stopped, tmp_path, text):
    other = tiny.write_model(tmp_path / "other", "olmoe", shards=2, seed=1)
    with pytest.raises(OutputError, match=r"checkpoint\.weights"):
        tiny.quantize(other, stopped, PLAN, text)


def test_comments_of_a_plan_may_change(stopped, olmoe, text, whole):
    tiny.quantize(olmoe, stopped, PLAN | {"comment": "for the second try"}, text)
    assert result_of(stopped).keys() == result_of(whole("olmoe")).keys()


def test_another_number_of_threads_is_recorded(stopped, olmoe, text):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        report = tiny.quantize(olmoe, stopped, PLAN, text).report
    finally:
        torch.set_num_threads(before)
    assert [session["threads"] for session in report["sessions"]] == [before, before + 1]
    assert [session["from_shard"] for session in report["sessions"]] == [0, 1]
    assert any(f"threads {before} → {before + 1}" in warning for warning in report["warnings"])


def test_other_kernels_are_recorded(stopped, olmoe, text):
    report = tiny.quantize(olmoe, stopped, PLAN, text, recipe=Recipe(backend=Backend.TORCH)).report
    assert [session["kernels"] for session in report["sessions"]] == ["native", "torch"]
    assert any("kernels native → torch" in warning for warning in report["warnings"])


def test_fresh_starts_anew(stopped, olmoe, text, monkeypatch):
    stop_in_layer(monkeypatch, 0)
    with pytest.raises(Stop):
        tiny.quantize(olmoe, stopped, PLAN, text, fresh=True)
    assert list(stopped.parent.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_that_was_killed_while_it_tidied_up_is_complete(olmoe, text, tmp_path, monkeypatch, overwrite):
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "thesis").write_text("old")

    def broken(*_args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(staging_module, "tidy", broken)
        with pytest.raises(Stop):
            tiny.quantize(olmoe, out, PLAN, text, overwrite=overwrite)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *([".out.old"] if overwrite else [])}
    before = files_below(out)
    stop_in_layer(monkeypatch, 0)
    result = tiny.quantize(olmoe, out, PLAN, text, overwrite=overwrite)
    assert not result.is_new
    del before["alphaquant/lock"]
    assert files_below(tmp_path) == {f"out/{name}": content for name, content in before.items()}
    assert result.report == json.loads((out / "alphaquant/report.json").read_text())
    assert [record.layer for record in result.records] == [0, 1, None]
    if overwrite:  # once it is over it is to be made again
        with pytest.raises(Stop):
            tiny.quantize(olmoe, out, PLAN, text, overwrite=True)


def test_what_another_run_has_made_is_refused(whole, olmoe, text, monkeypatch):
    out = whole("olmoe")
    before = files_below(out.parent)
    stop_in_layer(monkeypatch, 0)
    assert not tiny.quantize(olmoe, out, PLAN, text).is_new
    assert files_below(out.parent) == before
    for named, calibration, options in (
        ("recipe.effort was 'default' and is 'fast'", Path("nowhere"), {"recipe": Recipe(effort=Effort.FAST)}),
        (r"tokens.shape\[0\] was 24 and is 23", text, {"num_samples": 23}),
        ("tokens was {'", None, {}),
        ("not empty", text, {"fresh": True}),
    ):
        with pytest.raises(OutputError, match=f"already exists.* {named}") as caught:
            tiny.quantize(olmoe, out, PLAN, calibration, **options)
        assert "--overwrite" in caught.value.remedy
    assert files_below(out.parent) == before
    path = out / "alphaquant/records/layer-00001.json"
    path.write_bytes(before["out/alphaquant/records/layer-00001.json"] + b" ")
    try:
        with pytest.raises(OutputError, match="damaged") as caught:
            tiny.quantize(olmoe, out, PLAN, text)
        assert caught.value.where == str(path)
        with pytest.raises(Stop):
            tiny.quantize(olmoe, out, PLAN, text, overwrite=True)
    finally:
        path.write_bytes(before["out/alphaquant/records/layer-00001.json"])


def test_an_export_does_not_write_over_it(stopped, whole):
    before = files_below(stopped.parent)
    with pytest.raises(OutputError, match=r"an unfinished run of .*out would be lost"):
        export_checkpoint(whole("olmoe"), stopped, "dense")
    assert files_below(stopped.parent) == before


def test_bad_input_does_not_harm_what_is_there(stopped, olmoe):
    before = files_below(stopped.parent)
    with pytest.raises(CalibrationError) as caught:
        tiny.quantize(olmoe, stopped, PLAN, Path("nowhere.txt"))
    assert "the same command goes on" in caught.value.kept
    assert files_below(stopped.parent).keys() == before.keys()


def test_two_runs_on_one_directory(stopped, olmoe, text):
    staging = stopped.with_name(".out.partial")
    with (staging / "alphaquant/lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write('{"pid": 4242}')
        lock.flush()
        status = run_status(stopped)
        assert (status.state, status.pid) == ("running", 4242)
        before = files_below(stopped.parent)
        for fresh in (False, True):
            with pytest.raises(OutputError, match=r"another run is making .*out: process 4242"):
                tiny.quantize(olmoe, stopped, PLAN, text, fresh=fresh)
        assert files_below(stopped.parent) == before
    assert run_status(stopped).state == "stopped"
    tiny.quantize(olmoe, stopped, PLAN, text)


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00003.safetensors", "alphaquant/records/layer-00000.json", "alphaquant/stream/behind-00001.*"],
)
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_damaged_file_is_named(stopped, olmoe, text, name, damage):
    staging = stopped.with_name(".out.partial")
    (path,) = staging.glob(name)
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flipped" else content[:-1])
    with pytest.raises(OutputError) as caught:
        tiny.quantize(olmoe, stopped, PLAN, text)
    assert path.name in caught.value.where
    assert "--fresh" in caught.value.remedy
    assert staging.exists()
    tiny.quantize(olmoe, stopped, PLAN, text, fresh=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"num_shards": 3, "files": {"../../x": "0"}}'])
def test_a_damaged_manifest_is_named(stopped, olmoe, text, content):
    path = stopped.with_name(".out.partial") / "alphaquant/manifest.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="manifest cannot be used") as caught:
        tiny.quantize(olmoe, stopped, PLAN, text)
    assert caught.value.where == str(path)
    tiny.quantize(olmoe, stopped, PLAN, text, fresh=True)


def test_check_shards(whole, tmp_path):
    out = shutil.copytree(whole("olmoe"), tmp_path / "out")
    assert check_shards(out) == []
    names = [path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if path.is_file()]
    names.remove("alphaquant/manifest.json")
    assert len(names) >= 10
    for name in names:
        content = (out / name).read_bytes()
        for position in (0, len(content) // 2, -1):
            flipped = bytearray(content)
            flipped[position] ^= 4
            (out / name).write_bytes(flipped)
            assert [problem.file for problem in check_shards(out)] == [name]
        (out / name).write_bytes(content[:-1])
        assert [problem.file for problem in check_shards(out)] == [name]
        (out / name).unlink()
        assert "cannot be read" in check_shards(out)[0].what
        (out / name).write_bytes(content)
    assert check_shards(out) == []
    with pytest.raises(CheckpointError, match="no manifest"):
        check_shards(tmp_path)


def test_status(stopped, whole, tmp_path):
    status = run_status(stopped)
    assert (status.state, status.done, status.total, status.pid) == ("stopped", 1, 3, None)
    assert status.seconds > 0
    assert status.seconds_left == pytest.approx(2 * status.seconds)
    status = run_status(whole("olmoe"))
    assert (status.state, status.done, status.seconds_left) == ("complete", 3, None)
    with pytest.raises(OutputError, match="no run"):
        run_status(tmp_path / "elsewhere")
