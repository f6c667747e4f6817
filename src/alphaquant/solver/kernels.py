"""Triton kernels of the solver's inner loops, for GPUs; imported only where one is used.

Each does what the torch code beside it does (`gptq.solve`, `refine`, `HessianSum`), which is the specification: the
same IEEE divisions, the same ties, sums in another order. `TRITON_INTERPRET=1`, set before the import, runs them on a
CPU. Shapes as in `gptq`: columns first, `[E, I, O]`, contiguous, fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from alphaquant.formats import Grid

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.formats import Format
    from alphaquant.solver.gptq import Columns

__all__ = ["add_grams", "descend_block", "sums", "walk_block"]

_ROWS_A_TILE = 32  # outputs that a program keeps in registers beside a block of columns
_TILE = 64  # columns of a Gram matrix that a program sums
_TOKENS = 32  # rows of inputs that it takes at a time

# 1.5 * 2^23: a float32 below 2^22 that is added to it is rounded to a whole number, half to even
_WHOLE = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator]
def _grid_value(
    x: Any,
    zero: Any,
    IS_FLOAT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LEAST_BINADE: tl.constexpr,
    STEPS: tl.constexpr,
) -> Any:
    """Nearest grid value of `x`, as `formats.quantize_values` rounds."""
    if IS_FLOAT:
        x = tl.minimum(tl.maximum(x, LOW), HIGH)
        exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
        binade = tl.maximum(exponent.to(tl.float32, bitcast=True), LEAST_BINADE)
        shift = binade * STEPS
        return (x + shift) - shift
    # far beyond the grid it makes no difference, and rounding by addition needs small numbers
    x = tl.minimum(tl.maximum(x, -4194303.0), 4194303.0)
    x = (x + _WHOLE) - _WHOLE
    if HAS_ZERO:
        return tl.minimum(tl.maximum(x + zero, LOW), HIGH) - zero
    return tl.minimum(tl.maximum(x, LOW), HIGH)


@triton.jit  # type: ignore[untyped-decorator]
def _walk_kernel(
    target_ptr: Any,
    w_ptr: Any,
    step_ptr: Any,
    zero_ptr: Any,
    feedback_ptr: Any,
    value_ptr: Any,
    error_ptr: Any,
    num_columns: Any,
    num_rows: Any,
    start: Any,
    width: Any,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LEAST_BINADE: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    expert = tl.program_id(0).to(tl.int64)
    row_O = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column_B = tl.arange(0, COLUMNS)
    has_row, has_column = row_O < num_rows, column_B < width
    first = (expert * num_columns + start) * num_rows  # of this expert's and block's entries of [E, I, O]
    tile = first + column_B[:, None] * num_rows + row_O[None, :]
    inside = has_column[:, None] & has_row[None, :]
    target_BO = tl.load(target_ptr + tile, mask=inside, other=0.0)
    for j in range(width):
        at = first + j * num_rows + row_O
        is_this = column_B == j
        target_O = tl.sum(tl.where(is_this[:, None], target_BO, 0.0), 0)
        step_O = tl.load(step_ptr + at, mask=has_row, other=1.0)
        zero_O = tl.load(zero_ptr + at, mask=has_row, other=0.0) if HAS_ZERO else 0.0
        value_O = _grid_value(tl.div_rn(target_O, step_O), zero_O, IS_FLOAT, HAS_ZERO, LOW, HIGH, LEAST_BINADE, STEPS)
        quantized_O = value_O * step_O
        error_O = tl.load(w_ptr + at, mask=has_row, other=0.0) - quantized_O
        tl.store(value_ptr + at, value_O, mask=has_row)
        tl.store(error_ptr + at, error_O, mask=has_row)
        feedback = feedback_ptr + (expert * num_columns + start + j) * num_columns + start + column_B
        reach_B = tl.load(feedback, mask=has_column & (column_B > j), other=0.0)
        left_BO = target_BO + reach_B[:, None] * error_O[None, :]
        target_BO = tl.where(is_this[:, None], (target_O - quantized_O)[None, :], left_BO)
    tl.store(target_ptr + tile, target_BO, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _descend_kernel(
    gradient_ptr: Any,
    q_ptr: Any,
    step_ptr: Any,
    zero_ptr: Any,
    h_ptr: Any,
    value_ptr: Any,
    moved_ptr: Any,
    num_columns: Any,
    num_rows: Any,
    start: Any,
    width: Any,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    LEAST_BINADE: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    expert = tl.program_id(0).to(tl.int64)
    row_O = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column_B = tl.arange(0, COLUMNS)
    has_row, has_column = row_O < num_rows, column_B < width
    first = (expert * num_columns + start) * num_rows
    tile = (expert * width + column_B[:, None]) * num_rows + row_O[None, :]
    inside = has_column[:, None] & has_row[None, :]
    gradient_BO = tl.load(gradient_ptr + tile, mask=inside, other=0.0)
    for j in range(width):
        at = first + j * num_rows + row_O
        curvature = h_ptr + (expert * num_columns + start + j) * num_columns + start
        gradient_O = tl.sum(tl.where((column_B == j)[:, None], gradient_BO, 0.0), 0)
        old_O = tl.load(q_ptr + at, mask=has_row, other=0.0)
        step_O = tl.load(step_ptr + at, mask=has_row, other=1.0)
        zero_O = tl.load(zero_ptr + at, mask=has_row, other=0.0) if HAS_ZERO else 0.0
        inverse = tl.div_rn(1.0, tl.load(curvature + j))
        target_O = old_O + gradient_O * inverse
        value_O = _grid_value(tl.div_rn(target_O, step_O), zero_O, IS_FLOAT, HAS_ZERO, LOW, HIGH, LEAST_BINADE, STEPS)
        new_O = value_O * step_O
        tl.store(value_ptr + at, value_O, mask=has_row)
        tl.store(q_ptr + at, new_O, mask=has_row)
        tl.store(moved_ptr + (expert * width + j) * num_rows + row_O, old_O - new_O, mask=has_row)
        reach_B = tl.load(curvature + column_B, mask=has_column & (column_B > j), other=0.0)
        gradient_BO += reach_B[:, None] * (old_O - new_O)[None, :]
    tl.store(gradient_ptr + tile, gradient_BO, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _dot(a: Any, b: Any, total: Any, UPCAST: tl.constexpr) -> Any:
    if UPCAST:  # Triton's interpreter takes the bit patterns of bf16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _gram_kernel(
    x_ptr: Any,
    weight_ptr: Any,
    start_ptr: Any,
    tile_ptr: Any,
    sum_ptr: Any,
    num_columns: Any,
    HAS_WEIGHT: tl.constexpr,
    IS_BF16: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    expert = tl.program_id(0).to(tl.int64)
    up = tl.load(tile_ptr + 2 * tl.program_id(1))
    across = tl.load(tile_ptr + 2 * tl.program_id(1) + 1)
    begin, end = tl.load(start_ptr + expert), tl.load(start_ptr + expert + 1)
    column_I, column_J = up * TILE + tl.arange(0, TILE), across * TILE + tl.arange(0, TILE)
    has_I, has_J = column_I < num_columns, column_J < num_columns
    total_IJ = tl.zeros((TILE, TILE), tl.float32)
    for first in range(begin, end, TOKENS):
        row_R = first + tl.arange(0, TOKENS)
        has_row = row_R < end
        at_R = row_R.to(tl.int64) * num_columns
        x_IR = tl.load(x_ptr + at_R[None, :] + column_I[:, None], mask=has_row[None, :] & has_I[:, None], other=0.0)
        x_RJ = tl.load(x_ptr + at_R[:, None] + column_J[None, :], mask=has_row[:, None] & has_J[None, :], other=0.0)
        if HAS_WEIGHT:
            weighed_RJ = x_RJ.to(tl.float32) * tl.load(weight_ptr + row_R, mask=has_row, other=0.0)[:, None]
            if IS_BF16:
                # a weighted row no longer fits bf16: its rounding error, as a second operand, keeps 16 bits of it
                high_RJ = weighed_RJ.to(tl.bfloat16)
                low_RJ = (weighed_RJ - high_RJ.to(tl.float32)).to(tl.bfloat16)
                total_IJ = _dot(x_IR, high_RJ, total_IJ, UPCAST)
                total_IJ = _dot(x_IR, low_RJ, total_IJ, UPCAST)
            else:
                total_IJ = _dot(x_IR, weighed_RJ, total_IJ, UPCAST)
        else:
            total_IJ = _dot(x_IR, x_RJ, total_IJ, UPCAST)
    if up == across:  # weights stand on one side only: the other triangle differs in its last bits
        total_IJ = 0.5 * (total_IJ + tl.trans(total_IJ))
    out = sum_ptr + (expert * num_columns + column_I[:, None]) * num_columns + column_J[None, :]
    inside = has_I[:, None] & has_J[None, :]
    tl.store(out, tl.load(out, mask=inside, other=0.0) + total_IJ, mask=inside)


def walk_block(
    target_EIO: Tensor,
    columns: Columns,
    feedback_EII: Tensor,
    value_EIO: Tensor,
    error_EIO: Tensor,
    cut: slice,
    fmt: Format,
) -> None:
    """GPTQ over the columns of `cut`, of all experts and rows, in one launch; see `gptq.solve`.

    Writes grid values and errors `w - q` of these columns, and leaves `t - q` in `target_EIO`; later columns stay.
    """
    scales = (columns.step_EIO, _zero_pointer(columns))
    tensors = (target_EIO, columns.w_EIO, *scales, feedback_EII, value_EIO, error_EIO)
    _launch(_walk_kernel, tensors, columns, cut, fmt)


def descend_block(
    gradient_EBO: Tensor,
    q_EIO: Tensor,
    columns: Columns,
    h_EII: Tensor,
    value_EIO: Tensor,
    cut: slice,
    fmt: Format,
) -> Tensor:
    """Coordinate descent over the columns of `cut`, of all experts and rows, in one launch; see `refine`.

    Writes values and quantized weights of these columns, and the gradient that each saw as it moved.

    Returns:
        How far they moved, `[E, B, O]` for B columns.
    """
    moved_EBO = torch.empty(q_EIO.shape[0], cut.stop - cut.start, q_EIO.shape[2], device=q_EIO.device)
    scales = (columns.step_EIO, _zero_pointer(columns))
    tensors = (gradient_EBO, q_EIO, *scales, h_EII, value_EIO, moved_EBO)
    _launch(_descend_kernel, tensors, columns, cut, fmt)
    return moved_EBO


def sums(x_RI: Tensor) -> bool:  # noqa: ARG001  (of any width and dtype)
    """Whether `add_grams` takes such rows: always."""
    return True


def add_grams(sum_EII: Tensor, x_RI: Tensor, counts_E: Tensor, weight_R: Tensor | None) -> None:
    """Add `Σ weight · x xᵀ` of each expert's rows to the upper triangle of its sum, in one launch.

    Tiles that the diagonal crosses are whole and symmetric. Products are of the inputs' own type with fp32 sums;
    weights of bf16 rows keep 16 bits.

    Args:
        sum_EII: fp32, changed.
        x_RI: rows sorted by expert, bf16 or fp32, contiguous.
        counts_E: rows of each expert, int64 on the same device.
        weight_R: fp32; None: all one.
    """
    num_experts, size, _ = sum_EII.shape
    starts = torch.zeros(num_experts + 1, dtype=torch.int64, device=x_RI.device)
    torch.cumsum(counts_E, 0, out=starts[1:])
    num_tiles = triton.cdiv(size, _TILE)
    tiles = torch.triu_indices(num_tiles, num_tiles, device=x_RI.device).T.to(torch.int32).contiguous()
    _gram_kernel[num_experts, len(tiles)](
        x_RI,
        x_RI if weight_R is None else weight_R,
        starts,
        tiles,
        sum_EII,
        size,
        HAS_WEIGHT=weight_R is not None,
        IS_BF16=x_RI.dtype is torch.bfloat16,
        UPCAST=triton.knobs.runtime.interpret,
        TILE=_TILE,
        TOKENS=_TOKENS,
    )


def _zero_pointer(columns: Columns) -> Tensor:
    """Zero points, or a pointer that is never read."""
    return columns.step_EIO if columns.zero_EIO is None else columns.zero_EIO


def _launch(kernel: Any, tensors: tuple[Tensor, ...], columns: Columns, cut: slice, fmt: Format) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors)
    num_experts, num_columns, num_rows = columns.w_EIO.shape
    width = cut.stop - cut.start
    grid = Grid.of(fmt, has_zero=columns.zero_EIO is not None)
    kernel[num_experts, triton.cdiv(num_rows, _ROWS_A_TILE)](
        *tensors,
        num_columns,
        num_rows,
        cut.start,
        width,
        COLUMNS=triton.next_power_of_2(width),
        ROWS=_ROWS_A_TILE,
        IS_FLOAT=grid.is_float,
        HAS_ZERO=grid.has_zero,
        LOW=grid.low,
        HIGH=grid.high,
        LEAST_BINADE=grid.least_binade,
        STEPS=grid.steps,
    )
