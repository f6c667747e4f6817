"""What may lie in memory at a time changes how a layer is worked through, and nothing of what comes out."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch

from alphaquant.errors import CheckpointError
from alphaquant.formats import Activation, Inputs
from alphaquant.models import Source, read_layer
from alphaquant.pipeline import collect, prepare
from alphaquant.pipeline.collect import Reading, collection_passes
from alphaquant.pipeline.layer import LayerQuantizer, Limits
from alphaquant.pipeline.walk import _ahead
from alphaquant.solver import HessianSum, Recipe
from models.families import zoo

from . import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from alphaquant.pipeline.solving import QuantizedLayer

PLAN = {
    "default": {"wq": "int3", "group_size": 32},
    "overrides": [
        {"pattern": "*.experts.2.*", "wq": "int4"},
        {"pattern": "*.experts.[13].*", "aq": "int8"},
        {"pattern": "*.experts.5.down_proj", "skip": True},
        {"pattern": "*.mlp.gate", "wq": "int8"},
    ],
}


def quantized(directory: Path, limits: Limits) -> QuantizedLayer:
    prepared = prepare(directory, tiny.as_plan(PLAN))
    quantizer = LayerQuantizer(prepared.spec, prepared.schemes, Recipe(rtn_below=0.0), limits=limits)
    x_NLD = torch.randn(6, 16, prepared.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    return quantizer.layer(1, read_layer(prepared.source, prepared.spec, 1, torch.float32), x_NLD)


class Largest(HessianSum):
    """A Hessian sum that keeps the size of the largest one made."""

    num_bytes = 0

    def __init__(self, num_experts, in_features, *args, **rest):
        super().__init__(num_experts, in_features, *args, **rest)
        Largest.num_bytes = max(Largest.num_bytes, 4 * num_experts * in_features**2)


@pytest.fixture(scope="module")
def get(tmp_path_factory):
    return zoo(tmp_path_factory.mktemp("limits"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3", "deepseek_v2"])
def test_less_memory_gives_the_same_layer(get, monkeypatch, family):
    """Passes of one Hessian, of a few, and parts of a few rows, against all at once."""
    directory = get(family).path
    whole = quantized(directory, Limits())
    monkeypatch.setattr(collect, "HessianSum", Largest)
    for hessian_bytes, workspace in ((1, 64 * 8), (3 * 4 * 64**2, 1 << 24), (1 << 40, 64 * 64)):
        monkeypatch.setattr(Largest, "num_bytes", 0)
        found = quantized(directory, Limits(hessian_bytes, workspace))
        assert 0 < Largest.num_bytes <= max(hessian_bytes, 4 * 192**2)
        assert [m.name for m in found.record.modules] == [m.name for m in whole.record.modules]
        assert found.record.routing == whole.record.routing
        for left, right in zip(found.record.modules, whole.record.modules, strict=True):
            assert left.loss == pytest.approx(right.loss, rel=1e-4)
            assert (left.tokens, left.event, left.damping) == (right.tokens, right.event, right.damping)
        assert found.quantized.keys() == whole.quantized.keys()
        for name, module in found.quantized.items():
            assert module.codes.equal(whole.quantized[name].codes), name
            assert module.scale.equal(whole.quantized[name].scale), name


def test_passes_hold_what_fits_and_the_deepest_come_first():
    wanted = {
        Reading(Source.MLP_IN): (1, 64),
        Reading(Source.EXPERT_IN): (8, 64),
        Reading(Source.EXPERT_HIDDEN): (8, 32),
    }
    assert len(collection_passes(wanted)) == 1
    size = 4 * 64**2
    passes = collection_passes(wanted, 4 * size)
    assert passes == [
        {Reading(Source.EXPERT_HIDDEN): range(8), Reading(Source.EXPERT_IN): range(2)},
        {Reading(Source.EXPERT_IN): range(2, 6)},
        {Reading(Source.EXPERT_IN): range(6, 8), Reading(Source.MLP_IN): range(1)},
    ]


@pytest.mark.parametrize("hessian_bytes", [1, 5000, 4 * 64**2, 100_000, 1 << 40])
def test_every_expert_is_collected_once(hessian_bytes):
    wanted = {
        Reading(Source.MLP_IN): (1, 64),
        Reading(Source.EXPERT_IN): (7, 64),
        Reading(Source.EXPERT_HIDDEN): (7, 96),
    }
    wanted |= {Reading(Source.EXPERT_HIDDEN, Inputs(Activation.FP8)): (7, 96)}
    found: dict[Reading, list[int]] = {source: [] for source in wanted}
    for one in collection_passes(wanted, hessian_bytes):
        taken = 0
        for source, experts in one.items():
            found[source] += experts
            taken += len(experts) * 4 * wanted[source][1] ** 2
        assert taken <= hessian_bytes or sum(map(len, one.values())) == 1
    assert found == {source: list(range(experts)) for source, (experts, _) in wanted.items()}
    assert collection_passes({}) == [{}]


@pytest.mark.parametrize("reads_ahead", [False, True])
def test_a_layer_is_read_while_the_one_before_is_worked_on(reads_ahead):
    begun = [threading.Event() for _ in range(4)]

    def read(layer: int) -> dict[str, int]:
        begun[layer].set()
        return {"layer": layer}

    layers = _ahead(read, range(3), reads_ahead=reads_ahead)
    for layer in range(3):
        assert next(layers) == {"layer": layer}
        if reads_ahead and layer < 2:
            assert begun[layer + 1].wait(10)
        else:
            assert not begun[layer + 1].is_set()
    with pytest.raises(StopIteration):
        next(layers)


def test_what_fails_to_be_read_ahead_is_told_when_its_turn_comes():
    def read(layer: int) -> dict[str, int]:
        if layer == 1:
            raise CheckpointError("gone")
        return {}

    layers = _ahead(read, range(3), reads_ahead=True)
    assert next(layers) == {}
    with pytest.raises(CheckpointError, match="gone"):
        next(layers)
