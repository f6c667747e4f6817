"""The batched walk against the float64 oracle, and what must hold whatever the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alphaquant.formats import FORMATS, Scheme, dequantize, quantize_with
from alphaquant.solver import (
    Factor,
    Scales,
    Solution,
    absmax_scales,
    damp,
    factorize,
    hessian_loss,
    round_to_nearest,
    search_scales,
    shrink,
    solve,
)

from . import oracle

EXPERTS, ROWS, COLUMNS = 2, 24, 128
DAMPING = 0.01

each_scheme = pytest.mark.parametrize("scheme", oracle.default_schemes(), ids=oracle.scheme_id)
each_scheme_and_group = pytest.mark.parametrize("scheme", oracle.all_schemes(-1, 32, 64), ids=oracle.scheme_id)
each_order = pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "natural"])


def damping(experts: int, value: float = DAMPING) -> Tensor:
    return torch.full((experts,), value)


def solved(
    w: Tensor, h: Tensor, scheme: Scheme, *, act_order: bool = True, block_size: int = 128, value: float = DAMPING
) -> Solution:
    factor = factorize(h, damping(len(h), value), act_order=act_order)
    return solve(w, factor, scheme, absmax_scales(w, scheme), block_size)


def same(a: Solution, b: Solution) -> bool:
    pairs = [(a.loss_EO, b.loss_EO), (a.quantized.codes, b.quantized.codes), (a.quantized.scale, b.quantized.scale)]
    return all(x.equal(y) for x, y in pairs)


@each_order
@each_scheme_and_group
def test_codes_and_losses_are_those_of_the_paper(scheme: Scheme, act_order: bool) -> None:  # noqa: FBT001
    w, h = oracle.weights(EXPERTS, ROWS, COLUMNS), oracle.hessians(EXPERTS, COLUMNS)
    scales = absmax_scales(w, scheme)
    solution = solve(w, factorize(h, damping(EXPERTS), act_order=act_order), scheme, scales)
    for expert in range(EXPERTS):
        matrix = oracle.Matrix.of(w, scales, scheme, expert)
        truth = oracle.gptq(matrix, oracle.damped(h[expert], DAMPING), act_order=act_order)
        # one decision near a tie changes what follows in its row: count the rows that part, not the codes
        parted = (solution.quantized.codes[expert] != matrix.codes(truth.values)).any(1)
        assert parted.sum() <= 1
        losses = solution.loss_EO[expert].double()
        torch.testing.assert_close(losses[~parted], truth.loss[~parted], rtol=1e-4, atol=0)
        torch.testing.assert_close(losses[parted], truth.loss[parted], rtol=0.2, atol=0)


@each_order
@each_scheme
def test_codes_are_exactly_those_of_the_paper_where_nothing_is_near_a_tie(scheme: Scheme, act_order: bool) -> None:  # noqa: FBT001
    size = 32
    h = oracle.hessians(1, size, seed=3)
    for seed in range(20):
        w = oracle.weights(1, 3, size, seed=seed)
        scales = absmax_scales(w, scheme)
        matrix = oracle.Matrix.of(w, scales, scheme)
        truth = oracle.gptq(matrix, oracle.damped(h[0], DAMPING), act_order=act_order)
        if truth.margin > 1e-4:
            break
    assert truth.margin > 1e-4, "no seed keeps its distance from ties"
    solution = solve(w, factorize(h, damping(1), act_order=act_order), scheme, scales)
    assert solution.quantized.codes[0].equal(matrix.codes(truth.values))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", ["int3", "nvfp4"])
def test_a_batch_of_experts_is_the_experts_one_by_one_bit_for_bit(name: str, act_order: bool) -> None:  # noqa: FBT001
    scheme = Scheme(FORMATS[name], FORMATS[name].native_group or 32)
    w, h = oracle.weights(5, 40, 160), oracle.hessians(5, 160, tokens=400)
    together = solved(w, h, scheme, act_order=act_order)
    for expert in range(5):
        one = slice(expert, expert + 1)
        alone = solved(w[one], h[one], scheme, act_order=act_order)
        assert alone.loss_EO.equal(together.loss_EO[one])
        assert alone.quantized.codes.equal(together.quantized.codes[one])
        assert alone.quantized.scale.equal(together.quantized.scale[one])


@each_order
@pytest.mark.parametrize("columns", [96, 300], ids=["below-a-block", "odd-last-block"])
def test_block_size_changes_no_code(columns: int, act_order: bool) -> None:  # noqa: FBT001
    # local instead of global column indices in the block update cost others half of GPTQ's gain, silently
    scheme = Scheme(FORMATS["int4"], 12)
    w, h = oracle.weights(2, 16, columns), oracle.hessians(2, columns)
    scales = absmax_scales(w, scheme)
    codes = [
        solved(w, h, scheme, act_order=act_order, block_size=block).quantized.codes for block in (16, 32, 128, 1000)
    ]
    truth = [
        oracle.gptq(
            oracle.Matrix.of(w, scales, scheme, expert), oracle.damped(h[expert], DAMPING), act_order=act_order
        ).values
        for expert in range(2)
    ]
    expected = torch.stack([oracle.Matrix.of(w, scales, scheme, e).codes(values) for e, values in enumerate(truth)])
    for found in codes:
        assert found.equal(expected)


@each_order
@each_scheme_and_group
def test_a_diagonal_hessian_is_plain_rounding(scheme: Scheme, act_order: bool) -> None:  # noqa: FBT001
    w = oracle.weights(2, 8, 64)
    diagonal = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) + 0.01
    for value in (0.0, 0.01, 1.0):
        solution = solved(w, torch.diag_embed(diagonal), scheme, act_order=act_order, value=value)
        scales = absmax_scales(w, scheme)
        plain = quantize_with(w, scheme, scales.scale, scales.zero, scales.global_scale)
        assert solution.quantized.codes.equal(plain.codes)


@each_scheme
def test_plain_rounding_is_the_oracles(scheme: Scheme) -> None:
    w = oracle.weights(2, 8, 64)
    scales = absmax_scales(w, scheme)
    h = oracle.hessians(2, 64)
    solution = round_to_nearest(w, scheme, scales, h)
    for expert in range(2):
        matrix = oracle.Matrix.of(w, scales, scheme, expert)
        values = oracle.plain_rounding(matrix)
        assert solution.quantized.codes[expert].equal(matrix.codes(values))
        truth = oracle.loss(matrix.w - values * matrix.step, h[expert].double())
        torch.testing.assert_close(solution.loss_EO[expert].double(), truth, rtol=1e-4, atol=0)
    squared = (w - dequantize(solution.quantized)).square().sum(-1)
    torch.testing.assert_close(round_to_nearest(w, scheme, scales).loss_EO, squared)


@each_scheme_and_group
def test_error_feedback_beats_plain_rounding_on_correlated_inputs(scheme: Scheme) -> None:
    w, h = oracle.weights(2, 16, 64, seed=5), oracle.hessians(2, 64, correlation=0.8)
    damped = damp(h, damping(2))
    scales = absmax_scales(w, scheme)
    plain = round_to_nearest(w, scheme, scales, damped).loss_EO.sum(1)
    walked = solved(w, h, scheme).loss_EO.sum(1)
    assert (walked < 0.8 * plain).all()


@each_order
@each_scheme
def test_the_reported_loss_is_that_of_the_dequantized_weights(scheme: Scheme, act_order: bool) -> None:  # noqa: FBT001
    w, h = oracle.weights(3, 8, 96), oracle.hessians(3, 96)
    h[1, :, 7] = h[1, 7, :] = 0
    solution = solved(w, h, scheme, act_order=act_order)
    for expert in range(3):
        error = w[expert].double() - dequantize(solution.quantized)[expert].double()
        truth = oracle.loss(error, oracle.damped(h[expert], DAMPING))
        torch.testing.assert_close(solution.loss_EO[expert].double(), truth, rtol=2e-4, atol=0)


def test_the_loss_of_a_hessian_is_a_quadratic_form_a_row() -> None:
    error, h = oracle.weights(2, 4, 32), oracle.hessians(2, 32)
    truth = torch.stack([oracle.loss(error[e].double(), h[e].double()) for e in range(2)])
    torch.testing.assert_close(hessian_loss(error, h).double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(hessian_loss(error, None), error.square().sum(-1))


@each_order
@each_scheme
def test_dead_columns_are_plainly_rounded_and_disturb_nobody(scheme: Scheme, act_order: bool) -> None:  # noqa: FBT001
    dead = [0, 5, 63]
    w, h = oracle.weights(1, 8, 64), oracle.hessians(1, 64)
    h[:, dead], h[:, :, dead] = 0, 0
    scales = absmax_scales(w, scheme)
    solution = solve(w, factorize(h, damping(1), act_order=act_order), scheme, scales)
    assert solution.loss_EO.isfinite().all()
    assert dequantize(solution.quantized).isfinite().all()
    plain = round_to_nearest(w, scheme, scales).quantized.codes
    assert solution.quantized.codes[..., dead].equal(plain[..., dead])
    # a dead column's weight may be anything: the living ones keep their codes
    other = w.clone()
    other[..., dead] *= -0.9
    again = solve(other, factorize(h, damping(1), act_order=act_order), scheme, scales)
    living = [j for j in range(64) if j not in dead]
    assert again.quantized.codes[..., living].equal(solution.quantized.codes[..., living])


@each_scheme
def test_an_expert_without_tokens_is_plainly_rounded_among_others(scheme: Scheme) -> None:
    w, h = oracle.weights(3, 8, 64), oracle.hessians(3, 64)
    h[1] = 0
    scales = absmax_scales(w, scheme)
    factor = factorize(h, damping(3))
    solution = solve(w, factor, scheme, scales)
    plain = round_to_nearest(w, scheme, scales).quantized.codes
    assert solution.quantized.codes[1].equal(plain[1])
    assert solution.loss_EO.isfinite().all()
    assert factor.retries_E.tolist() == [0, 0, 0]
    for expert in (0, 2):
        assert not solution.quantized.codes[expert].equal(plain[expert])


def test_an_expert_with_one_token_is_finite_and_better_than_plain_rounding() -> None:
    scheme = Scheme(FORMATS["int4"], 32)
    w = oracle.weights(2, 8, 64)
    x = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    h = x.transpose(1, 2) @ x
    scales = absmax_scales(w, scheme)
    factor = factorize(h, damping(2))
    solution = solve(w, factor, scheme, scales)
    assert factor.feedback_EII.isfinite().all()
    assert (solution.loss_EO < round_to_nearest(w, scheme, scales, damp(h, damping(2))).loss_EO).all()


def test_a_singular_hessian_is_damped_more_and_the_retries_are_counted() -> None:
    scheme = Scheme(FORMATS["int4"], 32)
    w = oracle.weights(3, 8, 64)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    h = oracle.hessians(3, 64)
    h[1] = x.T @ x / 8
    h[1].diagonal().mul_(1 - 1e-4)  # below the border of the positive definite: no rounding error can save it
    before, asked = h.clone(), damping(3, 0.0)
    factor = factorize(h, asked)
    assert h.equal(before)
    assert asked.equal(damping(3, 0.0))
    assert factor.retries_E[1] > 0
    assert factor.retries_E[[0, 2]].tolist() == [0, 0]
    assert factor.damping_E[1] > 0
    assert factor.damping_E[[0, 2]].tolist() == [0, 0]
    assert factor.curvature_EI.isfinite().all()
    assert (factor.curvature_EI > 0).all()
    scales = absmax_scales(w, scheme)
    solution = solve(w, factor, scheme, scales)
    used = damp(h, factor.damping_E)
    assert (solution.loss_EO < round_to_nearest(w, scheme, scales, used).loss_EO).all()
    torch.testing.assert_close(
        solution.loss_EO, hessian_loss(w - dequantize(solution.quantized), used), rtol=1e-3, atol=0
    )


def test_damping_is_raised_tenfold_from_where_it_was() -> None:
    h = oracle.hessians(2, 32)
    h[0].diagonal().sub_(0.05 * h[0].diagonal().mean())
    eigenvalues = torch.linalg.eigvalsh(h[0].double())
    assert eigenvalues[0] < 0
    factor = factorize(h, damping(2, 1e-3))
    assert factor.retries_E[0] > 0
    assert factor.damping_E[0] == pytest.approx(1e-3 * 10.0 ** int(factor.retries_E[0]))
    assert factor.damping_E[1] == pytest.approx(1e-3)


@pytest.mark.parametrize("at", [5, 150, 299])
def test_what_is_not_definite_is_found_in_every_block(at: int) -> None:
    h = oracle.hessians(3, 300)
    sound = factorize(h, damping(3), act_order=False)
    h[1, at, at] = h[1].diagonal().mean() * 1e-5
    factor = factorize(h, damping(3), act_order=False)
    assert factor.retries_E[1] > 0
    assert factor.curvature_EI[1].isfinite().all()
    for expert in (0, 2):
        assert factor.retries_E[expert] == 0
        assert factor.feedback_EII[expert].equal(sound.feedback_EII[expert])


def test_a_hopeless_hessian_becomes_its_diagonal() -> None:
    scheme = Scheme(FORMATS["int4"], 32)
    h = torch.full((1, 32, 32), 100.0)
    h.diagonal(dim1=1, dim2=2).fill_(0.001)
    w = oracle.weights(1, 4, 32)
    factor = factorize(h, damping(1))
    assert factor.retries_E[0] == 5
    assert factor.feedback_EII[0].equal(torch.eye(32))
    scales = absmax_scales(w, scheme)
    solution = solve(w, factor, scheme, scales)
    assert solution.quantized.codes.equal(round_to_nearest(w, scheme, scales).quantized.codes)
    assert solution.loss_EO.isfinite().all()


def test_correlations_shrink_by_how_little_stands_behind_them() -> None:
    h, effective = oracle.hessians(4, 48), torch.tensor([0.0, 6.0, 18.0, 6e9], dtype=torch.float64)
    before = h.clone()
    found = shrink(h, effective, 6.0)
    assert h.equal(before)
    assert found.diagonal(dim1=1, dim2=2).equal(h.diagonal(dim1=1, dim2=2))
    off = ~torch.eye(48, dtype=torch.bool)
    for expert, trust in enumerate((0.0, 0.5, 0.75, 1.0)):
        torch.testing.assert_close(found[expert][off], trust * h[expert][off])
    assert shrink(h, effective, 0.0).equal(h)


@each_order
@pytest.mark.parametrize("size", [48, 300], ids=["one block", "three blocks"])
def test_the_factor_multiplies_back_to_the_damped_hessian(act_order: bool, size: int) -> None:  # noqa: FBT001
    h = oracle.hessians(3, size)
    h[2, :, 4] = h[2, 4, :] = 0
    values = torch.tensor([0.0, 0.01, 0.3])
    factor = factorize(h, values, act_order=act_order)
    for expert in range(3):
        truth = oracle.damped(h[expert], float(values[expert]))
        torch.testing.assert_close(damp(h, values)[expert].double(), truth, rtol=1e-6, atol=1e-7)
        order = factor.order_EI[expert]
        assert order.sort().values.equal(torch.arange(size))
        feedback, curvature = factor.feedback_EII[expert].double(), factor.curvature_EI[expert].double()
        assert feedback.triu().equal(feedback)
        assert feedback.diagonal().equal(torch.ones(size, dtype=torch.float64))
        product = feedback @ torch.diag(curvature) @ feedback.T
        torch.testing.assert_close(product, truth[order][:, order], rtol=1e-4, atol=1e-5)
        if act_order:
            walked = h[expert].diagonal()[order]
            assert (walked[1:] <= walked[:-1]).all()
        else:
            assert order.equal(torch.arange(size))


def test_equal_diagonals_are_walked_in_natural_order() -> None:
    h = torch.ones(1, 40, 40) * 0.1
    h.diagonal(dim1=1, dim2=2).fill_(1.0)
    assert factorize(h, damping(1)).order_EI[0].equal(torch.arange(40))


def snapshot(*things: Tensor | Scales | Factor) -> list[Tensor]:
    tensors: list[Tensor] = []
    for thing in things:
        if isinstance(thing, Tensor):
            tensors.append(thing.clone())
        else:
            fields = (getattr(thing, name) for name in thing.__slots__)
            tensors += [field.clone() for field in fields if field is not None]
    return tensors


@each_order
@each_scheme
def test_a_shared_hessian_and_factor_serve_twice(scheme: Scheme, act_order: bool) -> None:  # noqa: FBT001
    # permuted in place by gate_proj and then used by up_proj, a Hessian made a peer ten times worse than rounding
    gate, up, h = oracle.weights(2, 8, 64), oracle.weights(2, 8, 64, seed=9), oracle.hessians(2, 64)
    scales, up_scales = absmax_scales(gate, scheme), absmax_scales(up, scheme)
    factor = factorize(h, damping(2), act_order=act_order)
    before = snapshot(gate, up, h, factor, scales, up_scales)
    solve(gate, factor, scheme, scales)
    second = solve(up, factor, scheme, up_scales)
    fresh = solve(up, factorize(h, damping(2), act_order=act_order), scheme, up_scales)
    assert same(second, fresh)
    after = snapshot(gate, up, h, factor, scales, up_scales)
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


@each_order
@each_scheme
def test_groups_keep_their_own_scale_through_the_walk(scheme: Scheme, act_order: bool) -> None:  # noqa: FBT001
    # one scale for the whole matrix, or that of the wrong group, drowns the small groups
    width = scheme.group_size
    groups = 128 // width
    size = torch.tensor([2.0 ** (3 * (g % 3) - 3) for g in range(groups)]).repeat_interleave(width)
    w = oracle.weights(1, 8, 128) * size
    # inputs that match: every group matters alike, and act-order mixes the groups
    h = oracle.hessians(1, 128, correlation=0.3)
    h = h / size[:, None] / size
    scales = search_scales(w, scheme) if scheme.format.bits > 2 else absmax_scales(w, scheme)
    quantized = solve(w, factorize(h, damping(1), act_order=act_order), scheme, scales).quantized
    assert quantized.scale.shape == (1, 8, groups)
    assert quantized.scale.equal(scales.scale)
    assert quantized.scale.unique(dim=-1).shape[-1] > 1
    error = (dequantize(quantized) - w).unflatten(-1, (groups, width))
    relative = error.norm(dim=-1) / w.unflatten(-1, (groups, width)).norm(dim=-1)
    bound = {2: 2.5, 3: 0.8, 4: 0.5}.get(scheme.format.bits, 0.15)
    assert relative.max() < bound
    assert relative.amax(1).max() < 3 * relative.amax(1).min() + 0.1


def test_weights_may_be_bf16() -> None:
    scheme = Scheme(FORMATS["int4"], 32)
    w, h = oracle.weights(2, 8, 64).bfloat16(), oracle.hessians(2, 64)
    assert same(solved(w, h, scheme), solved(w.float(), h, scheme))


def test_one_row_and_one_group_and_one_column() -> None:
    for rows, columns, group in ((1, 32, -1), (3, 1, -1), (1, 17, 17), (2, 24, 8)):
        scheme = Scheme(FORMATS["int4"], group)
        w, h = oracle.weights(2, rows, columns), oracle.hessians(2, columns, tokens=64)
        solution = solved(w, h, scheme)
        assert solution.quantized.codes.shape == w.shape
        assert solution.loss_EO.shape == (2, rows)
        assert dequantize(solution.quantized).isfinite().all()
