"""Weights to codes and scales, and back.

Shapes: w [..., O, I] (O out, I in, any leading dimensions), scale [..., O, G] with G groups of I/G inputs.
The float32 arithmetic here on the CPU is the specification: x / scale by one IEEE division, then round half to even.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.formats.grid import decode, encode, round_to_grid_
from alphaquant.formats.spec import FORMATS, ElementKind, ScaleKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from alphaquant.formats.spec import Format, Scheme

__all__ = [
    "QuantizedTensor",
    "dequantize",
    "initial_scale",
    "matrix_scale",
    "pool_rows",
    "quantize",
    "quantize_values",
    "quantize_with",
    "round_scale",
    "scale_bounds",
]

_E4M3 = FORMATS["fp8"]
_LARGEST_BF16 = float(torch.finfo(torch.bfloat16).max)
_SMALLEST_NORMAL = 2.0**-126  # of float32 and bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """Codes and scales of a weight [..., O, I]: the result that is stored; the float weight is derived from it.

    Attributes:
        codes: uint8 [..., O, I], bit patterns of ``scheme.format.bits`` bits.
        scale: float32 [..., O, G], every value exact in the scheme's storage type; rows of a block hold the same.
        zero: uint8 [..., O, G] for asymmetric integers, else None.
        global_scale: float32 [...] for NVFP4, which it divides: w = value * (scale / global_scale); else None.
        scheme: the format and its groups.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    global_scale: Tensor | None
    scheme: Scheme

    def sha256(self) -> str:
        """A hash of codes, scales and zero points: the same in whatever layout they are stored."""
        digest = hashlib.sha256(f"{self.scheme.format} {self.scheme.group_size} {self.scheme.symmetric}".encode())
        for tensor in (self.codes, self.scale, self.zero, self.global_scale):
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def effective_scale(self) -> Tensor:
        """What a grid value is multiplied by, float32 [..., O, G]."""
        return _effective_scale(self.scale, self.global_scale)


def round_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """Scales as the scheme stores them: positive, finite, never zero, returned as float32 of the same shape.

    MODEL rounds to nearest, E4M3 to nearest even within 2^-9 .. 448, E8M0 up to a power of two. Scales so large
    that the largest grid value would overflow bfloat16 are held at the largest that does not.
    """
    kind = scheme.format.scale
    scale = scale.float()
    if kind is ScaleKind.E4M3:
        return round_to_grid_(scale.clamp(_E4M3.min_step, _E4M3.max_value), _E4M3)
    if kind is ScaleKind.E8M0:
        bits = scale.clamp(2.0**-127, _power_of_two_below(_LARGEST_BF16 / scheme.format.max_value)).view(torch.int32)
        # Adding all mantissa bits carries into the exponent unless the mantissa is zero: ceil(log2), exactly.
        ceiling = (bits + 0x007FFFFF) & 0x7F800000
        # 2^-127 has no normal float32: it is the pattern 0x00400000.
        return torch.where(bits <= 0x00400000, 0x00400000, ceiling).view(torch.float32)
    return scale.clamp(*scale_bounds(scheme)).to(scheme.scale_dtype).float()


def scale_bounds(scheme: Scheme) -> tuple[float, float]:
    """The least and the largest scale of kind MODEL."""
    return _smallest_scale(scheme.scale_dtype), _largest_scale(scheme)


def initial_scale(
    w: Tensor, scheme: Scheme, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Absmax scales of a weight: (scale, zero or None, global_scale or None), shaped as in ``QuantizedTensor``.

    Symmetric integers divide the absolute maximum by (2^b - 1) / 2, floats by the largest grid value; E8M0 rounds
    that up, so nothing is clipped. A group of zeros gets scale 1.

    Args:
        w: [..., O, I], any float type, finite.
        scheme: the format and its groups.
        global_scale: NVFP4's matrix scale where matrices share one (gate with up; q, k, v); None: its own.

    Raises:
        PlanError: the group size does not divide I.
    """
    fmt = scheme.format
    low, high = (bound.float() for bound in torch.aminmax(_grouped(w, scheme), dim=-1))
    if not scheme.symmetric:
        levels = 2.0**fmt.bits - 1
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = _nonzero_groups(round_scale((high - low) / levels, scheme), high - low)
        zero = (-low / scale).round_().clamp_(0, levels).to(torch.uint8)
        return scale, zero, None
    absmax = pool_rows(torch.maximum(-low, high), scheme, torch.amax)
    if fmt.scale is ScaleKind.E4M3:
        if global_scale is None:
            global_scale = _matrix_scale(absmax.amax(dim=(-2, -1)))
        raw = absmax / fmt.max_value * global_scale[..., None, None]
        return _nonzero_groups(round_scale(raw, scheme), absmax), None, global_scale
    # Correctly rounded division decides ceil(log2) exactly: a float32 above max_value * 2^k has a quotient above
    # 2^k by more than half an ulp, and one below it stays below.
    span = (2.0**fmt.bits - 1) / 2 if fmt.kind is ElementKind.INT else fmt.max_value
    return _nonzero_groups(round_scale(absmax / span, scheme), absmax), None, None


def pool_rows(x: Tensor, scheme: Scheme, pool: Callable[..., Tensor] = torch.sum) -> Tensor:
    """The sum (or ``torch.amax``, of nothing negative) over the rows that share a scale, in each of their places.

    Args:
        x: [..., O, G].
        scheme: says which do: blocks of rows from the first on, the last one as tall as is left.
        pool: takes a tensor, a dimension and ``keepdim``.
    """
    rows, block = x.shape[-2], scheme.format.block_rows
    if block == 1:
        return x
    blocks = F.pad(x, (0, 0, 0, -rows % block)).unflatten(-2, (-1, block))
    return pool(blocks, -2, keepdim=True).expand_as(blocks).flatten(-3, -2)[..., :rows, :]


def matrix_scale(w: Tensor) -> Tensor:
    """NVFP4's matrix scale 448 * 6 / absmax, float32 [...] for w [..., O, I]; matrices sharing one take the least."""
    low, high = (bound.float() for bound in torch.aminmax(w.flatten(-2), dim=-1))
    return _matrix_scale(torch.maximum(-low, high))


def quantize_values(w: Tensor, effective_scale: Tensor, zero: Tensor | None, fmt: Format) -> Tensor:
    """Grid values (float32) of ``w``: round half to even of w / scale, saturated; the inner loop of every solver.

    Args:
        w: any shape, any float type.
        effective_scale: float32, broadcast against ``w``.
        zero: zero points of asymmetric integers, uint8 or whole floats, broadcast against ``w``; else None.
        fmt: the element format.

    Returns:
        The value that ``effective_scale`` multiplies; for asymmetric integers the zero point is already taken off.
    """
    values = torch.div(w.float(), effective_scale)
    if zero is None:
        return round_to_grid_(values, fmt)
    return values.round_().add_(zero).clamp_(0, 2.0**fmt.bits - 1).sub_(zero)


def quantize(w: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Round-to-nearest of a weight [..., O, I] with its absmax scales.

    Raises:
        PlanError: the group size does not divide I.
    """
    return quantize_with(w, scheme, *initial_scale(w, scheme))


def quantize_with(
    w: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None = None, global_scale: Tensor | None = None
) -> QuantizedTensor:
    """Round-to-nearest of a weight [..., O, I] with given scales, which must come from ``round_scale``.

    Raises:
        PlanError: the group size does not divide I.
    """
    zeros = None if zero is None else zero[..., None]
    steps = _effective_scale(scale, global_scale)[..., None]
    values = quantize_values(_grouped(w, scheme), steps, zeros, scheme.format)
    codes = encode(values, scheme.format, zeros).reshape(w.shape)
    return QuantizedTensor(codes, scale, zero, global_scale, scheme)


def dequantize(q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [..., O, I] that the codes stand for: a float32 product, then one cast to ``dtype``."""
    zeros = None if q.zero is None else q.zero[..., None]
    values = decode(_grouped(q.codes, q.scheme), q.scheme.format, zeros)
    return values.mul_(q.effective_scale()[..., None]).reshape(q.codes.shape).to(dtype)


def _grouped(x: Tensor, scheme: Scheme) -> Tensor:
    groups = scheme.num_groups(x.shape[-1])
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def _effective_scale(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    return scale if global_scale is None else scale / global_scale[..., None, None]


def _nonzero_groups(scale: Tensor, extent: Tensor) -> Tensor:
    """``scale``, but 1 where the group's extent is zero."""
    return torch.where(extent == 0, 1.0, scale)


def _matrix_scale(absmax: Tensor) -> Tensor:
    top = _E4M3.max_value * FORMATS["nvfp4"].max_value
    # Bounds that keep scale / global a normal float32 and its products within bfloat16.
    scale = (top / absmax).clamp_(top / _LARGEST_BF16, _E4M3.min_step / _SMALLEST_NORMAL)
    return _nonzero_groups(scale, absmax)


def _smallest_scale(dtype: torch.dtype) -> float:
    """float16 scales need its subnormals; elsewhere the smallest normal is small enough and safe from flushing."""
    info = torch.finfo(dtype)
    return max(float(info.smallest_normal * info.eps), _SMALLEST_NORMAL)


def _largest_scale(scheme: Scheme) -> float:
    """The largest storable scale whose product with every grid value is finite in bfloat16."""
    fmt = scheme.format
    if fmt.kind is ElementKind.FLOAT:
        reach = fmt.max_value
    else:
        reach = 2.0 ** (fmt.bits - 1) if scheme.symmetric else 2.0**fmt.bits - 1
    fraction, exponent = math.frexp(_LARGEST_BF16 / reach)
    bound = math.ldexp(math.floor(fraction * 256), exponent - 8)  # cut to bfloat16's 8 significant bits
    return min(bound, float(torch.finfo(scheme.scale_dtype).max))


def _power_of_two_below(x: float) -> float:
    return math.ldexp(0.5, math.frexp(x)[1])
