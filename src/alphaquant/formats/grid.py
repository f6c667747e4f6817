"""Values on an element grid, without scales: rounding onto it, and the way between values and codes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.formats.spec import ElementKind

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.formats.spec import Format

__all__ = ["Grid", "decode", "encode", "round_to_grid", "round_to_grid_"]

_EXPONENT_MASK = 0x7F800000  # of a float32's bit pattern


class Grid(NamedTuple):
    """What a kernel needs to know to round as ``quantize_values`` does.

    Attributes:
        is_float: whether steps grow with the binade.
        has_zero: whether there are zero points: integers from 0 on.
        low: the least value.
        high: the largest.
        least_binade: of floats, the power of two below which steps shrink no more.
        steps: of floats, times a binade: what rounds a number that is added to it to that binade's steps.
    """

    is_float: bool
    has_zero: bool
    low: float
    high: float
    least_binade: float
    steps: float

    @classmethod
    def of(cls, fmt: Format, *, has_zero: bool) -> Grid:
        """The grid of a format, with zero points or without."""
        is_float = fmt.kind is ElementKind.FLOAT
        low = 0.0 if has_zero else -fmt.max_value if is_float else -fmt.max_value - 1
        high = 2.0**fmt.bits - 1 if has_zero else fmt.max_value
        return cls(is_float, has_zero, low, high, 2.0**fmt.min_exponent, 1.5 * 2.0 ** (23 - fmt.mantissa_bits))


def round_to_grid(x: Tensor, fmt: Format) -> Tensor:
    """The nearest grid value of every element of ``x`` (any shape), as float32.

    Ties go to the even mantissa, values out of range saturate, NaN stays NaN; a float zero has no sign.
    Integers use the symmetric range -2^(b-1) .. 2^(b-1)-1.
    """
    return round_to_grid_(x.to(torch.float32, copy=True), fmt)


def round_to_grid_(x: Tensor, fmt: Format) -> Tensor:
    """``round_to_grid`` in place on float32 ``x``, which it returns."""
    if fmt.kind is ElementKind.INT:
        return x.round_().clamp_(-fmt.max_value - 1, fmt.max_value)
    # Clamp first: the largest value is on the grid, so rounding cannot leave the range, and infinity is gone.
    x.clamp_(-fmt.max_value, fmt.max_value)
    # The exponent bits of x alone are 2^floor(log2|x|): its binade, held at the smallest normal one for
    # subnormals. Added to 1.5 * 2^23 grid steps of that binade, x is rounded by the adder to whole steps, half
    # to even; taking them off again is exact. The upper edge of a binade is on the grid of both, so a value
    # that rounds up to it needs no correction.
    binade = (x.view(torch.int32) & _EXPONENT_MASK).view(torch.float32).clamp_min_(2.0**fmt.min_exponent)
    shift = binade.mul_(1.5 * 2.0 ** (23 - fmt.mantissa_bits))
    return x.add_(shift).sub_(shift)


def encode(values: Tensor, fmt: Format, zero: Tensor | None = None) -> Tensor:
    """Codes (uint8) of values that lie on the grid, as ``round_to_grid`` or ``quantize_values`` return them.

    Args:
        values: float32, any shape; must be on the grid and finite.
        fmt: the element format.
        zero: zero points (uint8) of asymmetric integers, broadcast against ``values``; None is 2^(b-1).

    Returns:
        Integers: value + zero. Floats: sign, exponent and mantissa bits; -0 becomes +0.
    """
    if fmt.kind is ElementKind.INT:
        if zero is None:  # in bytes, which wrap around: a quarter of the memory is moved
            return values.to(torch.int8).view(torch.uint8).add_(1 << (fmt.bits - 1))
        return (values + zero).to(torch.uint8)
    magnitude = values.abs()
    # A normal number's exponent and mantissa are the top bits of the float32, under another bias.
    rebias = (127 - fmt.bias) << fmt.mantissa_bits
    normal = (magnitude.view(torch.int32) >> (23 - fmt.mantissa_bits)).sub_(rebias)
    subnormal = (magnitude * (1.0 / fmt.min_step)).to(torch.int32)
    code = torch.where(magnitude < 2.0**fmt.min_exponent, subnormal, normal)
    code.add_((values < 0).to(torch.int32), alpha=1 << (fmt.bits - 1))
    return code.to(torch.uint8)


def decode(codes: Tensor, fmt: Format, zero: Tensor | None = None) -> Tensor:
    """Grid values (float32) of uint8 ``codes`` of any shape; the inverse of ``encode``.

    Args:
        codes: uint8, below 2^bits.
        fmt: the element format.
        zero: zero points (uint8) of asymmetric integers, broadcast against ``codes``; None is 2^(b-1).
    """
    if fmt.kind is ElementKind.INT:
        if zero is None:
            return (codes - (1 << (fmt.bits - 1))).view(torch.int8).float()
        return codes.float() - zero
    table = torch.tensor(_float_table(fmt), dtype=torch.float32, device=codes.device)
    return table[codes.int()]


@cache
def _float_table(fmt: Format) -> tuple[float, ...]:
    """The value of every code of a float format, specials included."""
    half = 1 << (fmt.bits - 1)
    positive = [_float_value(code, fmt) for code in range(half)]
    return (*positive, *(-value for value in positive))


def _float_value(code: int, fmt: Format) -> float:
    exponent, mantissa = divmod(code, 1 << fmt.mantissa_bits)
    if exponent == 0:
        return mantissa * fmt.min_step
    value = (mantissa + (1 << fmt.mantissa_bits)) * fmt.min_step * 2.0 ** (exponent - 1)
    if value <= fmt.max_value:
        return value
    # Past the largest value: E5M2 follows IEEE (infinity, then NaN), E4M3 has NaN alone.
    is_infinity = fmt.exponent_bits == 5 and mantissa == 0
    return float("inf") if is_infinity else float("nan")
