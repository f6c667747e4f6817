"""Coordinate descent and scale refits: against naive float64, and monotone row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alphaquant.formats import (
    FORMATS,
    ElementKind,
    Format,
    QuantizedTensor,
    ScaleKind,
    Scheme,
    decode,
    dequantize,
    quantize_with,
    round_scale,
)
from alphaquant.solver import (
    Solution,
    absmax_scales,
    damp,
    factorize,
    grid_steps,
    hessian_loss,
    leanings,
    refine,
    refit_scales,
    round_to_nearest,
    search_scales,
    solve,
)

from . import oracle

DAMPING = 0.02
each_scheme = pytest.mark.parametrize("scheme", oracle.default_schemes(), ids=oracle.scheme_id)
each_scheme_and_group = pytest.mark.parametrize("scheme", oracle.all_schemes(-1, 32), ids=oracle.scheme_id)


def problem(experts: int, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and damped Hessians."""
    h = oracle.hessians(experts, columns, seed=seed)
    return oracle.weights(experts, rows, columns, seed=seed), damp(h, torch.full((experts,), DAMPING))


def rounded(w: Tensor, h: Tensor, scheme: Scheme) -> Solution:
    return round_to_nearest(w, scheme, absmax_scales(w, scheme), h)


def true_loss(w: Tensor, h: Tensor, quantized: QuantizedTensor) -> Tensor:
    error = w.double() - dequantize(quantized).double()
    return torch.stack([oracle.loss(error[e], h[e].double()) for e in range(len(w))])


def tensors_of(quantized: QuantizedTensor) -> list[Tensor]:
    found = (quantized.codes, quantized.scale, quantized.zero, quantized.global_scale)
    return [tensor for tensor in found if tensor is not None]


@each_scheme_and_group
def test_the_loss_rises_in_no_row_and_is_what_it_says(scheme: Scheme) -> None:
    w, h = problem(2, 12, 64)
    starts = [
        rounded(w, h, scheme),
        solve(w, factorize(oracle.hessians(2, 64), torch.full((2,), DAMPING)), scheme, search_scales(w, scheme)),
    ]
    for start in starts:
        before = true_loss(w, h, start.quantized)
        for sweeps in (0, 1, 3):
            after = refine(w, h, start, sweeps=sweeps)
            truth = true_loss(w, h, after.quantized)
            assert (truth <= before * (1 + 1e-5)).all()
            torch.testing.assert_close(after.loss_EO.double(), truth, rtol=1e-4, atol=0)
            if sweeps and start is starts[0]:
                assert truth.sum() < before.sum()


@each_scheme
def test_two_sweeps_are_the_oracles(scheme: Scheme) -> None:
    w, h = problem(2, 12, 64, seed=4)
    found = refine(w, h, rounded(w, h, scheme), sweeps=2)
    for expert in range(2):
        start = oracle.Matrix.of(w, absmax_scales(w, scheme), scheme, expert)
        exact = h[expert].double()
        matrix, values = oracle.refine(start, oracle.plain_rounding(start), exact, sweeps=2)
        parted = (found.quantized.codes[expert] != matrix.codes(values)).any(1)
        assert parted.sum() <= 1
        losses = oracle.loss(matrix.w - values * matrix.step, exact)
        torch.testing.assert_close(found.loss_EO[expert].double()[~parted], losses[~parted], rtol=1e-4, atol=0)
        step = found.quantized.effective_scale()[expert].repeat_interleave(scheme.group_size, 1)
        assert step[~parted].double().equal(matrix.step[~parted])


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int2", "fp4"])
def test_descent_ends_where_no_single_code_can_do_better(name: str) -> None:
    fmt = FORMATS[name]
    scheme = Scheme(fmt, fmt.native_group or 32)
    w, h = problem(1, 6, 32)
    found = rounded(w, h, scheme)
    for _ in range(10):
        found = refine(w, h, found, sweeps=3)
    settled = refine(w, h, found, sweeps=1)
    assert settled.quantized.codes.equal(found.quantized.codes)
    q, step = dequantize(found.quantized)[0].double(), found.quantized.effective_scale()[0].double()
    error = w[0].double() - q
    exact = h[0].double()
    least = oracle.loss(error, exact)
    step = step.repeat_interleave(32 // step.shape[1], 1)
    for value in oracle.grid(fmt):
        change = q - value * step  # of every column, were it alone to take this value
        pull = error @ exact
        new = least[:, None] + 2 * change * pull + change.square() * exact.diagonal()
        assert (new >= least[:, None] * (1 - 1e-5)).all()


def test_the_scale_of_one_group_has_its_closed_form() -> None:
    scheme = Scheme(FORMATS["int3"], -1, scale_dtype=torch.float32)
    w, h = problem(2, 6, 48)
    start = rounded(w, h, scheme)
    found = refit_scales(w, h, start.quantized)
    assert found.codes.equal(start.quantized.codes)
    for expert in range(2):
        codes = start.quantized.codes[expert].double() - 4
        exact = h[expert].double()
        for row in range(6):
            c, row_w = codes[row], w[expert, row].double()
            best = float(c @ exact @ row_w) / float(c @ exact @ c)
            assert float(found.scale[expert, row, 0]) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", [s for s in oracle.default_schemes() if s.format.scale is ScaleKind.MODEL], ids=str)
def test_refitted_scales_are_storable_and_zero_points_stay(scheme: Scheme, dtype: torch.dtype) -> None:
    scheme = Scheme(scheme.format, scheme.group_size, scheme.symmetric, dtype)
    w, h = problem(2, 8, 64)
    start = rounded(w, h, scheme)
    found = refine(w, h, start, sweeps=2).quantized
    assert not found.scale.equal(start.quantized.scale)
    assert found.scale.to(dtype).float().equal(found.scale)
    assert round_scale(found.scale, scheme).equal(found.scale)
    assert (found.scale > 0).all()
    if start.quantized.zero is not None:
        assert found.zero is not None
        assert found.zero.equal(start.quantized.zero)


@pytest.mark.parametrize("scheme", [s for s in oracle.default_schemes() if s.format.native_group], ids=str)
def test_block_formats_keep_their_scales(scheme: Scheme) -> None:
    w, h = problem(2, 8, 64)
    start = rounded(w, h, scheme)
    found = refine(w, h, start, sweeps=2).quantized
    assert not found.codes.equal(start.quantized.codes)
    assert found.scale.equal(start.quantized.scale)
    if start.quantized.global_scale is not None:
        assert found.global_scale is not None
        assert found.global_scale.equal(start.quantized.global_scale)


@each_scheme
def test_nothing_given_is_changed(scheme: Scheme) -> None:
    w, h = problem(2, 4, 64)
    start = rounded(w, h, scheme)
    given = [w, h, start.loss_EO, *tensors_of(start.quantized)]
    before = [tensor.clone() for tensor in given]
    refine(w, h, start, sweeps=4)
    assert all(a.equal(b) for a, b in zip(given, before, strict=True))


@each_scheme
def test_a_batch_is_the_experts_one_by_one(scheme: Scheme) -> None:
    w, h = problem(3, 6, 64)
    together = refine(w, h, rounded(w, h, scheme), sweeps=2)
    for expert in range(3):
        one = slice(expert, expert + 1)
        alone = refine(w[one], h[one], rounded(w[one], h[one], scheme), sweeps=2)
        for a, b in zip(tensors_of(alone.quantized), tensors_of(together.quantized), strict=True):
            assert a.equal(b[one])
        torch.testing.assert_close(alone.loss_EO, together.loss_EO[one], rtol=1e-5, atol=0)


@pytest.mark.parametrize("columns", [16, 40, 72])
def test_blocks_of_the_descent_change_nothing(columns: int) -> None:
    # gradients reach the columns of the same block and those of later and earlier ones
    scheme = Scheme(FORMATS["mxfp4"], 8)
    w, h = problem(1, 8, columns, seed=2)
    start = rounded(w, h, scheme)
    found = refine(w, h, start, sweeps=1)
    matrix = oracle.Matrix.of(w, absmax_scales(w, scheme), scheme)
    _, truth = oracle.refine(matrix, oracle.plain_rounding(matrix), h[0].double(), sweeps=1)
    assert found.quantized.codes[0].equal(matrix.codes(truth))


def test_rows_that_cannot_gain_keep_their_codes_and_scales() -> None:
    scheme = Scheme(FORMATS["int4"], 32, scale_dtype=torch.float32)
    w, h = problem(1, 4, 64)
    scales = absmax_scales(w, scheme)
    exact = dequantize(round_to_nearest(w, scheme, scales).quantized)
    w[:, :2] = exact[:, :2]  # rows without any error
    start = round_to_nearest(w, scheme, scales, h)
    assert start.loss_EO[:, :2].max() == 0
    found = refine(w, h, start, sweeps=3)
    for a, b in zip(tensors_of(found.quantized), tensors_of(start.quantized), strict=True):
        assert a[:, :2].equal(b[:, :2])
    assert (found.loss_EO[:, 2:] < start.loss_EO[:, 2:]).all()


def test_no_sweeps_state_the_loss_and_change_nothing() -> None:
    scheme = Scheme(FORMATS["int4"], 32)
    w, h = problem(2, 4, 64)
    start = rounded(w, h, scheme)
    found = refine(w, h, Solution(start.quantized, torch.full((2, 4), torch.nan)), sweeps=0)
    assert found.quantized.codes.equal(start.quantized.codes)
    torch.testing.assert_close(found.loss_EO, hessian_loss(w - dequantize(start.quantized), h))


def test_a_group_whose_codes_are_all_zero_keeps_its_scale() -> None:
    scheme = Scheme(FORMATS["int4"], 32)
    w, h = problem(1, 3, 64)
    w[:, 1, :32] = 0
    start = rounded(w, h, scheme)
    for found in (refine(w, h, start, sweeps=1).quantized, refit_scales(w, h, start.quantized)):
        assert found.scale[0, 1, 0] == start.quantized.scale[0, 1, 0]
        assert found.scale.isfinite().all()


def test_dead_columns_keep_their_rounded_weight() -> None:
    scheme = Scheme(FORMATS["int4"], 32)
    raw = oracle.hessians(1, 64)
    raw[:, :, 9] = raw[:, 9] = 0
    w, damping = oracle.weights(1, 6, 64), torch.full((1,), DAMPING)
    h = damp(raw, damping)
    start = solve(w, factorize(raw, damping), scheme, absmax_scales(w, scheme))
    found = refine(w, h, start, sweeps=2)
    step = found.quantized.effective_scale()[..., 0]
    assert ((dequantize(found.quantized) - w)[..., 9].abs() <= step * 0.5001).all()


@each_scheme
def test_leanings_are_the_best_places_of_single_weights(scheme: Scheme) -> None:
    w, h = problem(2, 12, 64)
    solution = refine(w, h, rounded(w, h, scheme), sweeps=3)
    q = solution.quantized
    leaning = leanings(w, h, q)
    assert leaning.shape == w.shape
    steps = q.effective_scale().repeat_interleave(64 // q.scale.shape[-1], -1)
    moved = dequantize(q) + leaning.float() * steps
    again = quantize_with(moved, scheme, q.scale, q.zero, q.global_scale)
    assert torch.equal(dequantize(again), dequantize(q)), "they round to the codes that they are from"
    wide = grid_steps(dequantize(q) / steps, scheme.format)
    free = leaning.abs() < 0.48 * wide
    assert free.float().mean() > 0.6, "descent leaves most where they would stay"
    if scheme.format.kind is ElementKind.FLOAT:
        free &= (dequantize(q) / steps).frexp().mantissa.abs() != 0.5  # below a power of two steps are half as wide
    for e, o, i in free.nonzero()[:: max(1, int(free.sum()) // 50)].tolist():
        losses = []
        for off in (-0.02, 0.0, 0.02):
            error = w[e, o].double() - dequantize(q)[e, o].double()
            error[i] -= (float(leaning[e, o, i]) + off * float(wide[e, o, i])) * float(steps[e, o, i])
            losses.append(float(error @ h[e].double() @ error))
        assert losses[1] < min(losses[0], losses[2])


@each_scheme
def test_without_a_hessian_weights_lean_to_where_they_are(scheme: Scheme) -> None:
    w, h = problem(2, 12, 64)
    q = rounded(w, h, scheme).quantized
    steps = q.effective_scale().repeat_interleave(64 // q.scale.shape[-1], -1)
    leaning = leanings(w, None, q).float()
    values = dequantize(q) / steps
    wide = grid_steps(values, scheme.format)
    inside = leaning.abs() < 0.48 * wide
    assert inside.float().mean() > 0.9
    assert ((values + leaning - w / steps) / wide)[inside].abs().max() < 0.01


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt.name != "bf16"], ids=str)
def test_a_grid_step_is_the_way_to_the_next_value_away_from_zero(fmt: Format) -> None:
    values = decode(torch.arange(2**fmt.bits, dtype=torch.uint8), fmt)
    values = values[values.isfinite() & (values >= 0) & (values <= fmt.max_value)].unique()
    steps = grid_steps(values, fmt)
    assert torch.equal(steps[:-1], values.diff())
    assert torch.equal(grid_steps(-values, fmt), steps)
