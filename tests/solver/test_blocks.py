"""Scales that 128 rows share: the walk, the search, refits and the choice between walks, against naive float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alphaquant.formats import FORMATS, QuantizedTensor, Scheme, dequantize, quantize_with
from alphaquant.solver import (
    Backend,
    Effort,
    Method,
    Recipe,
    Solution,
    absmax_scales,
    better_rows,
    damp,
    factorize,
    quantize_stack,
    refine,
    round_to_nearest,
    scales,
    search_scales,
    solve,
)

from . import oracle

SCHEME = Scheme(FORMATS["fp8_block"], 128)
ROWS, COLUMNS = 200, 256  # the second block of rows is cut
DAMPING = 0.02
each_backend = pytest.mark.parametrize("backend", [Backend.AUTO, Backend.TORCH])


def problem(experts: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    w = oracle.weights(experts, ROWS, COLUMNS, seed=seed)
    w[:, 7, 130] = 1.0  # an outlier of one row is the scale of 128
    return w, oracle.hessians(experts, COLUMNS, seed=seed)


def assert_shared(scale_EOG: Tensor, rows: int = ROWS) -> None:
    assert scale_EOG.shape[1] == rows
    for start in range(0, rows, 128):
        part = scale_EOG[:, start : start + 128]
        assert part.equal(part[:, :1].expand_as(part))


def true_loss(w: Tensor, h: Tensor, quantized: QuantizedTensor) -> Tensor:
    error = w.double() - dequantize(quantized).double()
    return torch.stack([oracle.loss(e, h_II.double()) for e, h_II in zip(error, h, strict=True)])


@each_backend
def test_the_walk_is_the_papers_with_the_scales_of_blocks(backend: Backend) -> None:
    w, h = problem()
    found = search_scales(w, SCHEME, backend=backend)
    solution = solve(w, factorize(h, torch.full((2,), DAMPING)), SCHEME, found, backend=backend)
    for expert in range(2):
        matrix = oracle.Matrix.of(w, found, SCHEME, expert)
        truth = oracle.gptq(matrix, oracle.damped(h[expert], DAMPING), act_order=True)
        parted = (solution.quantized.codes[expert] != matrix.codes(truth.values)).any(1)
        assert parted.sum() <= 4  # of 200 rows of 256 decisions each, some of which are nearly ties
        losses = solution.loss_EO[expert].double()
        torch.testing.assert_close(losses[~parted], truth.loss[~parted], rtol=1e-4, atol=0)


def block_errors(w: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    """Weighted squared error of each block `[E, blocks of rows, blocks of columns]`, float64, by plain loops."""
    error = (dequantize(quantize_with(w, SCHEME, scale)).double() - w.double()).square() * importance[:, None].double()
    return torch.stack([torch.stack([b.sum((1, 2)) for b in a.split(128, 2)], -1) for a in error.split(128, 1)], 1)


@each_backend
def test_the_search_finds_the_best_scale_of_each_block(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    w, _ = problem()
    importance = torch.rand(2, COLUMNS, generator=torch.Generator().manual_seed(0)) + 0.1
    found = search_scales(w, SCHEME, importance, backend=backend)
    assert_shared(found.scale)
    errors = block_errors(w, found.scale, importance)
    start = absmax_scales(w, SCHEME).scale
    assert (errors <= block_errors(w, start, importance) * (1 + 1e-5)).all()
    for factor in torch.linspace(0.6, 2.0, 15).tolist():
        other = (start * factor).bfloat16().float()
        assert (errors <= block_errors(w, other, importance) * 1.01).all(), factor
    monkeypatch.setattr(scales, "_CHUNK_WEIGHTS", 3 * COLUMNS)  # fewer rows than a block has
    assert search_scales(w, SCHEME, importance, backend=backend).scale.equal(found.scale)


@each_backend
def test_two_sweeps_are_the_oracles(backend: Backend) -> None:
    scheme = replace(SCHEME, scale_dtype=torch.float32)  # bf16's steps are wider than what is gained over a block
    w, h = problem(1)
    h = damp(h, torch.full((1,), DAMPING))
    start = round_to_nearest(w, scheme, absmax_scales(w, scheme), h)
    found = refine(w, h, start, sweeps=2, backend=backend)
    assert_shared(found.quantized.scale)
    matrix = oracle.Matrix.of(w, absmax_scales(w, scheme), scheme)
    matrix, values = oracle.refine(matrix, oracle.plain_rounding(matrix), h[0].double(), sweeps=2)
    step = found.quantized.scale[0].repeat_interleave(128, 1).double()
    assert (found.quantized.scale != start.quantized.scale).all()
    torch.testing.assert_close(step, matrix.step, rtol=1e-6, atol=0)
    # of 512 decisions a row some are nearly ties, and what follows them in their row parts as well
    assert (found.quantized.codes[0] != matrix.codes(values)).any(1).float().mean() < 0.1
    truth = true_loss(w, h, found.quantized)
    torch.testing.assert_close(found.loss_EO.double(), truth, rtol=1e-4, atol=0)
    assert truth.sum() < 0.9 * true_loss(w, h, start.quantized).sum()


def test_of_two_solutions_each_block_of_rows_is_taken_whole() -> None:
    w, _ = problem(1)
    plain = round_to_nearest(w, SCHEME, absmax_scales(w, SCHEME))
    wide = absmax_scales(w, SCHEME)
    other = round_to_nearest(w, SCHEME, replace(wide, scale=wide.scale * 2))
    losses = torch.ones(1, ROWS), torch.ones(1, ROWS)
    losses[1][:, :127] = 0.5
    losses[1][:, 127] = 70.0  # one row more than makes up for what all the others of its block gain
    losses[1][:, 128:] = 0.5
    losses[1][:, 150] = 10.0
    best = better_rows(*(Solution(s.quantized, loss) for s, loss in zip((plain, other), losses, strict=True)))
    for part, of, loss in ((slice(0, 128), plain, losses[0]), (slice(128, None), other, losses[1])):
        assert best.quantized.scale[:, part].equal(of.quantized.scale[:, part])
        assert best.quantized.codes[:, part].equal(of.quantized.codes[:, part])
        assert best.loss_EO[:, part].equal(loss[:, part])


@pytest.mark.parametrize("effort", Effort)
@pytest.mark.parametrize("method", Method)
def test_a_stack_keeps_its_blocks_whatever_is_solved_together(effort: Effort, method: Method) -> None:
    w, h = problem(3)
    effective = torch.tensor([400.0, 2.0, 400.0], dtype=torch.float64)  # the second one is rounded to nearest
    recipe = Recipe(effort=effort, method=method)
    whole = quantize_stack(w, h, effective, SCHEME, recipe)
    assert_shared(whole.quantized.scale)
    assert whole.fallback_E.tolist() == [False, method is Method.GPTQ, False]
    for workspace in (5 * COLUMNS, COLUMNS * COLUMNS):
        parts = quantize_stack(w, h, effective, SCHEME, recipe, workspace)
        assert parts.quantized.sha256() == whole.quantized.sha256()
    for expert in (0, 2):
        damped = oracle.damped(h[expert], float(whole.damping_E[expert]) or 0.1 * COLUMNS / 400)
        truth = oracle.loss(w[expert].double() - dequantize(whole.quantized)[expert].double(), damped)
        torch.testing.assert_close(whole.loss_EO[expert].double(), truth, rtol=5e-4, atol=0)


def test_more_effort_loses_less_and_all_beat_rounding() -> None:
    w, h = problem(2)
    effective = torch.full((2,), 4000.0, dtype=torch.float64)
    recipes = [*(Recipe(effort=effort) for effort in reversed(Effort)), Recipe(method=Method.RTN)]
    losses = [float(quantize_stack(w, h, effective, SCHEME, recipe).loss_EO.sum()) for recipe in recipes]
    assert losses == sorted(losses)
    assert losses[2] < 0.8 * losses[3]
