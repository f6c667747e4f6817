"""The kernels in C, and those in Triton, interpreted on the CPU, against the torch code that is their specification."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import pytest
import torch

from alphaquant import compiled
from alphaquant.errors import ConfigError
from alphaquant.solver import (
    Backend,
    Effort,
    Recipe,
    absmax_scales,
    backend_for,
    factorize,
    native,
    quantize_stack,
    scales,
)
from alphaquant.solver.gptq import Columns, columns_first

from . import oracle

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor

    from alphaquant.formats import Scheme

EXPERTS, ROWS, COLUMNS = 2, 33, 32

each_scheme = pytest.mark.parametrize("scheme", oracle.all_schemes(16), ids=oracle.scheme_id)


@pytest.fixture(params=["kernels", "native"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "kernels":
        pytest.importorskip("triton")
    return import_module(f"alphaquant.solver.{request.param}")


def columns(scheme: Scheme, rows: int = ROWS) -> tuple[Columns, Tensor, Tensor]:
    """Columns, feedback and damped Hessian of random matrices, in walking order."""
    w, h = oracle.weights(EXPERTS, rows, COLUMNS), oracle.hessians(EXPERTS, COLUMNS)
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
def test_walk(kernels: ModuleType, scheme: Scheme) -> None:
    cols, feedback, _ = columns(scheme)
    for start, end in ((0, COLUMNS), (16, 29)):
        found = [cols.w_EIO.clone(), torch.zeros_like(cols.w_EIO), torch.zeros_like(cols.w_EIO)]
        kernels.walk_block(found[0], cols, feedback, *found[1:], slice(start, end), scheme.format)
        assert same(found, walked(cols, feedback, scheme, start, end))


@each_scheme
def test_descent(kernels: ModuleType, scheme: Scheme) -> None:
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
    kernels = pytest.importorskip("alphaquant.solver.kernels", exc_type=ImportError)
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


@each_scheme
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_rounding_errors(scheme: Scheme, weighted: bool) -> None:  # noqa: FBT001
    group = scheme.group_size
    w = oracle.weights(1, 70, 3 * group)[0].unflatten(-1, (3, group))
    start = absmax_scales(w.flatten(1)[None], scheme)
    step = start.effective() * torch.tensor([0.7, 1.0, 0.4])[:, None, None]
    zero = None if start.zero is None else start.zero.float() + torch.tensor([0, 1, -1])[:, None, None]
    importance = torch.rand(3, group, generator=torch.Generator().manual_seed(1)) if weighted else None
    truth = scales._rounding_errors(w, step, zero, importance, scheme.format)
    assert (truth > 0).all()
    torch.testing.assert_close(native.rounding_errors(w, step, zero, importance, scheme.format), truth)


@each_scheme
def test_least_rounding_errors(scheme: Scheme) -> None:
    w = oracle.weights(1, 70, 3 * scheme.group_size)[0].unflatten(-1, (3, -1))
    start = absmax_scales(w.flatten(1)[None], scheme)
    factors = 0.4 + torch.rand(4, 70, 3, generator=torch.Generator().manual_seed(1))
    step = (start.effective() * factors).repeat(2, 1, 1)  # each of them twice
    zero = None if start.zero is None else start.zero.float().expand_as(step)
    errors = native.rounding_errors(w, step, zero, None, scheme.format)
    least, which = native.least_rounding_errors(w, step, zero, None, scheme.format)
    assert same([least, which], [*errors.min(0)])
    assert sorted(which.unique().tolist()) == [0, 1, 2, 3]  # of equal ones the first


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 64, 128), (3, 65, 130), (1, 200, 3)], ids=str)
def test_turned(dtype: torch.dtype, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.randint(0, 256, sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = native.turned(x)
    assert found is not None
    assert found.is_contiguous()
    assert found.equal(x.transpose(1, 2))
    assert native.turned(x.transpose(1, 2)) is None or 1 in sizes[1:]
    assert native.turned(x.short()) is None
    for y in (x, x.transpose(1, 2), x.short()):
        assert columns_first(y).equal(y.transpose(1, 2))
        assert columns_first(y).is_contiguous()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
    scheme = oracle.all_schemes(16)[0]
    cols, feedback, _ = columns(scheme, rows=300)
    groups = cols.w_EIO.view(EXPERTS * COLUMNS, 3, 100)
    step = groups.abs().amax(-1) / torch.tensor([2, 3])[:, None, None]
    results = []
    for number in (1, threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        found = [cols.w_EIO.clone(), torch.zeros_like(cols.w_EIO), torch.zeros_like(cols.w_EIO)]
        native.walk_block(found[0], cols, feedback, *found[1:], slice(0, COLUMNS), scheme.format)
        results.append([*found, native.rounding_errors(groups, step, None, None, scheme.format)])
    assert same(results[1], results[0])
    assert same(results[1][:3], walked(cols, feedback, scheme, 0, COLUMNS))


@pytest.mark.parametrize("effort", list(Effort), ids=lambda effort: effort.value)
def test_the_whole_method_in_c_is_that_in_torch(effort: Effort) -> None:
    w, h = oracle.weights(2, 40, 300), oracle.hessians(2, 300)  # blocks of several widths, none of them 128
    for scheme in oracle.all_schemes(20):
        if scheme.format.native_group is None:
            found, truth = (
                quantize_stack(w, h, torch.full((2,), 1e4), scheme, Recipe(effort=effort, backend=backend))
                for backend in (Backend.NATIVE, Backend.TORCH)
            )
            same_codes = (found.quantized.codes == truth.quantized.codes).float().mean()
            assert same_codes > 0.99
            torch.testing.assert_close(found.loss_EO.sum(), truth.loss_EO.sum(), rtol=1e-3, atol=0)


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory in which the library has not been made."""
    monkeypatch.setattr(compiled.Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(tmp_path))
    compiled.library.cache_clear()
    yield tmp_path
    compiled.library.cache_clear()


def made(folder: Path) -> list[Path]:
    return sorted(folder.rglob("native-*.so"))


def test_the_library_is_made_once(anew: Path) -> None:
    assert native.is_available()
    (library,) = made(anew / "home/.cache/alphaquant")
    before = library.stat().st_mtime_ns
    compiled.library.cache_clear()
    assert native.is_available()
    assert made(anew) == [library]
    assert library.stat().st_mtime_ns == before
    assert [path.name for path in library.parent.iterdir()] == [library.name]


def test_a_home_that_cannot_be_written_is_no_hindrance(anew: Path) -> None:
    (anew / "home").write_text("a file")
    assert native.is_available()
    assert len(made(anew)) == 1


@pytest.mark.parametrize("compiler", [None, "exit 1"], ids=["none", "broken"])
def test_without_a_compiler_torch_does_it(anew: Path, compiler: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler is not None:
        (anew / "cc").write_text(f"#!/bin/sh\n{compiler}\n")
        (anew / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(anew))
    assert backend_for("cpu", Backend.AUTO) is Backend.TORCH
    with pytest.raises(ConfigError, match="no C compiler"):
        backend_for("cpu", Backend.NATIVE)
    assert made(anew) == []


def test_c_is_for_a_cpu() -> None:
    assert backend_for("cpu", Backend.AUTO) is Backend.NATIVE
    with pytest.raises(ConfigError, match="on cuda"):
        backend_for("cuda", Backend.NATIVE)
