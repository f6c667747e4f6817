"""Codes under way: the loops in C against torch, both against a step in float64 written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from alphaquant.formats import FORMATS, Scheme, dequantize, quantize
from alphaquant.formats.grid import round_to_grid
from alphaquant.solver import Backend, Places, grid_steps, native

from .oracle import default_schemes, scheme_id, weights

SCHEMES = [*default_schemes(), Scheme(FORMATS["fp8_block"], 128)]
needs_compiler = pytest.mark.skipif(not native.is_available(), reason="no C compiler")
BOTH = [Backend.TORCH, pytest.param(Backend.NATIVE, marks=needs_compiler)]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)


def places_of(scheme, backend, shape, generator):
    q = quantize(weights(*shape), scheme)
    q = dataclasses.replace(q, codes=q.codes.mT.contiguous().mT, scale=q.scale.mT.contiguous().mT)  # as solved
    leaning_EOI = (torch.rand(shape, generator=generator) - 0.5) * 0.4 * grid_steps(values_of(q), scheme.format)
    return Places.of(q, leaning_EOI, backend)


def values_of(q):
    """In grid values: what scales multiply."""
    scale_EOI = q.effective_scale().repeat_interleave(q.codes.shape[-1] // q.scale.shape[-1], -1)
    value_EOI = dequantize(q) / scale_EOI
    return round_to_grid(value_EOI, q.scheme.format) if q.zero is None else value_EOI.round()


def moved(scheme, backend, shape, steps=5):
    """Places after some steps, and the weights before each of them."""
    generator = torch.Generator().manual_seed(2)
    places, seen = places_of(scheme, backend, shape, generator), []
    for _ in range(2):
        places.shaken(generator)
        places.learn(torch.randn(shape, generator=generator) * 0.01 + 0.002 * places.sign_EOI)
    for step in range(steps):
        seen.append(places.weights())
        places.move(torch.randn(shape, generator=generator) * 1e-3, 1 - step / steps)
    return places, seen


@needs_compiler
@every_scheme
def test_both_ways_move_alike(scheme):
    """Only sums differ, by their order: 70 rows are more than a part of the loops; 3 matrices."""
    shape = (3, 70, max(96, scheme.group_size))
    (torchs, seen), (natives, seen_too) = (moved(scheme, backend, shape) for backend in (Backend.TORCH, Backend.NATIVE))
    assert natives.place_EOI.is_contiguous()
    assert torch.equal(seen[0], seen_too[0])
    assert not torch.equal(seen[0], seen[-1])
    assert torch.allclose(torchs.place_EOI, natives.place_EOI, rtol=1e-4, atol=1e-4)
    assert torch.allclose(torchs.log_EOG, natives.log_EOG, rtol=0, atol=1e-5)
    assert torch.allclose(torchs.noise.row_EO1, natives.noise.row_EO1, rtol=1e-5)
    assert torch.allclose(torchs.noise.column_E1I, natives.noise.column_E1I, rtol=1e-5)
    same = torchs.ended().codes == natives.ended().codes
    assert same.float().mean() > 0.999


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("size", [20, 36, 50])
def test_groups_of_any_size(backend, size):
    """No multiple of what a processor works on together."""
    scheme, shape = Scheme(FORMATS["int4"], size), (2, 5, 2 * size)
    places, seen = moved(scheme, backend, shape, steps=1)
    assert torch.equal(seen[0], dequantize(places_of(scheme, backend, shape, torch.Generator()).quantized))
    expected, _ = moved(scheme, Backend.TORCH, shape, steps=1)
    assert torch.allclose(places.place_EOI, expected.place_EOI, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BOTH)
@every_scheme
def test_a_step_is_what_it_says(scheme, backend):
    """A share of the way to where the weight should be, and a tenth of a step at most; in float64 here."""
    shape = (2, 70, max(32, scheme.group_size))
    generator = torch.Generator().manual_seed(3)
    places = places_of(scheme, backend, shape, generator)
    places.shaken(generator)
    places.learn(torch.randn(shape, generator=generator) + places.sign_EOI)
    for _ in range(9):  # of which none says anything
        places.move(torch.zeros(shape), 0.0)
    q, start_EOI = places.quantized, places.place_EOI.double()
    size = shape[-1] // q.scale.shape[-1]
    scale_EOI = q.effective_scale().double().repeat_interleave(size, -1)
    row, column = (x.double() for x in places.curvature.factors(0.1))
    step_EOI = grid_steps(values_of(q), scheme.format).double()
    gradient_EOI = (torch.randn(shape, generator=generator) * 2 * step_EOI * scale_EOI * row * column).float()
    away_EOI = gradient_EOI.double() / (row * column * scale_EOI)
    square_EOI = (away_EOI / step_EOI).square()
    noise = square_EOI.mean(-1, keepdim=True) * square_EOI.mean(-2, keepdim=True)
    noise /= 10 * square_EOI.mean((-2, -1), keepdim=True)
    way = (values_of(q).double() - away_EOI - start_EOI) * 0.15 * 0.6 / (1 + noise)
    expected = start_EOI + way.clamp(-0.1 * step_EOI, 0.1 * step_EOI)
    assert 0.1 < (way.abs() > 0.1 * step_EOI).float().mean() < 0.9
    places.move(gradient_EOI, 0.6)
    assert ((places.place_EOI.double() - expected) / step_EOI).abs().max() < 1e-3


@pytest.mark.parametrize("backend", BOTH)
def test_the_curvature_of_a_quadratic_is_found(backend):
    """Of ½ Σ c w² it is c, which is a row's times a column's here: each probe says so exactly."""
    shape, generator = (1, 6, 64), torch.Generator().manual_seed(0)
    places = places_of(Scheme(FORMATS["int4"], 32), backend, shape, generator)
    row_O, column_I = torch.rand(6, generator=generator) + 0.5, torch.rand(64, generator=generator) + 0.5
    curvature_OI = row_O[:, None] * column_I
    for _ in range(3):
        before = places.weights()
        shaken = places.shaken(generator)
        places.learn((shaken - before) * curvature_OI)
    row_EO1, column_E1I = places.curvature.factors()
    assert torch.allclose((row_EO1 * column_E1I)[0], curvature_OI, rtol=1e-3)


@pytest.mark.parametrize("backend", BOTH)
def test_places_rest_where_each_code_is_best(backend):
    """With a diagonal Hessian every weight ends at its own nearest code, wherever it began."""
    scheme, shape = Scheme(FORMATS["mxfp4"], 32), (1, 8, 64)
    target_EOI = weights(*shape)
    generator = torch.Generator().manual_seed(0)
    q = quantize(target_EOI, scheme)
    off = (torch.rand(shape, generator=generator) - 0.5) * 1.5
    places = Places.of(q, off, backend)
    places.shaken(generator)
    places.learn(places.sign_EOI * (q.effective_scale() * 0.25).repeat_interleave(32, -1))  # curvature 1
    assert not torch.equal(places.ended().codes, q.codes)
    for _ in range(200):
        places.move(places.weights() - target_EOI, 1.0)
    wrong = (places.ended().codes != q.codes).float().mean()
    assert wrong < 0.02, "but for those near the middle between two codes"


@needs_compiler
def test_threads_change_no_bit():
    shape = (2, 1000, 512)  # so many that two threads share them
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(moved(Scheme(FORMATS["int3"], 64), Backend.NATIVE, shape, steps=2)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].place_EOI, found[1].place_EOI)
    assert torch.equal(found[0].log_EOG, found[1].log_EOG)
