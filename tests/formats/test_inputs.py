"""Inputs rounded token by token, against a plain reference of one number at a time."""

import math

import pytest
import torch

from alphaquant.formats import Activation, round_inputs

E4M3 = {s * (m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for s in (1, -1) for e in range(16) for m in range(8)}
TOP = {Activation.INT8: 127.0, Activation.FP8: 448.0}
GRID = {Activation.INT8: range(-128, 128), Activation.FP8: E4M3 - {480.0, -480.0}}  # those two codes are no numbers
SIZES = torch.tensor([1e-2, 1.0, 30.0, 0.1, 7.0])[:, None]


def nearest(value, grid):
    """The grid's values that are nearest, one or two."""
    best = min(abs(value - g) for g in grid)
    return {g for g in grid if abs(value - g) == best}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [Activation.INT8, Activation.FP8])
def test_every_token_has_its_own_scale(activation, dtype):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)) * SIZES
    x = x.to(dtype)
    values, scale = round_inputs(x, activation)
    assert (values.dtype, values.shape, scale.shape) == (dtype, x.shape, (2, 5, 1))
    for row, found, s in zip(x.flatten(0, 1).double(), values.flatten(0, 1).double(), scale.flatten(), strict=True):
        assert s.item() == pytest.approx(row.abs().max().item() / TOP[activation], rel=1e-6)
        for value, rounded in zip(row.tolist(), found.tolist(), strict=True):
            quotient = (torch.tensor(value, dtype=torch.float32) / s).item()
            assert rounded in nearest(quotient, GRID[activation])
        assert found.abs().max() == TOP[activation]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_group_of_a_token_has_its_own_scale(dtype):
    x = torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(0)) * SIZES
    x[..., 128:256] *= 1e-3  # what one scale a token would round to few steps
    x = x.to(dtype)
    values, scale = round_inputs(x, Activation.FP8, 128)
    assert (values.dtype, values.shape, scale.shape) == (dtype, x.shape, (2, 5, 1))
    assert (scale == 1).all()
    for row, found in zip(x.flatten(0, 1).float(), values.flatten(0, 1), strict=True):
        for group, rounded in zip(row.split(128), found.split(128), strict=True):
            step = group.abs().max() / 448
            assert rounded.equal(((group / step).to(torch.float8_e4m3fn).float() * step).to(dtype))
    assert not round_inputs(torch.zeros(1, 128), Activation.FP8, 128)[0].any()


@pytest.mark.parametrize("activation", [Activation.INT8, Activation.FP8])
def test_empty_and_extreme_tokens_stay_numbers(activation):
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([[0.0] * 8, [largest] * 8, [1e-38, -1e-38] * 4, [largest, -1.0] * 4], dtype=torch.bfloat16)
    values, scale = round_inputs(x, activation)
    again = values.double() * scale.double()
    assert not again[0].any()
    assert all(math.isfinite(v) for v in again.flatten().tolist())
    assert again[1, 0].item() == pytest.approx(largest, rel=0.01)
    assert again[3, 1].item() == 0  # lost beside a magnitude of 1e38
