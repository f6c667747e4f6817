"""Scales, codes and back: nothing is lost, clipped or non-finite that need not be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.errors import PlanError
from alphaquant.formats import (
    FORMATS,
    ElementKind,
    QuantizedTensor,
    ScaleKind,
    Scheme,
    decode,
    dequantize,
    initial_scale,
    matrix_scale,
    quantize,
    quantize_values,
    quantize_with,
    round_scale,
    round_to_grid,
)

LARGEST_BF16 = float(torch.finfo(torch.bfloat16).max)


def all_schemes() -> list[Scheme]:
    schemes = []
    for fmt in (fmt for fmt in FORMATS.values() if fmt.block_rows == 1):  # test_blocks.py has the others
        groups = (fmt.native_group,) if fmt.scale is ScaleKind.E4M3 else (32, 64, -1)
        for group in groups:
            schemes.append(Scheme(fmt, group or 32))
            if fmt.kind is ElementKind.INT:
                schemes.append(Scheme(fmt, group or 32, symmetric=False))
                schemes.append(Scheme(fmt, group or 32, symmetric=False, scale_dtype=torch.float16))
        if fmt.scale is ScaleKind.MODEL:
            schemes += [Scheme(fmt, 32, scale_dtype=dtype) for dtype in (torch.float16, torch.float32)]
    return schemes


each_scheme = pytest.mark.parametrize("scheme", all_schemes(), ids=lambda s: f"{s} {s.scale_dtype}".replace(" ", "-"))
mx_formats = pytest.mark.parametrize("name", [n for n in FORMATS if n.startswith("mx")])


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def stored(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The scale in its storage type."""
    kinds = {ScaleKind.E8M0: torch.float8_e8m0fnu, ScaleKind.E4M3: torch.float8_e4m3fn}
    return scale.to(kinds.get(scheme.format.scale, scheme.scale_dtype))


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = ((a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero), (a.global_scale, b.global_scale))
    return all(x is y or (x is not None and y is not None and x.equal(y)) for x, y in pairs)


def grid_of(scheme: Scheme, zero: int | None) -> torch.Tensor:
    codes = torch.arange(2**scheme.format.bits, dtype=torch.uint8)
    zeros = None if zero is None else torch.tensor(zero, dtype=torch.uint8)
    values = decode(codes, scheme.format, zeros)
    return values[values.isfinite()].double().sort().values


@each_scheme
def test_shapes_types_and_exact_scale_storage(scheme: Scheme) -> None:
    w = gaussian(3, 4, 128, scale=0.02).to(torch.bfloat16)
    before = w.clone()
    q = quantize(w, scheme)
    groups = scheme.num_groups(128)
    assert (q.codes.shape, q.codes.dtype) == (w.shape, torch.uint8)
    assert int(q.codes.max()) < 2**scheme.format.bits
    assert (q.scale.shape, q.scale.dtype) == ((3, 4, groups), torch.float32)
    assert stored(q.scale, scheme).float().equal(q.scale)
    assert (q.zero is None) == scheme.symmetric
    if q.zero is not None:
        assert (q.zero.shape, q.zero.dtype) == ((3, 4, groups), torch.uint8)
    assert (q.global_scale is None) == (scheme.format.scale is not ScaleKind.E4M3)
    if q.global_scale is not None:
        assert (q.global_scale.shape, q.global_scale.dtype) == ((3,), torch.float32)
    assert dequantize(q).dtype == torch.float32
    assert dequantize(q, torch.bfloat16).equal(dequantize(q).to(torch.bfloat16))
    assert w.equal(before)


@each_scheme
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-10, 10), outlier=st.sampled_from([0.0, 1.0, 50.0]))
def test_every_weight_goes_to_its_nearest_grid_value(scheme: Scheme, seed: int, exponent: int, outlier: float) -> None:
    w = gaussian(2, 64, seed=seed, scale=2.0**exponent)
    w[0, seed % 64] += outlier * 2.0**exponent
    q = quantize(w, scheme)
    groups = scheme.num_groups(64)
    x = (w.view(2, groups, -1).double() / q.effective_scale().double()[..., None]).flatten(0, 1)
    chosen = (dequantize(q).view(2, groups, -1).double() / q.effective_scale().double()[..., None]).flatten(0, 1)
    zeros = [None] * len(x) if q.zero is None else q.zero.flatten().tolist()
    # Absmax scales: nothing lies further out than half a step, but for what storing the scale rounds away.
    rounding = {ScaleKind.E8M0: 0.0, ScaleKind.E4M3: 2.0**-4}.get(scheme.format.scale, 2.0**-8)
    if scheme.scale_dtype is torch.float16:
        rounding = max(rounding, 2.0**-24 / float(q.scale.min()))
    for group, values, zero in zip(x, chosen, zeros, strict=True):
        grid = grid_of(scheme, zero)
        best = (grid[:, None] - group).abs().amin(0)
        assert ((values - group).abs() <= best + 2e-7 * group.abs() + 2e-7 * values.abs()).all()
        beyond = (grid[-1] - grid[-2]) / 2 if scheme.format.kind is ElementKind.INT else 0.0
        beyond += rounding * (group.max().clamp_min(0) - group.min().clamp_max(0))
        assert group.max() <= grid[-1] + beyond
        assert group.min() >= grid[0] - beyond


@each_scheme
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-10, 10))
def test_quantizing_again_with_the_same_scale_changes_nothing(scheme: Scheme, seed: int, exponent: int) -> None:
    q = quantize(gaussian(2, 3, 64, seed=seed, scale=2.0**exponent), scheme)
    assert same(quantize_with(dequantize(q), scheme, q.scale, q.zero, q.global_scale), q)
    assert round_scale(q.scale, scheme).equal(q.scale)


@each_scheme
def test_leading_dimensions_equal_single_calls(scheme: Scheme) -> None:
    w_EOI = gaussian(3, 5, 64) * torch.tensor([1.0, 0.01, 30.0])[:, None, None]
    whole = quantize(w_EOI, scheme)
    for expert, w in enumerate(w_EOI):
        single = quantize(w, scheme)
        zero = None if whole.zero is None else whole.zero[expert]
        total = None if whole.global_scale is None else whole.global_scale[expert]
        part = QuantizedTensor(whole.codes[expert], whole.scale[expert], zero, total, scheme)
        assert same(part, single)
        assert dequantize(whole)[expert].equal(dequantize(single))
    strided = w_EOI.transpose(0, 1).contiguous().transpose(0, 1)
    assert same(quantize(strided, scheme), whole)


@each_scheme
def test_a_column_walk_gives_the_same_codes(scheme: Scheme) -> None:
    w_EOI = gaussian(2, 4, 64)
    q = quantize(w_EOI, scheme)
    size = 64 // scheme.num_groups(64)
    expected = dequantize(q)
    for column in range(64):
        scale = q.effective_scale()[..., column // size]
        zero = None if q.zero is None else q.zero[..., column // size]
        values = quantize_values(w_EOI[..., column], scale, zero, scheme.format)
        assert (values * scale).equal(expected[..., column])
        if zero is not None:  # a solver may hold zero points as floats
            assert quantize_values(w_EOI[..., column], scale, zero.float(), scheme.format).equal(values)


@each_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_extremes_stay_finite(scheme: Scheme, dtype: torch.dtype) -> None:
    rows = torch.zeros(9, 64)
    rows[1, 5] = LARGEST_BF16
    rows[2, 5] = -LARGEST_BF16
    rows[3] = gaussian(64).sign() * LARGEST_BF16
    rows[4] = gaussian(64) * 1e-40
    rows[5, 7] = 1e-40
    rows[6] = gaussian(64) * 1e-3
    rows[6, 0] = 3e4
    rows[7] = 1.0
    rows[8] = -1.0
    for w in (rows, *rows[:, None, :]):  # together, where one matrix scale must serve all, and one by one
        q = quantize(w.to(dtype), scheme)
        assert stored(q.scale, scheme).float().equal(q.scale)
        assert q.scale.isfinite().all()
        assert (q.effective_scale() > 0).all()
        assert dequantize(q).isfinite().all()
        assert dequantize(q, torch.bfloat16).isfinite().all()
        zeros = w.to(dtype) == 0
        assert (dequantize(q)[zeros] == 0).all()


def test_largest_float32_stays_finite() -> None:
    w = torch.full((1, 64), torch.finfo(torch.float32).max)
    w[0, ::2] *= -1
    for scheme in all_schemes():
        assert dequantize(quantize(w, scheme), torch.bfloat16).isfinite().all(), scheme


@each_scheme
def test_a_group_of_zeros_has_scale_one_and_zero_codes(scheme: Scheme) -> None:
    w = torch.zeros(2, 64)
    w[1] = gaussian(64)
    q = quantize(w, scheme)
    assert (q.scale[0] == 1).all()
    assert (dequantize(q)[0] == 0).all()
    offset = 2 ** (scheme.format.bits - 1) if scheme.format.kind is ElementKind.INT and scheme.symmetric else 0
    assert (q.codes[0] == offset).all()
    nothing = quantize(torch.zeros(2, 64), scheme)
    assert (nothing.effective_scale() == 1).all()


@each_scheme
def test_one_outlier_is_kept(scheme: Scheme) -> None:
    w = gaussian(1, 64, scale=1e-4)
    w[0, 11] = 100.0
    kept = dequantize(quantize(w, scheme))[0, 11].item()
    fmt = scheme.format
    if fmt.kind is ElementKind.INT:
        half_step = 50 / (2.0 ** (fmt.bits - 1) - 0.5)
    else:
        half_step = 100 * 2.0 ** -(fmt.mantissa_bits + 1)
    assert abs(kept - 100) <= half_step + 0.5  # half a step of its binade, and the rounding of the scale


@mx_formats
@pytest.mark.parametrize("exponent", [-100, -20, -1, 0, 1, 7, 60, 100])
def test_e8m0_is_the_least_power_of_two_that_does_not_clip(name: str, exponent: int) -> None:
    fmt = FORMATS[name]
    scheme = Scheme(fmt, 32)
    top = torch.tensor(fmt.max_value * 2.0**exponent)
    inf = torch.tensor(math.inf)
    for absmax, expected in (
        (top, exponent),
        (torch.nextafter(top, inf), exponent + 1),
        (torch.nextafter(top, -inf), exponent),
        (top / 2, exponent - 1),
        (torch.nextafter(top / 2, inf), exponent),
    ):
        for sign in (1, -1):
            w = torch.zeros(1, 32)
            w[0, 3] = sign * absmax
            scale, zero, total = initial_scale(w, scheme)
            assert scale.tolist() == [[2.0**expected]]
            assert zero is None
            assert total is None


def test_e8m0_rounds_up_to_powers_of_two_within_its_range() -> None:
    scheme = Scheme(FORMATS["mxfp4"], 32)
    raw = torch.tensor([1.0, 1.0000001, 1.5, 2.0, 0.75, 2.0**-126, 2.0**-127, 1.5 * 2.0**-127, 1e-45, 0.0, math.inf])
    expected = [1.0, 2.0, 2.0, 2.0, 1.0, 2.0**-126, 2.0**-127, 2.0**-126, 2.0**-127, 2.0**-127, 2.0**125]
    rounded = round_scale(raw, scheme)
    assert rounded.tolist() == expected
    assert stored(rounded, scheme).view(torch.uint8).tolist()[:4] == [127, 128, 128, 128]


def test_e4m3_scales_round_to_nearest_even_and_never_to_zero() -> None:
    scheme = Scheme(FORMATS["nvfp4"], 16)
    raw = torch.tensor([1.0625, 1.1875, 0.0, 1e-9, 449.0, 1e9, 2.0**-9 * 1.4])
    assert round_scale(raw, scheme).tolist() == [1.0, 1.25, 2.0**-9, 2.0**-9, 448.0, 448.0, 2.0**-9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["int4", "int8", "fp6", "fp8"])
def test_model_scales_round_to_nearest_and_are_never_zero_or_infinite(name: str, dtype: torch.dtype) -> None:
    scheme = Scheme(FORMATS[name], 32, scale_dtype=dtype)
    usual = gaussian(100).abs() * 0.01
    assert round_scale(usual, scheme).equal(usual.to(dtype).float())
    ends = round_scale(torch.tensor([0.0, 1e-45, math.inf, 1e38]), scheme)
    assert (ends > 0).all()
    assert ends.isfinite().all()
    assert ends.to(dtype).float().equal(ends)
    small = torch.tensor([3 * 2.0**-24])  # float16 needs its subnormals: FP8 scales of usual weights are that small
    assert round_scale(small, scheme).equal(small)


def test_symmetric_integer_scale_and_codes_by_hand() -> None:
    w = torch.tensor([[7.5, -7.5, 1.0, 0.5, -0.5, 1.5, 0.0, 3.0]])
    q = quantize(w, Scheme(FORMATS["int4"], -1, scale_dtype=torch.float32))
    assert q.scale.tolist() == [[1.0]]
    assert q.codes.tolist() == [[15, 0, 9, 8, 8, 10, 8, 11]]
    assert dequantize(q).tolist() == [[7.0, -8.0, 1.0, 0.0, 0.0, 2.0, 0.0, 3.0]]


def test_asymmetric_integer_scale_and_codes_by_hand() -> None:
    scheme = Scheme(FORMATS["int2"], 4, symmetric=False)
    w = torch.tensor([[-1.0, 0.0, 2.0, 1.0, 4.0, 6.0, 5.0, 3.0, -6.0, -3.0, -2.0, -4.0]])
    q = quantize(w, scheme)
    assert q.zero is not None
    assert q.scale.tolist() == [[1.0, 2.0, 2.0]]
    assert q.zero.tolist() == [[1, 0, 3]]
    assert dequantize(q).tolist() == [[-1.0, 0.0, 2.0, 1.0, 4.0, 6.0, 4.0, 4.0, -6.0, -4.0, -2.0, -4.0]]


def test_nvfp4_by_hand() -> None:
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1] = 6.0, 2.5
    w[0, 16], w[0, 17] = -0.75, 0.25
    scheme = Scheme(FORMATS["nvfp4"], 16)
    q = quantize(w, scheme)
    assert q.global_scale is not None
    assert q.global_scale.item() == 448.0
    assert q.scale.tolist() == [[448.0, 56.0]]
    assert q.effective_scale().tolist() == [[1.0, 0.125]]
    assert dequantize(q)[0, [0, 1, 16, 17]].tolist() == [6.0, 2.0, -0.75, 0.25]


def test_nvfp4_matrices_can_share_a_global_scale() -> None:
    scheme = Scheme(FORMATS["nvfp4"], 16)
    gate, up = gaussian(2, 4, 64, seed=1), gaussian(2, 4, 64, seed=2, scale=3.0)
    shared = torch.minimum(matrix_scale(gate), matrix_scale(up))
    assert shared.equal(quantize(torch.cat([gate, up], dim=1), scheme).global_scale)
    scale, zero, total = initial_scale(gate, scheme, shared)
    assert zero is None
    assert total is shared
    both = quantize(torch.cat([gate, up], dim=1), scheme)
    assert scale.equal(both.scale[:, :4])


@pytest.mark.parametrize(
    ("name", "group", "symmetric", "percent"),
    [
        ("int3", 128, False, 3.44),
        ("int4", 128, False, 0.90),
        ("int6", 128, True, 0.065),
        ("int8", 128, True, 0.004),
        ("mxfp4", 32, True, 1.245),
        ("mxfp6", 32, True, 0.080),
        ("mxfp8", 32, True, 0.071),
        ("nvfp4", 16, True, 0.66),
    ],
)
def test_error_on_a_gaussian_with_the_best_of_a_few_scales(
    name: str, group: int, *, symmetric: bool, percent: float
) -> None:
    fmt = FORMATS[name]
    scheme = Scheme(fmt, group, symmetric=symmetric)
    w = gaussian(256, 512)
    scale, _, total = initial_scale(w, scheme)
    low = w.view(256, -1, group).amin(-1).clamp_max(0)
    factors = {ScaleKind.E8M0: [0.5, 1.0, 2.0], ScaleKind.E4M3: [0.6 + 0.1 * k for k in range(11)]}
    best = torch.full_like(scale, math.inf)
    for factor in factors.get(fmt.scale, [0.6 + 0.05 * k for k in range(10)]):
        tried = round_scale(scale * factor, scheme)
        zero = None if symmetric else (-low * factor / tried).round().clamp(0, 2**fmt.bits - 1).to(torch.uint8)
        error = (dequantize(quantize_with(w, scheme, tried, zero, total)) - w).square()
        best = torch.minimum(best, error.view(256, -1, group).sum(-1))
    assert 100 * float(best.sum() / w.square().sum()) == pytest.approx(percent, rel=0.1)


def test_a_group_that_does_not_divide_is_refused() -> None:
    scheme = Scheme(FORMATS["int4"], 128)
    with pytest.raises(PlanError, match="does not divide 192 inputs"):
        quantize(torch.zeros(2, 192), scheme)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", all_schemes(), ids=str)
def test_cuda_agrees_with_the_cpu_bit_for_bit(scheme: Scheme) -> None:
    w = gaussian(3, 64, 128, scale=0.02)
    w[0, 0] = 0
    w[0, 1] = 1e-40
    cpu, gpu = quantize(w, scheme), quantize(w.cuda(), scheme)
    back = [None if t is None else t.cpu() for t in (gpu.codes, gpu.scale, gpu.zero, gpu.global_scale)]
    assert same(QuantizedTensor(*back, scheme), cpu)  # type: ignore[arg-type]
    assert dequantize(gpu).cpu().equal(dequantize(cpu))
    assert round_to_grid(w.cuda(), scheme.format).cpu().equal(round_to_grid(w, scheme.format))
