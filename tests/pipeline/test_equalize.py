"""`up` makes up for what the columns of `down` are scaled by, so that only the loss shows it."""

from __future__ import annotations

import pytest
import torch

from alphaquant.models import read_layer
from alphaquant.pipeline import prepare
from alphaquant.pipeline.layer import LayerQuantizer, Limits
from alphaquant.solver import Permute, Recipe
from models.families import zoo

from . import tiny

SMALL = Limits(hessian_bytes=4 * 64**2, workspace_weights=64 * 64)


@pytest.fixture(scope="module")
def get(tmp_path_factory):
    return zoo(tmp_path_factory.mktemp("equalize"))


def layer_of(directory, plan, recipe, spread=0.0, limits=None):
    """What layer 1 makes of a stream, its modules' losses, and the weights; hidden channels spread at random first."""
    prepared = prepare(directory, tiny.as_plan(plan))
    weights = read_layer(prepared.source, prepared.spec, 1, torch.float32)
    generator = torch.Generator().manual_seed(3)
    for key in [key for key in weights if "up_proj" in key]:
        by = torch.randn(weights[key].shape[:-1], generator=generator).mul(spread).exp()
        weights[key] *= by[..., None]
        weights[key.replace("up", "down")] /= by[..., None, :]
    before = {key: value.clone() for key, value in weights.items()}
    x_NLD = torch.randn(64, 32, prepared.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    quantizer = LayerQuantizer(prepared.spec, prepared.schemes, recipe, limits=limits or Limits())
    result = quantizer.layer(1, weights, x_NLD)
    return x_NLD, {module.name: module.relative_loss for module in result.record.modules}, before, weights


FAMILIES = ["llama", "olmoe", "qwen2_moe", "deepseek", "deepseek_v3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_computes_the_same(get, family):
    fine = {"default": {"wq": "int8", "group_size": 32}}
    directory = get(family).path
    plain, *_ = layer_of(directory, fine, Recipe(equalize=False, rtn_below=0), 0.7)
    equalized, _, before, after = layer_of(directory, fine, Recipe(rtn_below=0), 0.7)
    ups = [key for key in before if "up_proj" in key]
    assert all(((after[key] / before[key]).median(-1).values - 1).abs().max() > 0.3 for key in ups)
    assert (equalized - plain).norm() / plain.norm() < 0.03  # two roundings to eight bits


@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize("permute", [Permute.RANGE, Permute.IMPORTANCE])
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_change_places_compute_the_same(get, family, permute, *, equalize):
    fine = {"default": {"wq": "int8", "group_size": 32}}
    directory = get(family).path
    plain, *_ = layer_of(directory, fine, Recipe(equalize=False, rtn_below=0), 0.7)
    recipe = Recipe(equalize=equalize, permute=permute, rtn_below=0)
    permuted, _, before, after = layer_of(directory, fine, recipe, 0.7)
    for key in [key for key in before if "gate_proj" in key]:
        nearest = torch.cdist(after[key], before[key]).argmin(-1)
        places = torch.arange(nearest.shape[-1])
        assert (nearest != places).float().mean() > 0.9
        assert torch.equal(nearest.sort(-1).values, places.expand_as(nearest))
    assert (permuted - plain).norm() / plain.norm() < 0.03  # two roundings to eight bits


@pytest.mark.parametrize("family", FAMILIES)
def test_how_hidden_channels_are_spread_does_not_matter(get, family):
    directory, coarse = get(family).path, {"default": {"wq": "int3", "group_size": 32}}

    def mean(recipe: Recipe, spread: float) -> float:
        losses = layer_of(directory, coarse, recipe, spread)[1]
        return sum(loss for name, loss in losses.items() if "down" in name)

    plain, equalized = Recipe(equalize=False, rtn_below=0), Recipe(rtn_below=0)
    assert mean(plain, 0.4) > 1.1 * mean(plain, 0.0)
    assert mean(equalized, 0.4) < 1.05 * mean(equalized, 0.0)
    assert mean(equalized, 0.0) < mean(plain, 0.0)


@pytest.mark.parametrize("permute", Permute)
def test_what_is_worked_on_together_changes_nothing(get, permute):
    directory, plan = get("olmoe").path, {"default": {"wq": "int3", "group_size": 32}}
    recipe = Recipe(permute=permute, rtn_below=0)
    whole, losses, _, weights = layer_of(directory, plan, recipe, 0.7)
    parts, same, _, others = layer_of(directory, plan, recipe, 0.7, SMALL)
    assert torch.equal(whole, parts)
    assert losses == same
    assert all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.parametrize(
    "override", [{"pattern": "*up_proj", "skip": True}, {"pattern": "*down_proj", "aq": "int8"}], ids=["up", "inputs"]
)
def test_what_cannot_be_made_up_for_is_left(get, override):
    plan = {"default": {"wq": "int3", "group_size": 32}, "overrides": [override]}
    directory = get("olmoe").path
    plain = layer_of(directory, plan, Recipe(equalize=False, rtn_below=0), 0.7)
    found = layer_of(directory, plan, Recipe(permute=Permute.RANGE, rtn_below=0), 0.7)
    assert torch.equal(plain[0], found[0])
    assert plain[1] == found[1]


def test_places_stay_where_a_gate_is_not_quantized(get):
    plan = {
        "default": {"wq": "int3", "group_size": 32},
        "overrides": [{"pattern": "*.1.gate_proj", "skip": True}, {"pattern": "*.experts.2.down_proj", "wq": "int4"}],
    }
    before, after = layer_of(get("olmoe").path, plan, Recipe(permute=Permute.RANGE, rtn_below=0), 0.7)[2:]
    key = next(key for key in before if "gate_proj" in key)
    moved = [
        (torch.cdist(a, b).argmin(-1) != torch.arange(len(a))).any()
        for a, b in zip(after[key], before[key], strict=True)
    ]
    assert not any(moved[expert] for expert in range(len(moved)) if expert != 2)
    assert moved[2]
    assert torch.equal(after[key][1], before[key][1])
