"""Where a device's memory runs out a run goes on with fewer samples at a time, and says so."""

from __future__ import annotations

import pytest
import torch

from alphaquant.errors import AlphaQuantError
from alphaquant.models import mlp_half
from alphaquant.pipeline import stream
from alphaquant.pipeline.pace import Pace
from alphaquant.pipeline.solving import LayerSolver
from alphaquant.solver import Recipe

from . import tiny

SCHEME = "int4:g32"


def device_of(num_samples, monkeypatch):
    """A device whose memory holds so many samples of a feed-forward, and no more; returns what went through it."""
    sizes = []

    def half(x_NLD, *args, tap=None, **rest):
        out = mlp_half(x_NLD, *args, tap=tap, **rest)  # a tap has seen some of it by then
        sizes.append((len(x_NLD), tap is None))
        if len(x_NLD) > num_samples:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return out

    monkeypatch.setattr(stream, "mlp_half", half)
    return sizes


def test_a_run_goes_on_in_smaller_pieces(olmoe, text, tmp_path, monkeypatch):
    whole = tiny.quantize(olmoe, tmp_path / "whole", SCHEME, text, recipe=Recipe())
    sizes = device_of(5, monkeypatch)
    found = tiny.quantize(olmoe, tmp_path / "out", SCHEME, text, recipe=Recipe())
    samples = whole.report["calibration"]["num_samples"]
    assert samples > 10, "one chunk of more than two pieces"
    events = [event["event"] for event in found.report["events"]]
    assert len(events) >= 2
    assert all("feed-forward: memory ran out" in event for event in events)
    for left, right in zip(found.records, whole.records, strict=True):
        if left.routing is not None:
            assert left.routing.tokens == right.routing.tokens
        for one, other in zip(left.modules, right.modules, strict=True):
            assert (one.name, one.tokens) == (other.name, other.tokens)
            assert one.loss == pytest.approx(other.loss, rel=0.02)
    layers = len(found.records) - 1
    for moved in (False, True):
        done = [size for size, is_moved in sizes if size <= 5 and is_moved is moved]
        assert sum(done) == layers * samples


def test_what_has_moved_on_does_not_move_again(olmoe, text, tmp_path, monkeypatch):
    """Memory may run out while the stream moves on, with some of its chunks behind the layer already."""
    monkeypatch.setattr(stream, "CHUNK_TOKENS", 8 * 32)
    whole = tiny.quantize(olmoe, tmp_path / "whole", SCHEME, text, recipe=Recipe())
    calls = []

    def half(x_NLD, *args, tap=None, **rest):
        calls.append(len(x_NLD))
        if tap is None and len(x_NLD) > 3 and sum(size > 3 for size in calls) % 5 == 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return mlp_half(x_NLD, *args, tap=tap, **rest)

    monkeypatch.setattr(stream, "mlp_half", half)
    found = tiny.quantize(olmoe, tmp_path / "out", SCHEME, text, recipe=Recipe())
    assert found.report["events"]
    for left, right in zip(found.records, whole.records, strict=True):
        for one, other in zip(left.modules, right.modules, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=0.02)


def test_a_sample_too_large_is_an_error_and_the_run_can_go_on(olmoe, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        device_of(0, patch)
        with pytest.raises(AlphaQuantError, match="a single sample takes more memory") as caught:
            tiny.quantize(olmoe, tmp_path / "out", SCHEME, text)
    assert caught.value.where == "layer 0, feed-forward"
    assert "--max-memory" in caught.value.remedy
    assert not tiny.quantize(olmoe, tmp_path / "out", SCHEME, text).report["events"]


def test_memory_that_runs_out_while_solving_is_an_error(olmoe, text, tmp_path, monkeypatch):
    def solve(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LayerSolver, "_solve_part", solve)
    with pytest.raises(AlphaQuantError, match="the device's memory ran out") as caught:
        tiny.quantize(olmoe, tmp_path / "out", SCHEME, text)
    assert caught.value.where == "layer 0"


def test_pieces():
    pace, cuts = Pace(), [slice(0, 5), torch.tensor([6, 8, 9])]
    assert pace.cut(cuts) == cuts
    sizes = []
    while "1 samples" not in pace.slower(cuts, "here"):
        pieces = pace.cut(cuts)
        assert torch.cat(pieces).tolist() == [0, 1, 2, 3, 4, 6, 8, 9]
        assert [len(piece) for piece in pace.cut(pieces)] == [len(piece) for piece in pieces]
        sizes.append(max(map(len, pieces)))
    assert sizes == [3, 2]
    with pytest.raises(AlphaQuantError, match="single sample"):
        pace.slower(cuts, "here")
