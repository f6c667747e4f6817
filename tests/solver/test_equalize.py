"""Columns that change places, and their scales: least where they claim to be, and losses are what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alphaquant.formats import FORMATS, Scheme, dequantize
from alphaquant.solver import Method, Permute, Recipe, factorize, quantize_stack
from alphaquant.solver.equalize import channel_order, equalizing_scales

from . import oracle

EXPERTS, ROWS, COLUMNS, GROUP = 3, 48, 128, 32
SCHEME = Scheme(FORMATS["int3"], GROUP)
ENOUGH = torch.full((EXPERTS,), 4000.0, dtype=torch.float64)


def uneven(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights whose columns have different ranges, and what an error of each column costs."""
    generator = torch.Generator().manual_seed(seed)
    w = oracle.weights(EXPERTS, ROWS, COLUMNS, seed=seed)
    spread = torch.randn(2, EXPERTS, COLUMNS, generator=generator).mul(0.6).exp()
    return w * spread[0][:, None], spread[1]


def objective(w: Tensor, cost: Tensor, scale: Tensor) -> Tensor:
    """Loss of each group as it is foretold, in float64."""
    steps = (w / scale[:, None]).double().unflatten(2, (-1, GROUP)).norm(8, dim=-1).square().sum(1)
    return steps * (cost.double() * scale.double().square()).unflatten(1, (-1, GROUP)).sum(-1)


def test_no_other_scales_are_foretold_to_lose_less():
    w, cost = uneven()
    scale = equalizing_scales(w, cost, SCHEME)
    least = objective(w, cost, scale)
    assert (least < 0.9 * objective(w, cost, torch.ones_like(scale))).all()
    for seed in range(20):
        noise = torch.randn(scale.shape, generator=torch.Generator().manual_seed(seed)).mul(0.2).exp()
        assert (objective(w, cost, scale * noise) > least).all()


def test_where_columns_begin_does_not_matter():
    w, cost = uneven()
    by = torch.randn(EXPERTS, COLUMNS, generator=torch.Generator().manual_seed(7)).mul(0.5).exp()
    moved = equalizing_scales(w * by[:, None], cost / by.square(), SCHEME)
    ratio = (moved / equalizing_scales(w, cost, SCHEME) / by).unflatten(1, (-1, GROUP)).log()
    assert (ratio - ratio.mean(-1, keepdim=True)).abs().max() < 0.02


def test_scales_have_a_mean_of_one_and_equal_columns_are_left():
    w, cost = uneven()
    assert torch.allclose(
        equalizing_scales(w, cost, SCHEME).log().unflatten(1, (-1, GROUP)).mean(-1), torch.zeros(1), atol=1e-5
    )
    same = equalizing_scales(w[:, :, :1].expand(-1, -1, COLUMNS), torch.ones(EXPERTS, COLUMNS), SCHEME)
    assert torch.allclose(same, torch.ones(1))


def test_zeros_and_dead_columns_give_numbers():
    w, cost = uneven()
    w[0], w[1, :, :GROUP], w[2, :, 5] = 0, 0, 0
    cost[1, 3] = 0
    scale = equalizing_scales(w, cost, SCHEME)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_a_matrix_with_a_massive_column_is_left():
    w, cost = uneven()
    cost[1, 9] = 1e4
    scale = equalizing_scales(w, cost, SCHEME)
    assert (scale[1] == 1).all()
    assert (scale[0] != 1).any()


@pytest.mark.parametrize("act_order", [True, False])
def test_factors_of_scaled_hessians(act_order):
    h = oracle.hessians(EXPERTS, COLUMNS)
    scale = uneven()[1]
    factor = factorize(h, torch.full((EXPERTS,), 0.01), act_order=act_order)
    moved = factor.scaled(scale)
    damped = h + 0.01 * h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(COLUMNS)
    wanted = damped * scale[:, :, None] * scale[:, None]
    for e, order in enumerate(factor.order_EI):
        m, d = moved.feedback_EII[e].double(), moved.curvature_EI[e].double()
        assert torch.allclose(m * d @ m.T, wanted[e][order][:, order].double(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(moved.in_natural_order(), factor.in_natural_order() * scale.square())


@pytest.mark.parametrize("act_order", [True, False])
def test_factors_of_reordered_hessians(act_order):
    h = oracle.hessians(EXPERTS, COLUMNS)
    channel = torch.rand(EXPERTS, COLUMNS, generator=torch.Generator().manual_seed(0)).argsort(1)
    factor = factorize(h, torch.full((EXPERTS,), 0.01), act_order=act_order)
    moved = factor.reordered(channel)
    damped = h + 0.01 * h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(COLUMNS)
    for e, order in enumerate(moved.order_EI):
        m, d = moved.feedback_EII[e].double(), moved.curvature_EI[e].double()
        wanted = damped[e][channel[e]][:, channel[e]]
        assert torch.allclose(m * d @ m.T, wanted[order][:, order].double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(moved.in_natural_order(), factor.in_natural_order().gather(1, channel))


@pytest.mark.parametrize("by", Permute)
def test_columns_are_sorted_by_what_is_said(by):
    w, cost = uneven()
    channel = channel_order(w, cost, by)
    key = {Permute.RANGE: w.abs().amax(1), Permute.IMPORTANCE: cost}.get(by, -torch.arange(COLUMNS).expand(EXPERTS, -1))
    assert torch.equal(key.gather(1, channel), key.sort(1, descending=True).values)


@pytest.mark.parametrize("equalize", [False, True])
def test_columns_alike_share_groups(*, equalize):
    """Every other column is small, and its input as much larger: sorted, those have a step of their own."""
    by = torch.ones(COLUMNS)
    by[::2] = 4
    w = oracle.weights(EXPERTS, ROWS, COLUMNS) / by
    h = oracle.hessians(EXPERTS, COLUMNS) * by * by[:, None]
    recipe = Recipe(permute=Permute.RANGE, equalize=equalize)
    plain = quantize_stack(w, h, ENOUGH, SCHEME, Recipe())
    left = quantize_stack(w, h, ENOUGH, SCHEME, recipe)
    assert torch.equal(left.quantized.codes, plain.quantized.codes)
    assert (left.channel_EI == torch.arange(COLUMNS)).all()
    found = quantize_stack(w, h, ENOUGH, SCHEME, recipe, moves=True)
    assert (found.channel_EI[:, : COLUMNS // 2] % 2 == 1).all()
    assert (found.loss_EO.sum(1) < 0.8 * plain.loss_EO.sum(1)).all()
    index = found.channel_EI[:, None].expand_as(w)
    made = torch.empty_like(w).scatter_(2, index, dequantize(found.quantized) * found.scale_EI[:, None])
    damped = h + (found.damping_E * h.diagonal(dim1=1, dim2=2).mean(1))[:, None, None] * torch.eye(COLUMNS)
    error = (w - made).double()
    assert torch.allclose((error @ damped.double() * error).sum(-1).float(), found.loss_EO, rtol=1e-3)


def test_codes_lose_what_they_say_and_less_than_without():
    w, _ = uneven()
    h = oracle.hessians(EXPERTS, COLUMNS)
    plain = quantize_stack(w, h, ENOUGH, SCHEME, Recipe())
    assert (plain.scale_EI == 1).all()
    found = quantize_stack(w, h, ENOUGH, SCHEME, Recipe(), moves=True)
    mean = h.diagonal(dim1=1, dim2=2).mean(1)
    damped = (h + (found.damping_E * mean)[:, None, None] * torch.eye(COLUMNS)).double()
    error = (w - dequantize(found.quantized) * found.scale_EI[:, None]).double()
    assert torch.allclose(((error @ damped) * error).sum(-1), found.loss_EO.double(), rtol=1e-3)
    energy = ((w.double() @ damped) * w.double()).sum(-1)
    assert torch.allclose(found.energy_EO.double(), energy, rtol=0.02)
    assert (found.loss_EO.sum(1) < 0.8 * plain.loss_EO.sum(1)).all()


def test_parts_of_the_work_change_nothing():
    w, _ = uneven()
    h = oracle.hessians(EXPERTS, COLUMNS)
    whole = quantize_stack(w, h, ENOUGH, SCHEME, Recipe(), moves=True)
    parts = quantize_stack(w, h, ENOUGH, SCHEME, Recipe(), 2 * 16 * COLUMNS, moves=True)
    assert torch.equal(whole.scale_EI, parts.scale_EI)
    assert torch.equal(whole.quantized.codes, parts.quantized.codes)


def test_what_is_rounded_or_not_to_be_equalized_is_left():
    w, _ = uneven()
    h = oracle.hessians(EXPERTS, COLUMNS)
    few = torch.tensor([4000.0, 1.0, 4000.0], dtype=torch.float64)
    found = quantize_stack(w, h, few, SCHEME, Recipe(), moves=True)
    assert found.fallback_E.tolist() == [False, True, False]
    assert (found.scale_EI[1] == 1).all()
    assert (found.scale_EI[2] != 1).any()
    for recipe in (Recipe(equalize=False), Recipe(method=Method.RTN)):
        assert (quantize_stack(w, h, ENOUGH, SCHEME, recipe, moves=True).scale_EI == 1).all()
    assert (quantize_stack(w, None, None, SCHEME, Recipe(), moves=True).scale_EI == 1).all()
