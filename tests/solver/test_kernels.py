"""The Triton kernels, interpreted on the CPU, against the torch code that is their specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from alphaquant.solver import absmax_scales, factorize
from alphaquant.solver.gptq import Columns

from . import oracle

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.formats import Scheme

pytest.importorskip("triton")
from alphaquant.solver import kernels

EXPERTS, ROWS, COLUMNS = 2, 33, 32

each_scheme = pytest.mark.parametrize("scheme", oracle.all_schemes(16), ids=oracle.scheme_id)


def columns(scheme: Scheme) -> tuple[Columns, Tensor, Tensor]:
    """Columns, feedback and damped Hessian of random matrices, in walking order."""
    w, h = oracle.weights(EXPERTS, ROWS, COLUMNS), oracle.hessians(EXPERTS, COLUMNS)
    factor = factorize(h, torch.full((EXPERTS,), 0.01))
    cols = Columns.of(w, absmax_scales(w, scheme), scheme, factor.order_EI)
    return cols, factor.feedback_EII.contiguous(), h + 0.01 * torch.eye(COLUMNS)


def walked(cols: Columns, feedback: Tensor, scheme: Scheme, start: int, end: int) -> list[Tensor]:
    """The walk, a column at a time: what is left of the targets, values, errors."""
    target = cols.w_EIO.clone()
    value, error = torch.zeros_like(target), torch.zeros_like(target)
    for j in range(start, end):
        value[:, j] = cols.round(target[:, j], j, scheme)
        quantized = value[:, j] * cols.step_EIO[:, j]
        error[:, j] = cols.w_EIO[:, j] - quantized
        target[:, j] -= quantized
        target[:, j + 1 : end] += feedback[:, j, j + 1 : end, None] * error[:, j, None]
    return [target, value, error]


def descended(cols: Columns, q: Tensor, h: Tensor, scheme: Scheme, start: int, end: int) -> list[Tensor]:
    """Coordinate descent, a column at a time: values, quantized weights, how far they moved, on what gradients."""
    q, gradient, value = q.clone(), torch.bmm(h, cols.w_EIO - q), torch.zeros_like(q)
    moved = torch.zeros_like(q[:, start:end])
    for j in range(start, end):
        inverse = 1 / h[:, j, j, None]
        value[:, j] = cols.round(q[:, j] + gradient[:, j] * inverse, j, scheme)
        new = value[:, j] * cols.step_EIO[:, j]
        moved[:, j - start] = q[:, j] - new
        q[:, j] = new
        gradient[:, j + 1 : end] += h[:, j, j + 1 : end, None] * moved[:, j - start, None]
    return [value, q, moved, gradient[:, start:end]]


def same(found: list[Tensor], truth: list[Tensor]) -> bool:
    assert all(tensor.abs().sum() > 0 for tensor in truth)
    return all(a.equal(b) for a, b in zip(found, truth, strict=True))


@each_scheme
def test_walk(scheme: Scheme) -> None:
    cols, feedback, _ = columns(scheme)
    for start, end in ((0, COLUMNS), (16, 29)):
        found = [cols.w_EIO.clone(), torch.zeros_like(cols.w_EIO), torch.zeros_like(cols.w_EIO)]
        kernels.walk_block(found[0], cols, feedback, *found[1:], slice(start, end), scheme.format)
        assert same(found, walked(cols, feedback, scheme, start, end))


@each_scheme
def test_descent(scheme: Scheme) -> None:
    cols, _, h = columns(scheme)
    start_q = torch.stack([cols.round(cols.w_EIO[:, j], j, scheme) for j in range(COLUMNS)], 1) * cols.step_EIO
    for start, end in ((0, COLUMNS), (16, 29)):
        q, value = start_q.clone(), torch.zeros_like(start_q)
        gradient = torch.bmm(h, cols.w_EIO - q)[:, start:end].contiguous()
        moved = kernels.descend_block(gradient, q, cols, h, value, slice(start, end), scheme.format)
        assert same([value, q, moved, gradient], descended(cols, start_q, h, scheme, start, end))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_gram(dtype: torch.dtype, weighted: bool) -> None:  # noqa: FBT001
    counts, size = [37, 0, 1, 90], 72  # an expert without rows, one with a single row, tiles that are not full
    x = torch.randn(sum(counts), size, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.rand(sum(counts), generator=torch.Generator().manual_seed(1)) if weighted else None
    found = torch.ones(len(counts), size, size)
    kernels.add_grams(found, x, torch.tensor(counts), weight)
    # weights of bf16 rows keep 16 bits: rounding them to bf16 would be wrong by .02 here
    atol = 3e-4 if weighted and dtype is torch.bfloat16 else 3e-5
    start = 0
    for expert, count in enumerate(counts):
        rows = x[start : start + count].double()
        scaled = rows if weight is None else rows * weight[start : start + count, None].double()
        truth = (1 + rows.T @ scaled).float()
        torch.testing.assert_close(found[expert].triu(), truth.triu(), rtol=3e-5, atol=atol)
        assert found[expert][:64, :64].equal(found[expert][:64, :64].T)  # a tile that the diagonal crosses
        start += count
    assert found[1].equal(torch.ones(size, size))
