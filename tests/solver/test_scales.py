"""Scale search: never worse than absmax, near the best there is, and storable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alphaquant.formats import FORMATS, ElementKind, ScaleKind, Scheme, dequantize, matrix_scale, quantize_with
from alphaquant.solver import Scales, absmax_scales, scales, search_scales

from . import oracle

SIZE = 128
each_scheme = pytest.mark.parametrize(
    "scheme",
    [
        *oracle.all_schemes(-1, 32, 64),
        Scheme(FORMATS["int4"], 32, symmetric=False, scale_dtype=torch.float16),
        Scheme(FORMATS["fp8"], 32, scale_dtype=torch.float32),
    ],
    ids=lambda s: f"{oracle.scheme_id(s)}-{str(s.scale_dtype).removeprefix('torch.')}",
)
each_default_scheme = pytest.mark.parametrize("scheme", oracle.default_schemes(), ids=oracle.scheme_id)


def group_errors(w: Tensor, scheme: Scheme, chosen: Scales, importance: Tensor | None = None) -> Tensor:
    """(Weighted) squared error of each group `[E, O, G]`, float64."""
    quantized = quantize_with(w, scheme, chosen.scale, chosen.zero, chosen.global_scale)
    error = (dequantize(quantized).double() - w.double()).square()
    if importance is not None:
        error = error * importance.double()[:, None, :]
    return error.unflatten(-1, (chosen.scale.shape[-1], -1)).sum(-1)


def awkward(*shape: int) -> Tensor:
    """Weights with outliers, a group of zeros, one of equal values, one of positive and one of tiny ones."""
    w = oracle.weights(*shape, seed=2)
    w[:, 0, 3] = 4.0
    w[:, 1, :64] = 0
    w[:, 2, :64] = 0.7
    w[:, 3] = w[:, 3].abs()
    w[:, 4] *= 1e-12
    w[:, 5] = -w[:, 5].abs() - 1
    return w


@each_scheme
def test_search_is_never_worse_than_absmax_in_any_group(scheme: Scheme) -> None:
    w = awkward(2, 8, SIZE)
    start, found = absmax_scales(w, scheme), search_scales(w, scheme)
    assert (group_errors(w, scheme, found) <= group_errors(w, scheme, start) * (1 + 1e-5)).all()


@each_scheme
def test_weighted_search_is_never_worse_by_its_own_measure(scheme: Scheme) -> None:
    w = awkward(2, 8, SIZE)
    importance = torch.rand(2, SIZE, generator=torch.Generator().manual_seed(0)) ** 4 + 1e-4
    found = search_scales(w, scheme, importance)
    errors = group_errors(w, scheme, found, importance)
    assert (errors <= group_errors(w, scheme, absmax_scales(w, scheme), importance) * (1 + 1e-5)).all()
    assert errors.sum() <= group_errors(w, scheme, search_scales(w, scheme), importance).sum() * (1 + 1e-5)


@pytest.mark.parametrize("scheme", [s for s in oracle.default_schemes() if s.format.bits <= 4], ids=oracle.scheme_id)
def test_importance_is_each_experts_own_and_each_columns_own(scheme: Scheme) -> None:
    w = oracle.weights(1, 16, SIZE).expand(2, -1, -1)
    importance = torch.ones(2, SIZE)
    importance[0, ::2], importance[1, 1::2] = 100, 100
    found = search_scales(w, scheme, importance)
    assert not found.scale[0].equal(found.scale[1])
    for expert in range(2):
        alone = search_scales(w[:1], scheme, importance[expert : expert + 1])
        assert alone.scale[0].equal(found.scale[expert])
    swapped = Scales(found.scale.flip(0), None if found.zero is None else found.zero.flip(0), found.global_scale)
    right, wrong = (group_errors(w, scheme, each, importance).sum() for each in (found, swapped))
    assert right < wrong


@each_scheme
def test_scales_are_storable_and_shaped_like_their_groups(scheme: Scheme) -> None:
    w = awkward(2, 8, SIZE)
    start, found = absmax_scales(w, scheme), search_scales(w, scheme)
    for each in (start, found):
        assert each.scale.shape == (2, 8, scheme.num_groups(SIZE))
        assert each.scale.dtype == torch.float32
        assert each.scale.isfinite().all()
        assert (each.scale > 0).all()
        assert each.effective().shape == each.scale.shape
        kinds = {ScaleKind.E8M0: torch.float8_e8m0fnu, ScaleKind.E4M3: torch.float8_e4m3fn}
        stored = each.scale.to(kinds.get(scheme.format.scale, scheme.scale_dtype))
        assert stored.float().equal(each.scale)
    if scheme.symmetric:
        assert found.zero is None
    else:
        assert found.zero is not None
        assert found.zero.dtype == torch.uint8
        assert int(found.zero.max()) < 2**scheme.format.bits
    if scheme.format.scale is ScaleKind.E4M3:
        assert found.global_scale is not None
        assert start.global_scale is not None
        assert found.global_scale.equal(start.global_scale)
        torch.testing.assert_close(found.effective(), found.scale / found.global_scale[:, None, None])
    else:
        assert found.global_scale is None


@each_default_scheme
def test_a_group_of_zeros_stays_zero(scheme: Scheme) -> None:
    w = oracle.weights(1, 4, 64)
    w[:, 1] = 0
    for found in (absmax_scales(w, scheme), search_scales(w, scheme), search_scales(w, scheme, torch.zeros(1, 64))):
        quantized = quantize_with(w, scheme, found.scale, found.zero, found.global_scale)
        assert dequantize(quantized)[:, 1].equal(torch.zeros(1, 64))


@each_default_scheme
def test_matrices_are_searched_together_as_alone(scheme: Scheme) -> None:
    w = awkward(3, 8, SIZE)
    together = search_scales(w, scheme)
    for expert in range(3):
        alone = search_scales(w[expert : expert + 1], scheme)
        assert together.scale[expert].equal(alone.scale[0])
        if alone.zero is not None and together.zero is not None:
            assert together.zero[expert].equal(alone.zero[0])


@each_default_scheme
def test_inputs_are_not_changed_and_parts_change_nothing(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance = awkward(3, 8, SIZE), torch.rand(3, SIZE, generator=torch.Generator().manual_seed(0))
    w_before, importance_before = w.clone(), importance.clone()
    whole = search_scales(w, scheme, importance)
    assert w.equal(w_before)
    assert importance.equal(importance_before)
    monkeypatch.setattr(scales, "_CHUNK_WEIGHTS", 3 * SIZE)
    parts = search_scales(w, scheme, importance)
    assert parts.scale.equal(whole.scale)
    assert parts.zero is whole.zero is None or (whole.zero is not None and parts.zero.equal(whole.zero))


@each_default_scheme
def test_weights_may_be_bf16(scheme: Scheme) -> None:
    w = oracle.weights(2, 4, 64).bfloat16()
    assert search_scales(w, scheme).scale.equal(search_scales(w.float(), scheme).scale)


def best_there_is(w: Tensor, scheme: Scheme) -> Tensor:
    """Least squared error of each group over a dense grid of scales, by the oracle's rounding; `[O, G]`."""
    start = absmax_scales(w[None], scheme)
    width = scheme.group_size
    absmax = w.abs().unflatten(-1, (-1, width)).amax(-1).double()
    largest = scheme.format.max_value
    best = torch.full_like(absmax, torch.inf)
    if scheme.format.scale is ScaleKind.E4M3:
        assert start.global_scale is not None
        storable = oracle.grid(FORMATS["fp8"])
        candidates = [value / start.global_scale.double() * torch.ones_like(absmax) for value in storable[storable > 0]]
    elif scheme.format.scale is ScaleKind.E8M0:
        exponents = torch.frexp(absmax / largest).exponent
        candidates = [2.0 ** (exponents + shift).double() for shift in range(-4, 4)]
    elif not scheme.symmetric:
        grouped = w.double().unflatten(-1, (-1, width))
        extent = grouped.amax(-1).clamp_min(0) - grouped.amin(-1).clamp_max(0)
        candidates = [extent * p / (2**scheme.format.bits - 1) for p in torch.linspace(0.3, 1.1, 60).tolist()]
    else:
        candidates = [absmax / largest * p for p in torch.linspace(0.3, 2.2, 200).tolist()]
    zeros = range(2**scheme.format.bits) if not scheme.symmetric else [None]
    for scale in candidates:
        for zero in zeros:
            spread = None if zero is None else torch.full_like(start.scale, zero)
            matrix = oracle.Matrix.of(w[None], Scales(scale[None], spread, None), scheme)
            error = (matrix.w - oracle.plain_rounding(matrix) * matrix.step).square()
            best = torch.minimum(best, error.unflatten(-1, (-1, width)).sum(-1))
    return best


@pytest.mark.parametrize(
    ("name", "symmetric", "slack"),
    [
        ("int2", True, 1.05),
        ("int3", True, 1.05),
        ("int4", True, 1.05),
        ("int2", False, 1.10),
        ("int3", False, 1.08),
        ("fp4", True, 1.12),
        ("mxfp4", True, 1.0001),
        ("nvfp4", True, 1.01),
    ],
)
def test_search_comes_near_the_best_scale_there_is(name: str, symmetric: bool, slack: float) -> None:  # noqa: FBT001
    fmt = FORMATS[name]
    scheme = Scheme(fmt, fmt.native_group or 32, symmetric=symmetric, scale_dtype=torch.float32)
    w = oracle.weights(1, 24, 64, seed=7)
    found = group_errors(w, scheme, search_scales(w, scheme))[0]
    best = best_there_is(w[0], scheme)
    assert (found.sum() / best.sum()) < slack
    assert (found >= best * 0.97).all()  # else the yardstick is not one
    plain = group_errors(w, scheme, absmax_scales(w, scheme))[0]
    if fmt.kind is ElementKind.INT and symmetric:
        assert found.sum() < 0.9 * plain.sum()
    else:
        assert found.sum() < plain.sum()


def test_a_shared_global_scale_is_kept() -> None:
    scheme = Scheme(FORMATS["nvfp4"], 16)
    w = oracle.weights(2, 4, 64)
    shared = matrix_scale(w) / torch.tensor([2.0, 5.0])
    for found in (absmax_scales(w, scheme, shared), search_scales(w, scheme, global_scale_E=shared)):
        assert found.global_scale is not None
        assert found.global_scale.equal(shared)
        # half the resolution of the block scales, but the same range: the error hardly moves
        own = group_errors(w, scheme, search_scales(w, scheme)).sum()
        assert group_errors(w, scheme, found).sum() < 1.6 * own
