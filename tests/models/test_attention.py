"""Attention's fast paths, and products grouped by expert, against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alphaquant.models import attention
from alphaquant.models.attention import _scaled_dot_product
from alphaquant.models.linear import _by_expert

BLOCK = attention._QUERIES


def naive(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Each query by itself over the keys that it may see, float64."""
    out = torch.empty_like(q, dtype=torch.float64)
    repeats, past = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    for head in range(q.shape[1]):
        for query in range(q.shape[2]):
            last = past + query + 1
            seen = slice(0 if window is None else max(0, last - window), last)
            keys, values = (x[:, head // repeats, seen].double() for x in (k, v))
            scores = torch.einsum("bc,bkc->bk", q[:, head, query].double(), keys) / math.sqrt(q.shape[-1])
            out[:, head, query] = torch.einsum("bk,bkc->bc", scores.softmax(-1), values)
    return out


def inputs(batch: int, heads: int, kv_heads: int, length: int, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as the decoder lays them out: heads are a transposed axis."""
    generator = torch.Generator().manual_seed(length)

    def noise(num_heads: int, positions: int) -> Tensor:
        return torch.randn(batch, positions, num_heads, 12, generator=generator).transpose(1, 2)

    return noise(heads, length) * 1.5, noise(kv_heads, past + length), noise(kv_heads, past + length)


@pytest.mark.parametrize("window", [None, 1, 7, BLOCK, BLOCK + 3])
@pytest.mark.parametrize("length", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 9])
def test_attention_in_bf16_and_fp32(length: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(3, 2, 1, length)
    with torch.no_grad():
        assert (_scaled_dot_product(q, k, v, window) - naive(q, k, v, window)).abs().max() < 1e-5
        q, k, v = (x.bfloat16() for x in (q, k, v))
        truth = naive(q, k, v, window)
        found = _scaled_dot_product(q, k, v, window)
        assert found.dtype == torch.bfloat16
        assert (found - truth).abs().max() < 0.06
        assert (found - truth).norm() < 0.01 * truth.norm()
        monkeypatch.setattr(attention, "_SCORES", 1)  # one sequence at a time
        assert (_scaled_dot_product(q, k, v, window) - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_heads_share_keys_in_order(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(2, heads, kv_heads, 9))
    with torch.no_grad():
        found, truth = _scaled_dot_product(q, k, v, None), naive(q, k, v, None)
    assert (found - truth).norm() < (1e-5 if dtype is torch.float32 else 0.01) * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 4])
def test_queries_that_follow_a_cache(window: int | None, dtype: torch.dtype) -> None:
    for length in (1, 3):
        q, k, v = (x.to(dtype) for x in inputs(2, 4, 2, length, past=6))
        with torch.no_grad():
            found, truth = _scaled_dot_product(q, k, v, window), naive(q, k, v, window)
        assert (found - truth).norm() < (1e-5 if dtype is torch.float32 else 0.01) * truth.norm()


@pytest.mark.parametrize(
    "counts",
    [
        [0, 0, 3],
        [1, 0, 0],
        [5, 130, 2],
        [127, 128, 129],
        [300, 0, 1],
        [300, 700, 290],
        [1, 1, 254],
        [400, 400, 400],
        [0, 128, 0],
        [256, 10, 0],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_each_experts_own(counts: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 16, generator=generator).to(dtype)
    w = torch.randn(3, 8, 16, generator=generator).to(dtype)
    found = _by_expert(x, torch.tensor(counts), w)
    assert found.shape == (sum(counts), 8)
    parts = zip(x.double().split(counts), w.double(), strict=True)
    truth = torch.cat([rows @ w_OI.T for rows, w_OI in parts])
    torch.testing.assert_close(found.double(), truth, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-2)
    assert (found.double() - truth).norm() < (1e-6 if dtype is torch.float32 else 5e-3) * truth.norm()


@pytest.mark.parametrize("counts", [[5, 0, 64, 3], [0, 0, 0, 1], [65, 128, 1, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_by_expert_can_be_differentiated(counts: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 32, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(4, 16, 32, generator=generator).to(dtype).requires_grad_()
    slope = torch.randn(sum(counts), 16, generator=generator).to(dtype)
    out = _by_expert(x, torch.tensor(counts), w)
    out.backward(slope)
    tight = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    start = 0
    for expert, count in enumerate(counts):
        rows, start = slice(start, start + count), start + count
        own = w[expert].double()
        torch.testing.assert_close(out[rows].double(), x[rows].double() @ own.T, **tight)
        torch.testing.assert_close(x.grad[rows].double(), slope[rows].double() @ own, **tight)
        torch.testing.assert_close(w.grad[expert].double(), slope[rows].double().T @ x[rows].double(), **tight)
