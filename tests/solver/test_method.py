"""The whole method on a stack: parts change nothing, thin evidence falls back, records say what happened."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alphaquant.formats import FORMATS, ScaleKind, Scheme, dequantize, matrix_scale, round_scale
from alphaquant.numerics import rough_product
from alphaquant.solver import (
    Effort,
    Method,
    Outcome,
    Recipe,
    Scales,
    Solution,
    absmax_scales,
    better_rows,
    damp,
    factorize,
    hessian_loss,
    moved,
    quantize_stack,
    refine,
    refit_scales,
    round_to_nearest,
    search_scales,
    solve,
)

from . import oracle

EXPERTS, ROWS, COLUMNS = 5, 12, 64
ENOUGH = 400.0
each_scheme = pytest.mark.parametrize("scheme", oracle.default_schemes(), ids=oracle.scheme_id)
some_schemes = pytest.mark.parametrize(
    "scheme",
    [
        Scheme(FORMATS["int3"], 32),
        Scheme(FORMATS["int4"], -1, symmetric=False),
        Scheme(FORMATS["mxfp4"], 32),
        Scheme(FORMATS["nvfp4"], 16),
    ],
    ids=oracle.scheme_id,
)
each_effort = pytest.mark.parametrize("effort", Effort)


def stack(experts: int = EXPERTS, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, mean Hessians, effective sample sizes."""
    return (
        oracle.weights(experts, rows, columns),
        oracle.hessians(experts, columns),
        torch.full((experts,), ENOUGH, dtype=torch.float64),
    )


def best_rounding(w: Tensor, scheme: Scheme, importance: Tensor, h: Tensor) -> Solution:
    """Row by row the better of absmax scales and searched ones; the search must win to be taken."""
    absmax = round_to_nearest(w, scheme, absmax_scales(w, scheme), h)
    searched = round_to_nearest(w, scheme, search_scales(w, scheme, importance), h)
    codes, scale = absmax.quantized.codes.clone(), absmax.quantized.scale.clone()
    loss = absmax.loss_EO.clone()
    for expert in range(w.shape[0]):
        for row in range(w.shape[1]):
            if searched.loss_EO[expert, row] < absmax.loss_EO[expert, row]:
                codes[expert, row] = searched.quantized.codes[expert, row]
                scale[expert, row] = searched.quantized.scale[expert, row]
                loss[expert, row] = searched.loss_EO[expert, row]
    return Solution(replace(absmax.quantized, codes=codes, scale=scale), loss)


TOKENS = (None, 0, 2, 1, 15)  # plenty, none, just enough (a 32nd of the inputs), too few, few
STARVED = [1, 3]


def starved() -> tuple[Tensor, Tensor, Tensor]:
    """Experts that saw as many tokens as `TOKENS` says."""
    w, h, effective = stack()
    generator = torch.Generator().manual_seed(3)
    for expert, tokens in enumerate(TOKENS):
        if tokens is not None:
            x = torch.randn(tokens, COLUMNS, generator=generator)
            h[expert] = x.T @ x / max(tokens, 1)
            effective[expert] = tokens
    return w, h, effective


def tensors_of(outcome: Outcome) -> dict[str, Tensor]:
    names = ("loss_EO", "energy_EO", "damping_E", "retries_E", "fallback_E")
    found = {name: getattr(outcome, name) for name in names}
    found |= {name: getattr(outcome.quantized, name) for name in ("codes", "scale", "zero", "global_scale")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_same(a: Outcome, b: Outcome) -> None:
    """Equal codes, scales and records; losses may differ in their last bits where sums run in another order."""
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        if name in ("loss_EO", "energy_EO"):
            torch.testing.assert_close(tensor, right[name], rtol=1e-4, atol=0)
        else:
            assert tensor.equal(right[name]), name


@each_effort
@some_schemes
def test_parts_of_experts_and_rows_change_nothing(scheme: Scheme, effort: Effort) -> None:
    w, h, effective = starved()
    w[:, 3] *= 7  # the rows of a matrix share one NVFP4 scale: it must come from all of them
    recipe = Recipe(effort=effort)
    whole = quantize_stack(w, h, effective, scheme, recipe)
    rounded = quantize_stack(w, None, None, scheme, recipe)
    for workspace in (5 * COLUMNS, 2 * COLUMNS * COLUMNS):
        assert_same(quantize_stack(w, h, effective, scheme, recipe, workspace), whole)
        assert_same(quantize_stack(w, None, None, scheme, recipe, workspace), rounded)


@some_schemes
def test_experts_do_not_know_each_other(scheme: Scheme) -> None:
    w, h, effective = starved()
    whole = tensors_of(quantize_stack(w, h, effective, scheme, Recipe()))
    for expert in range(EXPERTS):
        one = slice(expert, expert + 1)
        alone = quantize_stack(w[one], h[one], effective[one], scheme, Recipe())
        for name, tensor in tensors_of(alone).items():
            assert tensor.equal(whole[name][one]), (expert, name)


@each_effort
@each_scheme
def test_starved_experts_are_rounded_and_recorded(scheme: Scheme, effort: Effort) -> None:
    w, h, effective = starved()
    recipe = Recipe(effort=effort, damping=0.02, damping_evidence=0.2)
    outcome = quantize_stack(w, h, effective, scheme, recipe)
    assert outcome.fallback_E.nonzero()[:, 0].tolist() == STARVED
    used = [0.2 * COLUMNS / ENOUGH, 0, 0.2 * COLUMNS / 2, 0, 0.2 * COLUMNS / 15]
    assert outcome.damping_E.tolist() == pytest.approx(used)
    assert outcome.retries_E.tolist() == [0] * EXPERTS
    for name, tensor in tensors_of(outcome).items():
        assert tensor.isfinite().all(), name
    for expert in STARVED:
        one = slice(expert, expert + 1)
        trusted = damp(h[one], 0.2 * COLUMNS / effective[one].clamp_min(1).float())
        importance = trusted.diagonal(dim1=1, dim2=2)
        plain = round_to_nearest(w[one], scheme, absmax_scales(w[one], scheme), trusted)
        if effort is not Effort.FAST:
            plain = best_rounding(w[one], scheme, importance, trusted)
        assert outcome.quantized.codes[one].equal(plain.quantized.codes)
        assert outcome.quantized.scale[one].equal(plain.quantized.scale)
        torch.testing.assert_close(outcome.loss_EO[one], plain.loss_EO)


def test_the_line_of_the_fallback_is_the_recipes() -> None:
    w, h, effective = starved()
    scheme = Scheme(FORMATS["int4"], 32)
    for share, expected in ((0.0, [0, 0, 0, 0, 0]), (0.01, [0, 1, 0, 0, 0]), (0.1, [0, 1, 1, 1, 0])):
        outcome = quantize_stack(w, h, effective, scheme, Recipe(rtn_below=share))
        assert outcome.fallback_E.tolist() == [bool(value) for value in expected]
        assert (outcome.damping_E == 0).tolist() == [bool(value) for value in expected]


@each_effort
@each_scheme
def test_well_fed_experts_go_through_the_steps_of_their_effort(scheme: Scheme, effort: Effort) -> None:
    w, h, effective = stack(2)
    outcome = quantize_stack(w, h, effective, scheme, Recipe(effort=effort))
    damping = torch.full((2,), 0.1 * COLUMNS / ENOUGH)
    damped = damp(h, damping)
    scales = absmax_scales(w, scheme) if effort is Effort.FAST else search_scales(w, scheme)
    factor = factorize(h, damping)
    expected = solve(w, factor, scheme, scales)
    if effort is not Effort.FAST:
        shifts, refits, sweeps = ((1,), 1, 2) if effort is Effort.DEFAULT else ((1, -1), 3, 6)
        first = expected
        for shift in shifts if scheme.format.scale is not ScaleKind.E8M0 else ():
            scale = round_scale(scales.scale * (1 + shift * 0.6 / 2**scheme.format.bits), scheme)
            expected = better_rows(expected, solve(w, factor, scheme, replace(scales, scale=scale)))
        for _ in range(refits if scheme.format.scale is ScaleKind.MODEL else 0):
            refitted = refit_scales(w, damped, expected.quantized, rough_product)
            again = Scales(refitted.scale, refitted.zero, refitted.global_scale)
            expected = better_rows(expected, solve(w, factor, scheme, again))
        assert (expected.loss_EO <= first.loss_EO).all()
        expected = refine(w, damped, expected, sweeps=sweeps)
    assert outcome.quantized.codes.equal(expected.quantized.codes)
    assert outcome.quantized.scale.equal(expected.quantized.scale)
    assert not outcome.fallback_E.any()
    assert outcome.damping_E.tolist() == pytest.approx(damping.tolist())


@each_scheme
def test_loss_and_energy_are_those_of_the_damped_hessian(scheme: Scheme) -> None:
    w, h, effective = stack()
    h[1, :, 3] = h[1, 3, :] = 0
    outcome = quantize_stack(w, h, effective, scheme, Recipe())
    for expert in range(EXPERTS):
        damped = oracle.damped(h[expert], float(outcome.damping_E[expert]))
        error = w[expert].double() - dequantize(outcome.quantized)[expert].double()
        loss, energy = oracle.loss(error, damped), oracle.loss(w[expert].double(), damped)
        torch.testing.assert_close(outcome.loss_EO[expert].double(), loss, rtol=5e-4, atol=0)
        # a product in bf16 where a CPU has AMX
        torch.testing.assert_close(outcome.energy_EO[expert].double(), energy, rtol=2e-2, atol=0)
        torch.testing.assert_close(outcome.energy_EO[expert].double().sum(), energy.sum(), rtol=4e-3, atol=0)


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "mxfp4", "nvfp4", "fp4"])
def test_more_effort_loses_less_and_all_beat_rounding(name: str) -> None:
    fmt = FORMATS[name]
    scheme = Scheme(fmt, fmt.native_group or 32)
    w, h, effective = stack(4, 32)
    losses = []
    recipes = [Recipe(effort=effort) for effort in (Effort.BEST, Effort.DEFAULT, Effort.FAST)]
    for recipe in [*recipes, Recipe(method=Method.RTN), Recipe(method=Method.RTN, effort=Effort.FAST)]:
        outcome = quantize_stack(w, h, effective, scheme, recipe)
        assert outcome.quantized.scheme == scheme
        losses.append(float(outcome.loss_EO.sum()))
    assert losses[:3] == sorted(losses[:3])
    assert losses[2] < 0.8 * min(losses[3:])


@each_scheme
def test_plain_rounding_needs_no_calibration_and_is_no_fallback(scheme: Scheme) -> None:
    w, h, effective = stack()
    blind = quantize_stack(w, None, None, scheme, Recipe())
    assert not blind.fallback_E.any()
    scales = search_scales(w, scheme)
    plain = round_to_nearest(w, scheme, scales)
    assert blind.quantized.codes.equal(plain.quantized.codes)
    torch.testing.assert_close(blind.loss_EO, (w - dequantize(plain.quantized)).square().sum(-1))
    torch.testing.assert_close(blind.energy_EO, w.square().sum(-1))
    chosen = quantize_stack(w, h, effective, scheme, Recipe(method=Method.RTN))
    assert not chosen.fallback_E.any()
    assert chosen.damping_E.tolist() == [0] * EXPERTS
    damped = damp(h, torch.full((EXPERTS,), 0.1 * COLUMNS / ENOUGH))
    scales = search_scales(w, scheme, damped.diagonal(dim1=1, dim2=2))
    expected = best_rounding(w, scheme, damped.diagonal(dim1=1, dim2=2), damped)
    assert chosen.quantized.codes.equal(expected.quantized.codes)
    searched = round_to_nearest(w, scheme, scales, damped).loss_EO
    assert (chosen.loss_EO <= searched).all()
    assert (chosen.loss_EO <= round_to_nearest(w, scheme, absmax_scales(w, scheme), damped).loss_EO).all()
    torch.testing.assert_close(chosen.loss_EO, hessian_loss(w - dequantize(chosen.quantized), damped))


@some_schemes
def test_order_and_block_size_reach_the_walk(scheme: Scheme) -> None:
    w, h, effective = stack()
    recipe = Recipe(effort=Effort.FAST)
    ordered = quantize_stack(w, h, effective, scheme, recipe)
    natural = quantize_stack(w, h, effective, scheme, replace(recipe, act_order=False))
    assert not natural.quantized.codes.equal(ordered.quantized.codes)
    for act_order, expected in ((True, ordered), (False, natural)):
        small = quantize_stack(w, h, effective, scheme, replace(recipe, act_order=act_order, block_size=16))
        assert small.quantized.codes.equal(expected.quantized.codes)


def test_damping_follows_the_evidence_but_never_below_its_floor() -> None:
    w, h, effective = stack()
    effective[:] = torch.tensor([32.0, 64.0, 640.0, 6400.0, 64000.0])
    outcome = quantize_stack(w, h, effective, Scheme(FORMATS["int4"], 32), Recipe(damping=0.005))
    assert outcome.damping_E.tolist() == pytest.approx([0.2, 0.1, 0.01, 0.005, 0.005])
    recipe = Recipe(damping=0.005, tuned_damping=0.05)
    tuned = quantize_stack(w, h, effective, Scheme(FORMATS["int4"], 32), recipe, leans=True)
    assert tuned.damping_E.tolist() == pytest.approx([0.2, 0.1, 0.05, 0.05, 0.05])


def test_retries_and_the_damping_that_was_used_are_recorded() -> None:
    w, h, effective = stack(3)
    x = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(0))
    h[1] = x.T @ x / 8
    h[1].diagonal().mul_(1 - 1e-4)
    recipe = Recipe(damping=0.0, damping_evidence=0.0)
    outcome = quantize_stack(w, h, effective, Scheme(FORMATS["int4"], 32), recipe)
    assert outcome.retries_E[1] > 0
    assert outcome.retries_E[[0, 2]].tolist() == [0, 0]
    assert outcome.damping_E[1] > 0
    assert outcome.damping_E[[0, 2]].tolist() == [0, 0]
    assert not outcome.fallback_E.any()
    error = w - dequantize(outcome.quantized)
    for expert in range(3):
        damped = oracle.damped(h[expert], float(outcome.damping_E[expert]))
        truth = oracle.loss(error[expert].double(), damped)
        torch.testing.assert_close(outcome.loss_EO[expert].double(), truth, rtol=1e-3, atol=0)


@each_effort
@some_schemes
def test_nothing_given_is_changed_and_repeats_are_identical(scheme: Scheme, effort: Effort) -> None:
    w, h, effective = starved()
    given = [w, h, effective]
    before = [tensor.clone() for tensor in given]
    first = tensors_of(quantize_stack(w, h, effective, scheme, Recipe(effort=effort)))
    assert all(a.equal(b) for a, b in zip(given, before, strict=True))
    second = tensors_of(quantize_stack(w, h, effective, scheme, Recipe(effort=effort)))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


@some_schemes
def test_weights_may_be_bf16(scheme: Scheme) -> None:
    w, h, effective = stack()
    w = w.bfloat16()
    assert_same(
        quantize_stack(w, h, effective, scheme, Recipe()), quantize_stack(w.float(), h, effective, scheme, Recipe())
    )


def test_nvfp4_has_one_scale_for_each_matrix() -> None:
    w, h, effective = starved()
    outcome = quantize_stack(w, h, effective, Scheme(FORMATS["nvfp4"], 16), Recipe())
    assert outcome.quantized.global_scale is not None
    assert outcome.quantized.global_scale.equal(matrix_scale(w))


def test_one_plain_matrix_is_a_stack_of_one() -> None:
    w, h, effective = stack(1)
    outcome = quantize_stack(w, h, effective, Scheme(FORMATS["int4"], 32), Recipe())
    assert outcome.quantized.codes.shape == (1, ROWS, COLUMNS)
    assert outcome.loss_EO.shape == outcome.energy_EO.shape == (1, ROWS)


def paired(experts: int = EXPERTS, columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Correlated inputs and the original's in their place `[E, R, I]`, their mean Hessians and shifts."""
    generator = torch.Generator().manual_seed(5)
    mix, bend = torch.randn(2, columns, columns, generator=generator) / columns**0.5
    original = torch.randn(experts, 6 * columns, columns, generator=generator) @ mix
    x = original + 0.3 * original @ bend + 0.1 * torch.randn(original.shape, generator=generator)
    rows = x.shape[1]
    return x, original, x.mT @ x / rows, (original - x).mT @ x / rows


@pytest.mark.parametrize("act_order", [False, True])
def test_weights_move_to_the_least_squares_of_the_originals_outputs(*, act_order: bool) -> None:
    x, original, h, shift = paired()
    w = oracle.weights(EXPERTS, ROWS, COLUMNS)
    factor = factorize(h, torch.zeros(EXPERTS), act_order=act_order)
    whole = moved(w, shift, factor, 1.0)
    truth = torch.linalg.lstsq(x.double(), original.double() @ w.double().mT).solution.mT
    assert float((whole - truth).abs().max()) < 2e-3 * float(truth.abs().max())
    assert torch.allclose(moved(w, shift, factor, 0.25), w + (whole - w) / 4, atol=1e-4)
    x_EOI = torch.randn(EXPERTS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(factor.divided(x_EOI) @ h, x_EOI, atol=1e-2)


@each_scheme
@pytest.mark.parametrize("moves", [False, True])
def test_what_is_lost_before_is_made_up_for(*, scheme: Scheme, moves: bool) -> None:
    columns = max(COLUMNS, scheme.group_size)
    x, original, h, shift = paired(columns=columns)
    w = oracle.weights(EXPERTS, 16, columns)
    plenty = torch.full((EXPERTS,), 1e6, dtype=torch.float64)
    recipe = Recipe(asymmetric_target=1.0)

    def error(shift: Tensor | None) -> Tensor:
        outcome = quantize_stack(w, h, plenty, scheme, recipe, shift_EII=shift, moves=moves)
        made = (x * outcome.scale_EI[:, None]) @ dequantize(outcome.quantized).mT
        return (made - original @ w.mT).square().sum((1, 2))

    assert bool((error(shift) < error(None)).all())


def test_what_is_rounded_to_nearest_stays_where_it_is() -> None:
    _, _, h, shift = paired()
    w = oracle.weights(EXPERTS, ROWS, COLUMNS)
    seen = torch.tensor([ENOUGH, 0, 1, ENOUGH, 1], dtype=torch.float64)
    scheme, recipe = Scheme(FORMATS["int4"], 32), Recipe(asymmetric_target=1.0)
    plain = quantize_stack(w, h, seen, scheme, recipe)
    target = quantize_stack(w, h, seen, scheme, recipe, shift_EII=shift)
    same = (plain.quantized.codes == target.quantized.codes).flatten(1).all(1)
    assert same.tolist() == plain.fallback_E.tolist() == [False, True, True, False, True]
