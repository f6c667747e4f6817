"""The element grids, against tables built here from first principles and against ml_dtypes."""

from __future__ import annotations

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.formats import FORMATS, ElementKind, decode, encode, quantize_values, round_to_grid

# name: exponent bits, mantissa bits, codes at the top that are not finite numbers, the type in ml_dtypes
ELEMENTS = {
    "fp4": (2, 1, 0, ml_dtypes.float4_e2m1fn),
    "fp6": (2, 3, 0, ml_dtypes.float6_e2m3fn),
    "fp6_e3m2": (3, 2, 0, ml_dtypes.float6_e3m2fn),
    "fp8": (4, 3, 1, ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": (5, 2, 4, ml_dtypes.float8_e5m2),
}
INTEGERS = ["int2", "int3", "int4", "int6", "int8"]
each_float = pytest.mark.parametrize("name", ELEMENTS)


def positive_values(name: str) -> list[Fraction]:
    """Values of codes 0, 1, 2, ... without the sign bit, as the OCP specifications define them."""
    exponent_bits, mantissa_bits, specials, _ = ELEMENTS[name]
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = Fraction(mantissa, 2**mantissa_bits)
            if exponent == 0:
                values.append(fraction * Fraction(2) ** (1 - bias))
            else:
                values.append((1 + fraction) * Fraction(2) ** (exponent - bias))
    return values[: len(values) - specials]


def nearest(x: Fraction, table: list[Fraction]) -> Fraction:
    """The nearest value of ``table`` with the sign of ``x``; a tie goes to the even code."""
    code = min(range(len(table)), key=lambda c: (abs(table[c] - abs(x)), c % 2))
    return table[code] if x >= 0 else -table[code]


def interesting_points(table: list[Fraction]) -> list[float]:
    """Every value, every tie, the float32 neighbours of each, and points beyond the range; both signs."""
    points = [float(v) for v in table]
    points += [float((a + b) / 2) for a, b in itertools.pairwise(table)]
    points += [float(table[-1]) * factor for factor in (1.01, 1.0625, 1.5, 1e6)]
    exact = np.array(points, dtype=np.float32)
    assert [float(p) for p in exact[: 2 * len(table) - 1]] == points[: 2 * len(table) - 1]
    around = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])
    return [float(v) for v in np.concatenate([around, -around])]


@each_float
def test_every_value_and_every_tie_rounds_to_the_nearest_even(name: str) -> None:
    table = positive_values(name)
    points = interesting_points(table)
    expected = [float(nearest(Fraction(p), table)) for p in points]
    assert round_to_grid(torch.tensor(points), FORMATS[name]).tolist() == expected


@each_float
def test_rounding_agrees_with_ml_dtypes_within_the_range(name: str) -> None:
    top = float(positive_values(name)[-1])
    x = np.array([p for p in interesting_points(positive_values(name)) if abs(p) <= top], dtype=np.float32)
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(20_000).astype(np.float32) * np.exp2(rng.integers(-20, 16, 20_000)).astype(np.float32)
    x = np.concatenate([x, spread[np.abs(spread) <= top]])
    expected = x.astype(ELEMENTS[name][3]).astype(np.float32)
    np.testing.assert_array_equal(round_to_grid(torch.from_numpy(x), FORMATS[name]).numpy(), expected)


@each_float
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_float32_rounds_to_the_nearest(name: str, x: float) -> None:
    expected = float(nearest(Fraction(x), positive_values(name)))
    assert round_to_grid(torch.tensor([x]), FORMATS[name]).item() == expected


@each_float
def test_decode_is_the_table_and_ml_dtypes(name: str) -> None:
    fmt = FORMATS[name]
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    decoded = decode(codes, fmt)
    np.testing.assert_array_equal(decoded.numpy(), codes.numpy().view(ELEMENTS[name][3]).astype(np.float32))
    table = [float(v) for v in positive_values(name)]
    assert decoded[: len(table)].tolist() == table
    assert fmt.max_value == table[-1]
    assert fmt.min_step == table[1]
    assert 2.0**fmt.min_exponent == table[2**fmt.mantissa_bits]


@each_float
def test_every_finite_code_survives_a_round_trip(name: str) -> None:
    fmt = FORMATS[name]
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    values = decode(codes, fmt)
    finite = values.isfinite()
    back = encode(values[finite], fmt)
    codes = codes[finite].clone()
    codes[codes == 1 << (fmt.bits - 1)] = 0  # -0 is written as +0
    assert back.dtype == torch.uint8
    assert back.tolist() == codes.tolist()
    assert round_to_grid(values[finite], fmt).equal(values[finite])


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.kind is ElementKind.FLOAT])
def test_scaled_formats_share_the_element_of_their_plain_name(name: str) -> None:
    plain = FORMATS[name.removeprefix("mx").removeprefix("nv").removesuffix("_block")]
    codes = torch.arange(2**plain.bits, dtype=torch.uint8)
    assert decode(codes, FORMATS[name]).nan_to_num().equal(decode(codes, plain).nan_to_num())


@each_float
def test_zero_has_no_sign_infinity_saturates_nan_stays(name: str) -> None:
    fmt = FORMATS[name]
    x = torch.tensor([-0.0, -1e-30, float("inf"), -float("inf"), float("nan")])
    values = round_to_grid(x, fmt)
    assert not values[:2].signbit().any()
    assert values[2:4].tolist() == [fmt.max_value, -fmt.max_value]
    assert values[4].isnan()
    assert x.signbit()[0]  # the input is as it was


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_grid_is_twos_complement_and_offset_binary(name: str) -> None:
    fmt = FORMATS[name]
    low, high = -(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1
    halves = [k / 2 for k in range(2 * low - 4, 2 * high + 5)]
    expected = [min(max(round(x), low), high) for x in halves]  # Python, too, rounds half to even
    assert round_to_grid(torch.tensor(halves), fmt).tolist() == expected
    values = torch.arange(low, high + 1, dtype=torch.float32)
    codes = encode(values, fmt)
    assert codes.tolist() == list(range(2**fmt.bits))
    assert decode(codes, fmt).equal(values)
    assert fmt.max_value == high


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_codes_with_every_zero_point(name: str) -> None:
    fmt = FORMATS[name]
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)[None, :]
    zero = torch.arange(2**fmt.bits, dtype=torch.uint8)[:, None]
    values = decode(codes, fmt, zero)
    assert values[3].tolist() == [u - 3 for u in range(2**fmt.bits)]
    assert encode(values, fmt, zero).equal(codes.expand(2**fmt.bits, -1))
    # Out of the window on both sides: the code saturates whatever the zero point.
    wide = torch.tensor([[-1000.0, 1000.0]]).expand(2**fmt.bits, 2)
    window = quantize_values(wide, torch.ones(1), zero, fmt)
    assert encode(window, fmt, zero).equal(torch.tensor([0, 2**fmt.bits - 1], dtype=torch.uint8).expand(2**fmt.bits, 2))


def test_half_precision_input_is_rounded_from_its_exact_value() -> None:
    x = torch.tensor([0.25, 0.75, 2.5, 5.0, -3.5], dtype=torch.bfloat16)
    values = round_to_grid(x, FORMATS["fp4"])
    assert values.dtype == torch.float32
    assert values.tolist() == [0.0, 1.0, 2.0, 4.0, -4.0]
