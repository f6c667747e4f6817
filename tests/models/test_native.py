"""What the forward pass does in C, against float64, and the decoder with it against the decoder without."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import alphaquant
from alphaquant import compiled
from alphaquant.models import native
from alphaquant.models.attention import _rotate, rms_norm
from alphaquant.models.linear import expert_linear

HALF = 2.0**-8  # of a unit in the last place of bf16: what a rounding is off by at most, relatively


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).bfloat16()


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


def close(found: Tensor, truth: Tensor, roundings: int = 1) -> None:
    assert found.dtype is torch.bfloat16
    error = (found.double() - truth).abs()
    assert (error <= roundings * HALF * truth.abs() * 1.01 + 1e-5).all()


@pytest.mark.parametrize("size", [16, 32, 48, 256])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_norm(size: int, scale: float) -> None:
    x, weight = noise(3, 5, size, scale=scale), 1 + noise(size, scale=0.1)
    root = (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(native.rms_norm(x, weight, 1e-5), x.double() / root * weight.double(), roundings=2)


@pytest.mark.parametrize(("channels", "width"), [(32, 32), (64, 32), (70, 64)])
def test_rotation(channels: int, width: int) -> None:
    x = noise(2, 7, 3, channels)
    angle = torch.rand(7, width // 2).repeat(1, 2) * 6
    tables = angle.cos().bfloat16().float(), angle.sin().bfloat16().float()
    found = native.rotate(x, *tables)
    assert found.shape == (2, 3, 7, channels)
    assert found.is_contiguous()
    truth = _rotate(x.transpose(1, 2).double(), tables)
    assert (found - truth).abs().max() < 0.02
    assert (found - truth).norm() < 0.003 * truth.norm()
    assert torch.equal(found[..., width:], x.transpose(1, 2)[..., width:])
    assert torch.equal(_rotate(x.transpose(1, 2), tables), found)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 33])
@pytest.mark.parametrize(("start", "first"), [(0, 0), (32, 0), (48, 16)])
def test_softmax(window: int | None, start: int, first: int) -> None:
    queries, keys = 32, start + 32 - first
    scores = torch.randn(3, queries, keys, generator=torch.Generator().manual_seed(start)) * 5
    position, key = torch.arange(start, start + queries)[:, None], torch.arange(first, first + keys)[None]
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    truth = scores.double().masked_fill(hidden, -math.inf).softmax(-1)
    found = native.softmax(scores.clone(), start, first, window)
    close(found, truth)
    assert (found.masked_select(hidden) == 0).all()


in_tiles = pytest.mark.skipif(not native.has_tiles(), reason="no AMX, or no compiler that knows it")


def naive(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeats, 1) for x in (k, v))
    position = torch.arange(q.shape[2])
    hidden = position[None] > position[:, None]
    if window is not None:
        hidden |= position[None] <= position[:, None] - window
    return (q.double() @ k.transpose(2, 3) * scale).masked_fill(hidden, -math.inf).softmax(-1) @ v


@in_tiles
@pytest.mark.parametrize("window", [None, 1, 31, 32, 33, 70])
@pytest.mark.parametrize(("length", "channels", "values"), [(32, 32, 32), (96, 64, 64), (128, 96, 32), (64, 32, 128)])
def test_attention(length: int, channels: int, values: int, window: int | None) -> None:
    q, k = (noise(2, length, heads, channels).transpose(1, 2) for heads in (4, 2))
    v = noise(2, length, 2, values).transpose(1, 2)
    assert native.attends(q, k, v)
    found = native.attention(q, k, v, window, 0.3)
    truth = naive(q, k, v, window, 0.3)
    assert found.shape == truth.shape
    assert found.transpose(1, 2).is_contiguous()
    assert (found - truth).norm() < 0.005 * truth.norm()
    assert (found - truth).abs().max() < 0.03
    assert torch.equal(found, native.attention(q.contiguous(), k.contiguous(), v.contiguous(), window, 0.3))


@in_tiles
def test_what_attention_takes() -> None:
    q = noise(1, 2, 64, 32)
    assert native.attends(q, q, q)
    assert not native.attends(q[:, :, :32], q, q)
    assert not native.attends(q, q, q[..., :16])
    assert not native.attends(*(3 * [q[:, :, :48]]))
    assert not native.attends(*(3 * [q.transpose(2, 3)]))
    assert not native.attends(*(3 * [q.float()]))
    with torch.enable_grad():
        assert not native.attends(q, q, q)


@in_tiles
def test_no_number_reaches_only_what_sees_it() -> None:
    q, k, v = (noise(1, 1, 64, 32) for _ in range(3))
    v[0, 0, 40, 3] = math.nan
    found = native.attention(q, k, v, None, 0.2)
    assert found[0, 0, :32].isfinite().all()  # zero times it is none either, in the block that sees it
    assert found[0, 0, 40:, 3].isnan().all()


def test_swiglu_of_all_numbers() -> None:
    gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite()]
    gate = gate[: len(gate) // 16 * 16]
    up = torch.full_like(gate, 1.5)
    truth = F.silu(gate.double()) * 1.5
    found = native.swiglu(gate, up)
    finite = truth.abs() < 3.36e38
    close(found[finite], truth[finite], roundings=2)
    assert found[truth > 3.42e38].isinf().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_none(bad: float) -> None:
    x = noise(2, 64)
    x[1, 37] = bad
    assert not native.swiglu(x, torch.ones_like(x))[1, 37].isfinite()
    for found in (
        native.rms_norm(x, torch.ones_like(x[0]), 1e-5),
        native.softmax(x.float()[None].expand(1, 2, 64).contiguous(), 62, 0, None)[0],
        native.combine(x, torch.tensor([[0], [1]]), torch.ones(2, 1)),
    ):
        assert found[0].isfinite().all()
        assert not found[1].isfinite().all()


@in_tiles
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 64), (256, 128), (1024, 32)])
def test_products_by_expert(inputs: int, outputs: int) -> None:
    counts = torch.tensor([33, 0, 1, 32, 100, 0, 31, 0])
    x, w = noise(int(counts.sum()), inputs), noise(len(counts), outputs, inputs)
    assert native.multiplies(x, w)
    parts = zip(x.split(counts.tolist()), w, strict=True)
    truth = torch.cat([part.double() @ own.double().T for part, own in parts])
    found = native.expert_products(x, counts, w)
    assert ((found - truth).abs() <= HALF * truth.abs() * 1.01 + 1e-4).all()
    assert torch.equal(expert_linear(x, counts, {"a.weight": w}, "a"), found)
    assert not native.multiplies(x, w.float())
    assert not native.multiplies(x, noise(2, 1 << 18, inputs))


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_sums_of_experts(top_k: int) -> None:
    rows, place = noise(24 * top_k, 48), torch.randperm(24 * top_k).view(24, top_k)
    score = torch.rand(24, top_k)
    found = native.combine(rows, place, score)
    terms = rows[place].double() * score[..., None]
    assert ((found - terms.sum(1)).abs() <= HALF * terms.sum(1).abs() * 1.01 + 1e-6 * terms.abs().sum(1)).all()


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
    x, place, score = noise(5, 32, 64), torch.randperm(160).view(40, 4), torch.rand(40, 4)
    tables = torch.rand(32, 32), torch.rand(32, 32)
    results = []
    for number in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        found = native.rms_norm(x, x[0, 0], 1e-5), native.rotate(x.unflatten(-1, (2, 32)), *tables)
        more = native.softmax(x.float(), 32, 0, 7), native.swiglu(x, x)
        results.append([*found, *more, native.combine(x.flatten(0, 1), place, score)])
        if native.has_tiles():
            results[-1].append(native.attention(*(3 * [x[:, None]]), 40, 0.1))
    assert all(map(torch.equal, *results))


def test_what_fits() -> None:
    x = noise(4, 64)
    assert native.fits(x, x, width=64)
    assert not native.fits(x, width=40)
    assert not native.fits(x.T, width=64)
    assert not native.fits(x, x.float(), width=64)
    with torch.enable_grad():
        assert not native.fits(x, width=64)


def test_a_norm_can_be_differentiated() -> None:
    with torch.enable_grad():
        weight = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
        rms_norm(noise(4, 64), weight, 1e-5).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("length", [144, 160])  # attention in tiles takes multiples of 32
def test_the_decoder_is_as_near_to_fp32_as_without(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    functions = {"rms_norm", "rotate", "swiglu", "combine"}
    functions.add("attention" if native.has_tiles() and length % 32 == 0 else "softmax")
    for name in functions:
        own = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *x, own=own, name=name: called.add(name) or own(*x))
    folder = Path(alphaquant.__file__).parent / "data/demo-model"
    ids = torch.randint(500, (8, length), generator=torch.Generator().manual_seed(0))
    truth = alphaquant.load(folder, dtype="fp32").logits(ids)
    model = alphaquant.load(folder, dtype="bf16")

    def error() -> Tensor:  # of the median token: where another expert is chosen it is anything
        return ((model.logits(ids) - truth).norm(dim=-1) / truth.norm(dim=-1)).median()

    found = error()
    assert called == functions
    monkeypatch.setattr(native, "fits", lambda *_, **__: False)
    monkeypatch.setattr(native, "attends", lambda *_: False)
    assert 0 < found < 1.05 * error() < 0.05
