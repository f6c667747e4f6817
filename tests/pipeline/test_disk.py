"""A disk that is full, or may only be read: a clean stop, and nothing lost."""

from __future__ import annotations

import subprocess

import pytest

from alphaquant.errors import OutputError
from alphaquant.pipeline import layer as layer_module
from alphaquant.pipeline import run_status
from alphaquant.solver import Effort, Recipe

from . import tiny
from .test_resume import result_of

PLAN = tiny.SERVED_PLAN


@pytest.fixture
def disk(tmp_path):
    """A small file system of one's own: call it with mount options, again to change them."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> None:
        remount = "remount," if place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(place)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"a file system may not be mounted here: {result.stderr.strip()}")

    mount("size=16k")
    yield place, mount
    subprocess.run(["umount", str(place)], check=True)


def run(model, out, text):
    return tiny.quantize(model, out, PLAN, text, num_samples=8, recipe=Recipe(effort=Effort.FAST))


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(disk, olmoe, text, tmp_path):
    place, mount = disk
    run(olmoe, tmp_path / "whole", text)
    expected = result_of(tmp_path / "whole")
    needed = sum(map(len, expected.values())) // 1024
    done = []
    for share in (0.02, 0.2, 0.4, 0.6, 0.8, 1.0):
        mount(f"size={int(share * needed)}k")
        with pytest.raises(OutputError, match="the disk is full") as caught:
            run(olmoe, place / "out", text)
        assert caught.value.remedy
        done.append(run_status(place / "out").done if (place / ".out.partial").exists() else 0)
        assert (caught.value.kept is not None) == (done[-1] > 0)
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] >= 1
    mount(f"size={3 * needed}k")
    report = run(olmoe, place / "out", text).report
    assert report["sessions"][-1]["from_shard"] == done[-1]
    assert result_of(place / "out") == expected


def interrupted(*_args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_disk_that_may_only_be_read(disk, llama, tmp_path, is_begun, monkeypatch):
    place, mount = disk
    mount("size=4m")
    if is_begun:
        with monkeypatch.context() as patch:
            patch.setattr(layer_module.LayerQuantizer, "head", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tiny.quantize(llama, place / "out", PLAN, None)
    mount("ro,size=4m")
    with pytest.raises(OutputError, match="cannot be") as caught:
        tiny.quantize(llama, place / "out", PLAN, None)
    assert caught.value.remedy
    mount("rw,size=4m")
    tiny.quantize(llama, place / "out", PLAN, None)
    assert {path.name for path in place.iterdir()} == {"out"}
