"""The slow truth: GPTQ, scale refit and coordinate descent in float64, one matrix at a time, straight from the papers.

Nothing here comes from the library but the data types: grids are enumerated, inverses are inverted, sums are sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alphaquant.formats import FORMATS, ElementKind, Format, ScaleKind, Scheme

if TYPE_CHECKING:
    from alphaquant.solver import Scales

_EXPONENT_AND_MANTISSA = {
    "fp4": (2, 1, 6.0),
    "fp6": (2, 3, 7.5),
    "fp6_e3m2": (3, 2, 28.0),
    "fp8": (4, 3, 448.0),
    "fp8_e5m2": (5, 2, 57344.0),
}


def grid(fmt: Format) -> Tensor:
    """All finite values of a symmetric format, rising, float64."""
    if fmt.kind is ElementKind.INT:
        half = 2 ** (fmt.bits - 1)
        return torch.arange(-half, half, dtype=torch.float64)
    exponent_bits, mantissa_bits, largest = _EXPONENT_AND_MANTISSA[_element(fmt)]
    bias = 2 ** (exponent_bits - 1) - 1
    values = {0.0}
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
            if value <= largest:
                values |= {value, -value}
    return torch.tensor(sorted(values), dtype=torch.float64)


def _element(fmt: Format) -> str:
    """The name of the element: `mxfp4` and `nvfp4` are made of `fp4`."""
    return fmt.name.removeprefix("mx").removeprefix("nv").removesuffix("_block")


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """The nearest of the rising `values`; halfway between two, the one whose mantissa is even."""
    right = torch.searchsorted(values, x.contiguous()).clamp(1, len(values) - 1)
    low, high = values[right - 1], values[right]
    middle = (low + high) / 2
    zero_at = int((values == 0).nonzero())
    low_is_even = (right - 1 - zero_at) % 2 == 0
    take_low = (x < middle) | ((x == middle) & low_is_even)
    return torch.where(take_low, low, high)


@dataclass
class Matrix:
    """One weight `[O, I]` with the scales of its groups spread over columns, all float64."""

    w: Tensor
    step: Tensor
    zero: Tensor | None
    scheme: Scheme

    @classmethod
    def of(cls, w: Tensor, scales: Scales, scheme: Scheme, expert: int = 0) -> Matrix:
        """Matrix `expert` of a stack `[E, O, I]` and its scales."""
        size = w.shape[-1]
        width = size if scheme.group_size == -1 else scheme.group_size
        scale = scales.scale[expert]
        if scales.global_scale is not None:
            scale = scale / scales.global_scale[expert]  # the one division that the format defines in fp32
        step = scale.double().repeat_interleave(width, 1)
        zero = None if scales.zero is None else scales.zero[expert].double().repeat_interleave(width, 1)
        return cls(w[expert].double(), step, zero, scheme)

    def round(self, x: Tensor, column: int | slice) -> Tensor:
        """Grid values of what the columns should become."""
        x = x / self.step[:, column]
        if self.zero is None:
            return nearest(x, grid(self.scheme.format))
        zero = self.zero[:, column]
        return (x.round() + zero).clamp(0, 2.0**self.scheme.format.bits - 1) - zero

    def margin(self, x: Tensor, column: int) -> float:
        """How far the nearest target is from a tie, in steps of the scale."""
        x = x / self.step[:, column]
        if self.zero is not None:
            return float((x - x.floor() - 0.5).abs().min())
        values = grid(self.scheme.format)
        middles = (values[1:] + values[:-1]) / 2
        return float((x[:, None] - middles).abs().min())

    def codes(self, values: Tensor) -> Tensor:
        """Bit patterns of grid values, found by searching the list of all of them."""
        fmt = self.scheme.format
        if fmt.kind is ElementKind.INT:
            return (values + (2.0 ** (fmt.bits - 1) if self.zero is None else self.zero)).to(torch.uint8)
        positive = grid(fmt)[grid(fmt) >= 0]
        code = torch.searchsorted(positive, values.abs())
        return (code + torch.where(values < 0, 2 ** (fmt.bits - 1), 0)).to(torch.uint8)


@dataclass
class Answer:
    """Grid values, the weight that they stand for, its loss a row, and the least distance to a tie on the way."""

    values: Tensor
    quantized: Tensor
    loss: Tensor
    margin: float


def damped(h: Tensor, damping: float) -> Tensor:
    """`H` with dead columns made average and `damping` times the mean diagonal added, float64."""
    h = h.double().clone()
    size = h.shape[0]
    mean = float(h.diagonal().sum()) / size or 1.0
    for j in range(size):
        h[j, j] = (h[j, j] if h[j, j] > 0 else mean) + damping * mean
    return h


def loss(error: Tensor, h: Tensor) -> Tensor:
    """`e H eᵀ` a row."""
    return torch.stack([row @ h @ row for row in error])


def gptq(matrix: Matrix, h: Tensor, *, act_order: bool) -> Answer:
    """Frantar et al. 2022, algorithm 1 without blocks, on an `h` that is damped already; static groups."""
    size = h.shape[0]
    order = sorted(range(size), key=lambda j: (-float(h[j, j]), j)) if act_order else list(range(size))
    inverse = torch.linalg.inv(h[order][:, order])
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    target = matrix.w[:, order].clone()
    values, quantized = torch.zeros_like(matrix.w), torch.zeros_like(matrix.w)
    margin = math.inf
    for position, column in enumerate(order):
        t = target[:, position].clone()
        margin = min(margin, matrix.margin(t, column))
        values[:, column] = matrix.round(t, column)
        quantized[:, column] = values[:, column] * matrix.step[:, column]
        error = (t - quantized[:, column]) / upper[position, position]
        target[:, position:] -= torch.outer(error, upper[position, position:])
    return Answer(values, quantized, loss(matrix.w - quantized, h), margin)


def plain_rounding(matrix: Matrix) -> Tensor:
    """Grid values of plain rounding."""
    return matrix.round(matrix.w, slice(None))


def refine(matrix: Matrix, values: Tensor, h: Tensor, sweeps: int, *, codes: bool = True) -> tuple[Matrix, Tensor]:
    """Group by group, and row by row or block by block: the stored scale of least loss, then every code (CDQuant)."""
    size = h.shape[0]
    width = size if matrix.scheme.group_size == -1 else matrix.scheme.group_size
    matrix, values = replace(matrix, step=matrix.step.clone()), values.clone()
    for _ in range(sweeps):
        for start in range(0, size, width):
            group = slice(start, start + width)
            if matrix.scheme.format.scale is ScaleKind.MODEL:
                block = matrix.scheme.format.block_rows
                for row in range(0, values.shape[0], block):
                    _refit(matrix, values, h, slice(row, row + block), group)
            for j in range(start, start + width) if codes else ():
                q = values * matrix.step
                pull = (matrix.w - q) @ h[:, j]
                values[:, j] = matrix.round(q[:, j] + pull / h[j, j], j)
    return matrix, values


def _refit(matrix: Matrix, values: Tensor, h: Tensor, rows: slice, group: slice) -> None:
    c = torch.zeros_like(values[rows])
    c[:, group] = values[rows, group]
    error = matrix.w[rows] - values[rows] * matrix.step[rows]
    old, curve = float(matrix.step[rows.start, group.start]), float(loss(c, h).sum())
    if curve <= 0:
        return
    best = sum(float(c_row @ h @ (error_row + c_row * old)) for c_row, error_row in zip(c, error, strict=True)) / curve
    if abs(best / old - 1) >= 0.5:
        return
    new = torch.tensor(best).to(matrix.scheme.scale_dtype).double()
    if loss(error + c * (old - new), h).sum() < loss(error, h).sum():
        matrix.step[rows, group] = new


def all_schemes(*groups: int) -> list[Scheme]:
    """Every format with each of these group sizes (or its own groups), symmetric and not; rows share no scale.

    `test_blocks` has those whose rows do.
    """
    schemes = []
    for fmt in (fmt for fmt in FORMATS.values() if fmt.block_rows == 1):
        sizes = (fmt.native_group,) if fmt.scale is ScaleKind.E4M3 else groups
        for size in sizes:
            assert size is not None
            schemes.append(Scheme(fmt, size))
            if fmt.kind is ElementKind.INT:
                schemes.append(Scheme(fmt, size, symmetric=False))
    return schemes


def default_schemes() -> list[Scheme]:
    """Every format once, in groups of 32 or its own blocks, integers with and without zero points."""
    return all_schemes(32)


def scheme_id(scheme: Scheme) -> str:
    """A test id without spaces."""
    return str(scheme).replace(" ", "-")


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Weights as real ones are: nearly Gaussian, rows of different size, not centred."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    spread = torch.rand(*shape[:-1], 1, generator=generator) + 0.5
    return (w + 0.1) * spread * 0.05


def hessian(size: int, tokens: int = 0, seed: int = 0, correlation: float = 0.7) -> Tensor:
    """Mean Hessian `[I, I]` fp32 of correlated inputs whose channels differ in size."""
    return hessians(1, size, tokens, seed, correlation)[0]


def hessians(experts: int, size: int, tokens: int = 0, seed: int = 0, correlation: float = 0.7) -> Tensor:
    """Mean Hessians `[E, I, I]` fp32, one for each expert, each of other inputs."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens = tokens or 6 * size
    x = torch.randn(experts, tokens, size, generator=generator, dtype=torch.float64)
    common = torch.randn(experts, tokens, 1, generator=generator, dtype=torch.float64)
    channels = torch.rand(experts, 1, size, generator=generator, dtype=torch.float64) * 2 + 0.2
    x = (x * math.sqrt(1 - correlation) + common * math.sqrt(correlation)) * channels
    h = x.transpose(1, 2) @ x / tokens
    return h.float()
