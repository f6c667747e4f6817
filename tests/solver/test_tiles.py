"""Products in tiles of bf16 (Intel AMX), against the same in fp32; where there are no tiles, that there are none."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from alphaquant import compiled, numerics
from alphaquant.formats import FORMATS, Scheme, dequantize, round_scale
from alphaquant.solver import (
    Backend,
    Effort,
    HessianSum,
    Outcome,
    Recipe,
    absmax_scales,
    damp,
    factorize,
    native,
    quantize_stack,
    refine,
    round_to_nearest,
    solve,
)

from . import oracle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

refine_module = import_module("alphaquant.solver.refine")  # its name is that of a function, too
ENOUGH = torch.full((2,), 1e5)
in_tiles = pytest.mark.skipif(not native.has_tiles(), reason="no AMX, or no compiler that knows it")


def layer(rows: int = 200, columns: int = 416, experts: int = 2) -> tuple[Tensor, Tensor]:
    """Weights and Hessians of inputs whose spectrum falls, as that of activations does; no whole number of blocks."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns // 4, columns, generator=generator) / torch.arange(1, columns // 4 + 1)[:, None] ** 0.5
    x = torch.randn(experts, 2 * columns, columns // 4, generator=generator) @ mix
    x += 0.1 * torch.randn(x.shape, generator=generator)
    return oracle.weights(experts, rows, columns), x.transpose(1, 2) @ x / (2 * columns)


@contextmanager
def floats(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU without AMX."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "has_tiles", lambda: False)
        patch.setattr(numerics, "_has_amx", lambda: False)
        yield


def alike(found: Outcome, truth: Outcome) -> float:
    """The share of codes that are the same."""
    return float((found.quantized.codes == truth.quantized.codes).float().mean())


@in_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, 5e-4], ids=["weights", "tiny weights"])  # the latter's fp16 scales are subnormal
def test_scales_are_fitted_with_more_digits_than_bf16(dtype: torch.dtype, size: float) -> None:
    w, h = layer()
    scheme = Scheme(FORMATS["int4"], 32, scale_dtype=dtype)
    codes = round_to_nearest(w, scheme, absmax_scales(w, scheme)).quantized
    w *= size
    begin = round_scale(codes.scale * size * (1 + torch.rand(codes.scale.shape) / 16), scheme)
    found = refine_module.refit_scales(w, h, replace(codes, scale=begin), packed_EII=native.packed(h))
    value, step = codes.codes.double() - 8, begin.double()
    for group in range(13):
        cut = slice(32 * group, 32 * group + 32)
        left, v = w.double() - value * step.repeat_interleave(32, 2), value[..., cut]
        gradient, curved = (left @ h.double())[..., cut], v @ h[:, cut, cut].double()
        wanted = step[..., group] + (v * gradient).sum(2) / (v * curved).sum(2)
        wanted = torch.where((wanted / step[..., group] - 1).abs() < 0.5, wanted, step[..., group])
        step[..., group] = wanted if dtype is torch.float32 else round_scale(wanted.float(), scheme).double()
    assert (step != begin).float().mean() > 0.9
    off = (found.scale - step).abs() / (begin - step).abs().mean()
    if dtype is torch.float32:
        assert off.mean() < 1e-5  # of products in bf16 it would be .2%
    else:  # what lies halfway may be rounded to either side
        assert (found.scale == step).float().mean() > 0.99
        assert found.scale.equal(found.scale.to(dtype).float())


@in_tiles
def test_rows_of_a_block_keep_one_scale() -> None:
    w, h = layer(300, 384)
    scheme = Scheme(FORMATS["fp8_block"], 128)
    start = round_to_nearest(w, scheme, absmax_scales(w, scheme))
    start = replace(start, quantized=replace(start.quantized, scale=round_scale(start.quantized.scale * 1.1, scheme)))
    found, truth = (refine(w, h, start, sweeps=2, packed_EII=packed) for packed in (native.packed(h), None))
    assert found.quantized.scale.equal(truth.quantized.scale)
    assert not found.quantized.scale.equal(start.quantized.scale)
    for block in found.quantized.scale.split(128, 1):
        assert block.equal(block[:, :1].expand_as(block))
    assert (found.quantized.codes == truth.quantized.codes).float().mean() > 0.97  # of 8 bits: many lie near a border
    torch.testing.assert_close(found.loss_EO.sum(), truth.loss_EO.sum(), rtol=3e-3, atol=0)


@in_tiles
def test_the_loss_is_that_of_the_codes() -> None:
    w, h = layer()
    scheme = Scheme(FORMATS["int4"], 32)
    start = round_to_nearest(w, scheme, absmax_scales(w, scheme))
    found = refine(w, h, start, sweeps=2, packed_EII=native.packed(h))
    left = (w - dequantize(found.quantized)).double()
    exact = ((left @ h.double()) * left).sum(2)
    torch.testing.assert_close(found.loss_EO.double(), exact, rtol=3e-4, atol=0)
    torch.testing.assert_close(found.loss_EO.double().sum(), exact.sum(), rtol=1e-5, atol=0)


@in_tiles
@pytest.mark.parametrize("act_order", [True, False], ids=["act order", "natural order"])
def test_the_walk_is_that_in_fp32(act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    w, h = layer()
    scheme = Scheme(FORMATS["int4"], 32)
    damping, scales = torch.full((2,), 0.01), absmax_scales(w, scheme)
    found = solve(w, factorize(h, damping, act_order=act_order), scheme, scales)
    with floats(monkeypatch):
        truth = solve(w, factorize(h, damping, act_order=act_order), scheme, scales)
    assert (found.quantized.codes == truth.quantized.codes).float().mean() > 0.999
    error = (w - dequantize(found.quantized)).double()
    exact = ((error @ damp(h, damping).double()) * error).sum(-1)
    torch.testing.assert_close(found.loss_EO.double(), exact, rtol=3e-4, atol=0)
    torch.testing.assert_close(found.loss_EO.sum(), truth.loss_EO.sum(), rtol=1e-3, atol=0)


@in_tiles
@pytest.mark.parametrize("effort", list(Effort), ids=lambda effort: effort.value)
def test_a_layer_has_the_codes_of_fp32(effort: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = layer(256, 768)
    recipe = Recipe(effort=effort)
    found = quantize_stack(w, h, ENOUGH, Scheme(FORMATS["int4"], 128), recipe)
    with floats(monkeypatch):
        truth = quantize_stack(w, h, ENOUGH, Scheme(FORMATS["int4"], 128), recipe)
    assert native.packed(h) is not None
    assert alike(found, truth) > 0.99
    torch.testing.assert_close(found.loss_EO.sum(), truth.loss_EO.sum(), rtol=1e-3, atol=0)
    error = (w - dequantize(found.quantized)).double()
    exact = ((error @ damp(h, found.damping_E).double()) * error).sum(-1)
    torch.testing.assert_close(found.loss_EO.double(), exact, rtol=3e-4, atol=0)
    torch.testing.assert_close(found.loss_EO.double().sum(), exact.sum(), rtol=1e-5, atol=0)


@in_tiles
@pytest.mark.parametrize("scheme", oracle.all_schemes(-1, 32), ids=oracle.scheme_id)
def test_every_format_goes_through_tiles(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = layer(256, 256)
    assert native.packed(h) is not None
    found = quantize_stack(w, h, ENOUGH, scheme, Recipe())
    with floats(monkeypatch):
        truth = quantize_stack(w, h, ENOUGH, scheme, Recipe())
    assert alike(found, truth) > 0.99
    torch.testing.assert_close(found.loss_EO.sum(), truth.loss_EO.sum(), rtol=3e-3, atol=0)  # few codes, of 8 bits


@in_tiles
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
    w, h = layer()
    results = []
    for number in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        results.append(quantize_stack(w, h, ENOUGH, Scheme(FORMATS["int4"], 32), Recipe()))
    for other in results[1:]:
        assert other.quantized.codes.equal(results[0].quantized.codes)
        assert other.quantized.scale.equal(results[0].quantized.scale)
        assert other.loss_EO.equal(results[0].loss_EO)


@in_tiles
def test_scales_that_are_given_stay() -> None:
    w, h = layer(1, 256)  # of a single row, so that groups lie first already
    scheme = Scheme(FORMATS["int3"], 32)
    start = round_to_nearest(w, scheme, absmax_scales(w, scheme), h)
    before = start.quantized.scale.clone()
    found = refine(w, h, start, sweeps=1, packed_EII=native.packed(h))
    assert start.quantized.scale.equal(before)
    assert not found.quantized.scale.equal(before)


@in_tiles
@pytest.mark.parametrize("columns", [128, 272], ids=["one block", "half a tile"])
def test_what_fits_no_tiles_stays_in_fp32(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = layer(64, columns)
    found = quantize_stack(w, h, ENOUGH, Scheme(FORMATS["int4"], 16), Recipe())
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    truth = quantize_stack(w, h, ENOUGH, Scheme(FORMATS["int4"], 16), Recipe())
    assert found.loss_EO.equal(truth.loss_EO)


@in_tiles
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize(("size", "packed"), [(32, 1 << 23), (96, 1), (576, 1 << 18), (704, 1 << 23)])
def test_sums_of_rows(size: int, packed: int, scored: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    monkeypatch.setattr(native, "_PACKED", packed)
    counts = [33, 0, 1, 32, 100, 0, 31]
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(sum(counts), size, generator=generator).bfloat16()
    score = torch.rand(len(x), generator=generator) if scored else None
    assert native.sums(x)
    found = HessianSum(len(counts), size, 1.0)
    for _ in range(2):
        found.add(x, counts, score)
    rows = x.float() if score is None else (x.float() * score.sqrt()[:, None]).bfloat16().float()
    truth = torch.stack([2 * part.double().T @ part.double() for part in rows.split(counts)])
    assert (found.sum_EII - truth).abs().max() < 1e-5 * truth.abs().max()
    assert torch.equal(found.sum_EII, found.sum_EII.transpose(1, 2))
    monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    shared = HessianSum(len(counts), size, 1.0)
    for _ in range(2):
        shared.add(x, counts, score)
    assert torch.equal(found.sum_EII, shared.sum_EII)


@in_tiles
def test_torch_is_asked_for_and_torch_it_is() -> None:
    _, h = layer()
    assert factorize(h, torch.full((2,), 0.01)).packed_EII is not None
    assert factorize(h, torch.full((2,), 0.01), backend=Backend.TORCH).packed_EII is None


def test_a_compiler_that_does_not_know_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = compiled.shutil.which("cc") or compiled.shutil.which("gcc")
    assert compiler is not None
    script = tmp_path / "cc"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-march=native*) exit 1;; esac\nexec {compiler} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(compiled.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(compiled, "_COMPILERS", (str(script),))
    for cached in (compiled.library, native.has_tiles):
        cached.cache_clear()
    try:
        assert native.is_available()
        assert not native.has_tiles()
        w, h = layer(64, 256)
        assert quantize_stack(w, h, ENOUGH, Scheme(FORMATS["int4"], 32), Recipe()).loss_EO.isfinite().all()
    finally:
        for cached in (compiled.library, native.has_tiles):
            cached.cache_clear()
