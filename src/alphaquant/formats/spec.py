"""What a number format is: its element grid, its scale, its groups, and what a weight costs in bits."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "FORMATS",
    "UNQUANTIZED",
    "Activation",
    "ElementKind",
    "Format",
    "Inputs",
    "ScaleKind",
    "Scheme",
    "parse_format",
]

UNQUANTIZED = ("bf16", "none")
"""Names by which a plan leaves a module in the checkpoint's own precision."""

_MODEL_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class ElementKind(Enum):
    """What an element code stands for."""

    INT = "int"
    FLOAT = "float"


class ScaleKind(Enum):
    """How a group's scale is stored: a model float, a power of two, or E4M3 under one fp32 scale a matrix."""

    MODEL = "model"
    E8M0 = "e8m0"
    E4M3 = "e4m3"


class Activation(Enum):
    """What a linear's inputs are rounded to, token by token, as it runs: bfloat16 is left as it is."""

    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


class Inputs(NamedTuple):
    """What a linear's inputs are rounded to, and how many of a token's share a scale; -1 is all of them."""

    activation: Activation = Activation.BF16
    group_size: int = -1


@dataclass(frozen=True, slots=True)
class Format:
    """A number format: an element grid of at most 8 bits and the kind of scale that goes with it.

    Attributes:
        name: the name a plan uses, such as ``int4`` or ``mxfp4``.
        kind: integer or float elements.
        bits: bits of one element code, at most 8.
        exponent_bits: 0 for integers.
        mantissa_bits: stored mantissa bits; 0 for integers.
        max_value: the largest finite grid value (for integers with the symmetric zero point).
        scale: how group scales are stored.
        native_group: the group size the hardware format is defined for, or None.
        block_rows: rows whose groups share a scale: 1, or those of a block.
    """

    name: str
    kind: ElementKind
    bits: int
    exponent_bits: int
    mantissa_bits: int
    max_value: float
    scale: ScaleKind
    native_group: int | None = None
    block_rows: int = 1

    @property
    def has_one_group(self) -> bool:
        """Whether its native group is the only one that it can have."""
        return self.scale is ScaleKind.E4M3 or self.block_rows > 1

    @property
    def bias(self) -> int:
        """Exponent bias, 2^(e-1) - 1; 0 for integers."""
        return (1 << (self.exponent_bits - 1)) - 1 if self.kind is ElementKind.FLOAT else 0

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, which subnormals share; 0 for integers."""
        return 1 - self.bias if self.kind is ElementKind.FLOAT else 0

    @property
    def min_step(self) -> float:
        """The smallest distance between two grid values: the subnormal step, or 1 for integers."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    def __str__(self) -> str:
        return self.name


def _integer(bits: int) -> Format:
    return Format(f"int{bits}", ElementKind.INT, bits, 0, 0, 2.0 ** (bits - 1) - 1, ScaleKind.MODEL)


def _floats(exponent_bits: int, mantissa_bits: int, max_value: float, **scales: ScaleKind) -> list[Format]:
    """One element type under each of the names in ``scales``."""
    bits = 1 + exponent_bits + mantissa_bits
    return [
        Format(name, ElementKind.FLOAT, bits, exponent_bits, mantissa_bits, max_value, scale, _NATIVE_GROUP[scale])
        for name, scale in scales.items()
    ]


_NATIVE_GROUP = {ScaleKind.MODEL: None, ScaleKind.E8M0: 32, ScaleKind.E4M3: 16}

# The 8-bit floats give up codes to NaN (and E5M2 to infinity), so their largest value is stated, not derived.
_ALL_FORMATS = (
    *(_integer(bits) for bits in (2, 3, 4, 6, 8)),
    *_floats(2, 1, 6.0, fp4=ScaleKind.MODEL, mxfp4=ScaleKind.E8M0, nvfp4=ScaleKind.E4M3),
    *_floats(2, 3, 7.5, fp6=ScaleKind.MODEL, mxfp6=ScaleKind.E8M0),
    *_floats(3, 2, 28.0, fp6_e3m2=ScaleKind.MODEL, mxfp6_e3m2=ScaleKind.E8M0),
    *_floats(4, 3, 448.0, fp8=ScaleKind.MODEL, mxfp8=ScaleKind.E8M0),
    Format("fp8_block", ElementKind.FLOAT, 8, 4, 3, 448.0, ScaleKind.MODEL, native_group=128, block_rows=128),
    *_floats(5, 2, 57344.0, fp8_e5m2=ScaleKind.MODEL, mxfp8_e5m2=ScaleKind.E8M0),
)

FORMATS: Mapping[str, Format] = MappingProxyType({fmt.name: fmt for fmt in _ALL_FORMATS})
"""Every format by name. Elements and MX scales: OCP Microscaling v1.0; the 8-bit floats: OCP OFP8; blocks of
128 x 128: DeepSeek-V3 (arXiv:2412.19437, section 3.3.2)."""


def parse_format(name: str) -> Format | None:
    """The format of that name; None for a name of ``UNQUANTIZED``.

    Raises:
        PlanError: the name is not known.
    """
    if name in UNQUANTIZED:
        return None
    fmt = FORMATS.get(name)
    if fmt is None:
        known = (*FORMATS, *UNQUANTIZED)
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise PlanError(f"unknown format {name!r}", remedy=f"{hint}known formats: {', '.join(known)}")
    return fmt


@dataclass(frozen=True, slots=True)
class Scheme:
    """A format as applied to a matrix: its group size, symmetry and the type its scales are stored in.

    Attributes:
        format: the number format.
        group_size: inputs that share a scale; -1 is one group a row (per channel).
        symmetric: False adds a zero point to every group; integers only.
        scale_dtype: storage type of scales whose kind is MODEL: bfloat16, float16 or float32.
        activation: what the linear's inputs are rounded to.

    Raises:
        PlanError: the parts do not go together.
    """

    format: Format
    group_size: int
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    activation: Activation = Activation.BF16

    def __post_init__(self) -> None:
        fmt = self.format
        if self.group_size != -1 and self.group_size < 1:
            raise PlanError(
                f"group size {self.group_size} of {fmt} is not possible",
                remedy="give a positive group size, or -1 for one scale a row",
            )
        if fmt.has_one_group and self.group_size != fmt.native_group:
            raise PlanError(
                f"group size {self.group_size} of {fmt} is not possible",
                remedy=f"{fmt} is defined for groups of {fmt.native_group} only",
            )
        if not self.symmetric and fmt.kind is not ElementKind.INT:
            raise PlanError(f"{fmt} cannot be asymmetric", remedy="only integer formats have a zero point")
        if self.scale_dtype not in _MODEL_SCALE_DTYPES:
            raise PlanError(
                f"scale dtype {self.scale_dtype} of {fmt} is not possible",
                remedy="use torch.bfloat16, torch.float16 or torch.float32",
            )
        if (reason := _unmultiplied(self)) is not None:
            raise PlanError(
                f"{self.activation.value} activations do not go with {self}: {reason}",
                remedy='leave the activations in bf16 ("aq": "bf16"), or choose another weight format',
            )

    def __str__(self) -> str:
        groups = "channel" if self.group_size == -1 else f"g{self.group_size}"
        zero = "" if self.symmetric else " asym"
        return f"{self.format} {groups}{zero}" + (
            "" if self.activation is Activation.BF16 else f" ×{self.activation.value}"
        )

    @property
    def inputs(self) -> Inputs:
        """How the linear's inputs are rounded: token by token, and group by group before weights in blocks."""
        is_in_groups = self.format.block_rows > 1 and self.activation is not Activation.BF16
        return Inputs(self.activation, self.group_size if is_in_groups else -1)

    @property
    def scale_bits(self) -> int:
        """Bits of one stored group scale."""
        return self.scale_dtype.itemsize * 8 if self.format.scale is ScaleKind.MODEL else 8

    def num_groups(self, in_features: int) -> int:
        """Groups in a row of ``in_features`` inputs.

        Raises:
            PlanError: the group size does not divide the row.
        """
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            fitting = [2**k for k in range(3, 11) if in_features % 2**k == 0]
            sizes = ", ".join(map(str, fitting)) if fitting else "no power of two from 8 to 1024"
            other = "another format" if self.format.has_one_group else "one of them, or -1"
            raise PlanError(
                f"group size {self.group_size} of {self.format} does not divide {in_features} inputs",
                remedy=f"use {other} (sizes that divide: {sizes})",
            )
        return in_features // self.group_size

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits a weight of one [O, I] matrix: codes, scales, zero points and NVFP4's fp32 matrix scale.

        Raises:
            PlanError: the group size does not divide the row.
        """
        group_bits = self.scale_bits + (0 if self.symmetric else self.format.bits)
        matrix_bits = 32 if self.format.scale is ScaleKind.E4M3 else 0
        scales = -(-out_features // self.format.block_rows) * self.num_groups(in_features)
        return self.format.bits + (scales * group_bits + matrix_bits) / (out_features * in_features)


def _unmultiplied(scheme: Scheme) -> str | None:
    """Why no kernel multiplies these weights with inputs of the scheme's type, or None (humming-kernels' own rule)."""
    fmt, activation = scheme.format, scheme.activation
    if activation is Activation.BF16:
        return None
    if not scheme.symmetric:
        return "a zero point would have to be taken off in the product"
    if 0 < scheme.group_size < 32:
        return "products of 8 bits need groups of 32 or more"
    if activation is Activation.INT8:
        return None if fmt.kind is ElementKind.INT else "integers are multiplied with integers"
    if fmt.kind is ElementKind.INT:
        return None if fmt.bits <= 4 else f"{fmt.bits} bits do not fit E4M3's mantissa"
    fits = fmt.exponent_bits <= 4 and fmt.mantissa_bits <= 3
    return None if fits else f"{fmt} has values that E4M3 has not"
