"""Activations that lie on disk between chunks: the same bytes come out, and the memory is given up."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from alphaquant.checkpoint import read_rows
from alphaquant.errors import OutputError
from alphaquant.pipeline import distributed, run, stream
from alphaquant.pipeline.budget import MemoryPlan
from alphaquant.pipeline.layer import LayerQuantizer, Limits
from alphaquant.pipeline.stream import held_stream

from . import tiny

PLAN = {"default": {"wq": "int3", "group_size": 32}}


def test_what_is_written_comes_back_as_copies(tmp_path):
    held = held_stream((5, 3, 8), torch.bfloat16, torch.device("cpu"), tmp_path)
    truth = torch.randn(5, 3, 8).bfloat16()
    for start in range(5):
        held[start : start + 1] = truth[start : start + 1]
    part = held[1:4]
    assert part.equal(truth[1:4])
    part.zero_()
    assert held[1:4].equal(truth[1:4])
    assert held.shape == (5, 3, 8)
    assert not tiny.listing(tmp_path)  # it has no name, so it vanishes with the process


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_it_takes_no_memory(tmp_path):
    def resident() -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])

    size, parts = 256 << 20, 256  # small parts: what is in hand is no part of the question
    held = held_stream((parts, 1, size // parts // 2), torch.bfloat16, torch.device("cpu"), tmp_path)
    before = resident()
    for start in range(parts):
        held[start : start + 1] = torch.full((1, 1, size // parts // 2), float(start), dtype=torch.bfloat16)
    for start in range(parts):
        assert held[start : start + 1].mean() == start
    assert resident() - before < size // 8


def test_a_disk_without_room_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        held_stream((5, 3, 8), torch.bfloat16, torch.device("cpu"), tmp_path)
    assert "nsamples" in caught.value.remedy


def test_going_on_reads_activations_a_part_at_a_time(olmoe, text, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_TOKENS", 64)  # two samples

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LayerQuantizer, "head", stop)
        with pytest.raises(KeyboardInterrupt):
            tiny.quantize(olmoe, tmp_path / "out", PLAN, text)
    read = []

    def spy(slot, rows):
        read.append(list(rows))
        return read_rows(slot, rows)

    monkeypatch.setattr(distributed, "read_rows", spy)
    tiny.quantize(olmoe, tmp_path / "out", PLAN, text)
    assert read == [[start, start + 1] for start in range(0, 24, 2)]


@pytest.mark.parametrize("stops", [False, True])
def test_runs_short_of_memory_write_the_same_bytes(olmoe, text, tmp_path, monkeypatch, stops):
    """One Hessian at a time, few rows at a time, activations on disk; and going on from where that was stopped."""
    tiny.quantize(olmoe, tmp_path / "ample", PLAN, text)
    plan = MemoryPlan(Limits(1, 64 * 64, holds_stream=True), 40, 4, {"all": 1})
    monkeypatch.setattr(run, "plan_memory", lambda *_, **__: plan)
    if stops:
        add_shard = run.RunDir.add_shard

        def stop(self, tensors):
            if len(self.shards) == 1:
                raise KeyboardInterrupt
            return add_shard(self, tensors)

        with monkeypatch.context() as patch:
            patch.setattr(run.RunDir, "add_shard", stop)
            with pytest.raises(KeyboardInterrupt):
                tiny.quantize(olmoe, tmp_path / "short", PLAN, text)
    result = tiny.quantize(olmoe, tmp_path / "short", PLAN, text)
    assert len([note for note in result.report["notes"] if "memory is short" in note]) == 2
    shards = sorted((tmp_path / "ample").glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "short" / shard.name).read_bytes()
