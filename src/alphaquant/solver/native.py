"""The solver's inner loops in C, for CPUs: several times as fast as torch, whose operations here are too small.

Each function of `native.c` does what the torch code beside it does (`gptq.solve`, `refine`, `scales`), which is the
specification: the same IEEE divisions, the same ties, sums in another order. Threads share the rows.

On a CPU with AMX the products of the walk and of the refinement go through tiles of bf16: each number as the sum of
two, three products for one. What is multiplied again and again is packed once (`packed`), what changes as it changes.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.compiled import blocks_of, library, run_parts
from alphaquant.formats import Grid
from alphaquant.solver.bands import width_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from alphaquant.formats import Format
    from alphaquant.solver.factor import Factor
    from alphaquant.solver.gptq import Columns
    from alphaquant.solver.places import Factors, Ground
    from alphaquant.solver.scales import Scales

__all__ = [
    "Storage",
    "Sweeps",
    "add_grams",
    "add_products",
    "descend_block",
    "draw_places",
    "fits_tiles",
    "has_tiles",
    "is_available",
    "least_rounding_errors",
    "packed",
    "refine",
    "rounding_errors",
    "sums",
    "turned",
    "walk",
    "walk_block",
    "weigh_places",
    "weights_of_places",
]

_SOURCE = Path(__file__).with_name("native.c")
_ROWS, _COLUMNS = 64, 128  # of a tile, as in native.c
_TILE_ROWS, STEP, _PANEL = 128, 32, 16  # of what works in tiles of bf16, as there
_EDGE = 64  # columns that are turned at a time, as there
_BAND = 64  # rows of a part where places move, as there
_ITEM = 4  # bytes of all numbers
_WALK, _ROUNDING, _PLACE = 4, 1, 1  # nanoseconds a weight
_TURN = 2  # that a number takes to be turned
_PACK = 0.5  # nanoseconds that a number takes to be packed
_PACKED = 1 << 23  # bytes of rows that are packed together
_DROPPED = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # bits of a float's mantissa
_PRODUCT = 128  # terms of a product in tiles a nanosecond


class _Grid(ctypes.Structure):
    _fields_ = (
        ("is_float", ctypes.c_int32),
        ("has_zero", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("least_binade", ctypes.c_float),
        ("steps", ctypes.c_float),
    )


class _Sweeps(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("width", "sweeps", "fits", "descends"))


class _Storage(ctypes.Structure):
    _fields_ = (
        ("dropped", ctypes.c_int32),
        ("is_shared", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    )


def is_available() -> bool:
    """Whether there is a compiler that makes the library."""
    return library(_SOURCE) is not None


def walk_block(
    target_EIO: Tensor,
    columns: Columns,
    feedback_EII: Tensor,
    value_EIO: Tensor,
    error_EIO: Tensor,
    cut: slice,
    fmt: Format,
) -> None:
    """GPTQ over the columns of `cut`, at most 128, of all experts and rows; see `gptq.solve`.

    Writes grid values and errors `w - q` of these columns, and leaves `t - q` in `target_EIO`; later columns stay.
    """
    tensors = (target_EIO, columns.w_EIO, columns.step_EIO, columns.zero_EIO, feedback_EII, value_EIO, error_EIO)
    _over_tiles("walk_block", tensors, columns, cut, fmt)


def descend_block(
    gradient_EBO: Tensor,
    q_EIO: Tensor,
    columns: Columns,
    h_EII: Tensor,
    value_EIO: Tensor,
    cut: slice,
    fmt: Format,
) -> Tensor:
    """Coordinate descent over the columns of `cut`, at most 128, of all experts and rows; see `refine`.

    Writes values and quantized weights of these columns, and the gradient that each saw as it moved.

    Returns:
        How far they moved, `[E, B, O]` for B columns.
    """
    moved_EBO = torch.empty_like(gradient_EBO)
    tensors = (gradient_EBO, q_EIO, columns.step_EIO, columns.zero_EIO, h_EII, value_EIO, moved_EBO)
    _over_tiles("descend_block", tensors, columns, cut, fmt)
    return moved_EBO


def turned(x_EAB: Tensor) -> Tensor | None:
    """The transposes `[E, B, A]`, contiguous; None where a matrix is not contiguous, or neither of fp32 nor of bytes.

    Block by block: torch goes through memory column by column.
    """
    if not x_EAB.is_contiguous() or x_EAB.dtype not in (torch.float32, torch.uint8):
        return None
    num_matrices, rows, columns = x_EAB.shape
    out_EBA = x_EAB.new_empty(num_matrices, columns, rows)
    sizes, total = (rows, columns, x_EAB.element_size()), num_matrices * -(-columns // _EDGE)
    run_parts(_SOURCE, "turn", (x_EAB, out_EBA), sizes, total, rows * _EDGE * _TURN)
    return out_EBA


@cache
def has_tiles() -> bool:
    """Whether products go through tiles of bf16 (Intel AMX): the compiler knows them and the kernel grants them."""
    request = getattr(library(_SOURCE), "request_tiles", None)
    return request is not None and request() == 0


def packed(x_EII: Tensor, *, is_upper: bool = False) -> Tensor | None:
    """The transposes of matrices for products in tiles; None where there are none, or the size does not fit them.

    Args:
        x_EII: whose transposes are to be multiplied by others.
        is_upper: only entries above the diagonal are packed.

    Returns:
        Halves in bf16 in the tiles' order, two in the place of a float.
    """
    num_experts, size, _ = x_EII.shape
    # a single block has nothing before it
    if size % STEP or size <= _COLUMNS or not has_tiles():
        return None
    packed_EII = torch.empty_like(x_EII)
    _run("pack_transposed", (x_EII, packed_EII), (size, is_upper), num_experts * size // _PANEL, _PANEL * size, None)
    return packed_EII


def walk(w_EIO: Tensor, scales: Scales, factor: Factor, fmt: Format) -> tuple[Tensor, Tensor]:
    """GPTQ over all columns, by products in tiles; see `gptq.solve`.

    Args:
        w_EIO: weights in natural order of columns.
        scales: of their groups.
        factor: of the inputs' Hessians, packed.
        fmt: number format.

    Returns:
        Grid values `[E, I, O]` in natural order, and the loss `[E, O]`.
    """
    assert factor.packed_EII is not None
    num_experts, size, num_rows = w_EIO.shape
    step_EGO, zero_EGO = _groups_first(scales)
    value_EIO, loss_EO = torch.empty_like(w_EIO), w_EIO.new_empty(num_experts, num_rows)
    order_EI = factor.order_EI.int()
    given = (w_EIO, step_EGO, zero_EGO, factor.feedback_EII, factor.packed_EII, factor.curvature_EI, order_EI)
    tensors = (*given, value_EIO, loss_EO, _room_for(w_EIO))
    grid, sizes = Grid.of(fmt, has_zero=zero_EGO is not None), (size, num_rows, step_EGO.shape[1])
    _run("walk_all", tensors, sizes, _num_tiles(w_EIO), size * _WALK * _TILE_ROWS, grid)
    return value_EIO, loss_EO


class Sweeps(NamedTuple):
    """What refinement does.

    Attributes:
        width: columns that are changed together: of a group where scales are fitted, at most 128, a multiple of 32.
        sweeps: over all of them.
        fits: whether scales are refitted to the values.
        descends: whether values descend, then.
    """

    width: int
    sweeps: int
    fits: bool
    descends: bool


class Storage(NamedTuple):
    """How scales are stored that are fitted.

    Attributes:
        dtype: bfloat16, float16 or float32.
        low: the least.
        high: the largest.
        block_rows: rows that share them: 1 or 128.
    """

    dtype: torch.dtype
    low: float
    high: float
    block_rows: int


def fits_tiles(block_rows: int, width: int) -> bool:
    """Whether `refine` takes so many rows that share a scale, and columns that are changed together."""
    return block_rows in (1, _TILE_ROWS) and width <= _COLUMNS and width % STEP == 0


def refine(
    w_EIO: Tensor,
    value_EIO: Tensor,
    scales: Scales,
    h_EII: Tensor,
    packed_EII: Tensor,
    fmt: Format,
    how: Sweeps,
    storage: Storage,
) -> tuple[Tensor, Tensor]:
    """Refinement by products in tiles; see `refine`. A tile's rows go through all of it while they are in a cache.

    Args:
        w_EIO: weights.
        value_EIO: grid values, changed in place.
        scales: where to start from.
        h_EII: damped Hessians.
        packed_EII: packed.
        fmt: number format.
        how: what is done.
        storage: how scales are stored.

    Returns:
        Steps `[E, G, O]`, and the loss `[E, O]`.
    """
    num_experts, size, num_rows = w_EIO.shape
    step_EGO, zero_EGO = _groups_first(scales)
    step_EGO, loss_EO = step_EGO.clone(), w_EIO.new_empty(num_experts, num_rows)
    tensors = (w_EIO, step_EGO, zero_EGO, value_EIO, h_EII, packed_EII, loss_EO, _room_for(w_EIO))
    grid = _Grid(*Grid.of(fmt, has_zero=zero_EGO is not None))
    stored = _Storage(_DROPPED[storage.dtype], storage.block_rows > 1, storage.low, storage.high)
    numbers = (size, num_rows, step_EGO.shape[1], _Sweeps(*how), stored, grid)
    cost = how.sweeps * size * (size / _PRODUCT + _WALK)
    run_parts(_SOURCE, "refine_all", tensors, numbers, _num_tiles(w_EIO), cost * _TILE_ROWS)
    return step_EGO, loss_EO


def _groups_first(scales: Scales) -> tuple[Tensor, Tensor | None]:
    zero = None if scales.zero is None else scales.zero.float().transpose(1, 2).contiguous()
    return scales.effective().transpose(1, 2).contiguous(), zero


def _num_tiles(w_EIO: Tensor) -> int:
    num_experts, _, num_rows = w_EIO.shape
    return num_experts * -(-num_rows // _TILE_ROWS)


def _room_for(w_EIO: Tensor) -> Tensor:
    """For what is left of all weights, packed."""
    return w_EIO.new_empty(_num_tiles(w_EIO), _TILE_ROWS, w_EIO.shape[1])


def rounding_errors(
    w_OGN: Tensor, step_KOG: Tensor, zero_KOG: Tensor | None, importance_GN: Tensor | None, fmt: Format
) -> Tensor:
    """Squared errors `[K, O, G]` of groups of N weights, rounded with these steps and zero points (floats).

    An error costs the importance of its column where it is given.
    """
    error_KOG = torch.empty(step_KOG.shape)
    _round(w_OGN, step_KOG, zero_KOG, importance_GN, error_KOG, None, fmt)
    return error_KOG


def least_rounding_errors(
    w_OGN: Tensor, step_KOG: Tensor, zero_KOG: Tensor | None, importance_GN: Tensor | None, fmt: Format
) -> tuple[Tensor, Tensor]:
    """The least of `rounding_errors` of each group `[O, G]`, and which it is; of equal ones the first."""
    error_OG, best_OG = torch.empty(step_KOG.shape[1:]), torch.empty(step_KOG.shape[1:], dtype=torch.int32)
    _round(w_OGN, step_KOG, zero_KOG, importance_GN, error_OG, best_OG, fmt)
    return error_OG, best_OG.long()


def _round(
    w_OGN: Tensor,
    step_KOG: Tensor,
    zero_KOG: Tensor | None,
    importance_GN: Tensor | None,
    error: Tensor,
    best_OG: Tensor | None,
    fmt: Format,
) -> None:
    num_candidates, num_rows, num_groups = step_KOG.shape
    total, size = num_rows * num_groups, w_OGN.shape[2]
    given = (None if x is None else x.contiguous() for x in (w_OGN, step_KOG, zero_KOG, importance_GN))
    sizes = (total, num_groups, size, num_candidates)
    grid = Grid.of(fmt, has_zero=zero_KOG is not None)
    _run("rounding_errors", (*given, error, best_OG), sizes, total, num_candidates * size * _ROUNDING, grid)


def weigh_places(ground: Ground, gradient_EOI: Tensor, inverse: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """What a batch says of places: sums of squares `[E, O]` and `[E, I]`, slopes of scales; see `places`."""
    num_experts, num_rows, num_columns = gradient_EOI.shape
    row_EO, slope_EOG = gradient_EOI.new_empty(num_experts, num_rows), torch.empty_like(ground.scale_EOG)
    part_EPI = gradient_EOI.new_empty(num_experts, -(-num_rows // _BAND), num_columns)
    _over_bands("weigh_places", ground, (gradient_EOI, *inverse, row_EO, part_EPI, slope_EOG))
    return row_EO, part_EPI.sum(1), slope_EOG


def draw_places(
    ground: Ground, gradient_EOI: Tensor, inverse: Factors, noise: Factors, rate: float, most: float
) -> None:
    """Move places; see `places`."""
    _over_bands("draw_places", ground, (gradient_EOI, *inverse, *noise), rate, most)


def weights_of_places(ground: Ground) -> Tensor:
    """The weights `[E, O, I]` that places stand for."""
    w_EOI = torch.empty_like(ground.place_EOI)
    _over_bands("weights_of_places", ground, (w_EOI,))
    return w_EOI


def _over_bands(name: str, ground: Ground, tensors: Sequence[Tensor], *numbers: float) -> None:
    num_experts, num_rows, num_columns = ground.place_EOI.shape
    sizes = (num_rows, num_columns, ground.scale_EOG.shape[-1])
    all_tensors = (ground.place_EOI, ground.scale_EOG, ground.zero_EOG, *tensors)
    grid = Grid.of(ground.fmt, has_zero=ground.zero_EOG is not None)
    total = num_experts * -(-num_rows // _BAND)
    _run(name, all_tensors, sizes, total, _BAND * num_columns * _PLACE, grid, *numbers)


def sums(x_RI: Tensor) -> bool:
    """Whether `add_grams` takes such rows."""
    return x_RI.dtype is torch.bfloat16 and x_RI.shape[1] % STEP == 0 and has_tiles()


def add_grams(upper_EII: Tensor, x_RI: Tensor, counts_E: Tensor, weight_R: Tensor | None) -> None:
    """Add `Σ weight · x xᵀ` of each expert's rows to the upper bands of its sum; see `hessian`.

    Args:
        upper_EII: fp32, changed.
        x_RI: rows sorted by expert, bf16, contiguous.
        counts_E: rows of each expert, int64.
        weight_R: fp32; None: all one.
    """
    _add_products(upper_EII, x_RI, None, counts_E, weight_R, width_of(upper_EII.shape[1]))


def add_products(sum_EII: Tensor, other_RI: Tensor, x_RI: Tensor, counts_E: Tensor, weight_R: Tensor | None) -> None:
    """Add `Σ weight · other xᵀ` of each expert's rows to its sum; rows of both are as for `add_grams`."""
    _add_products(sum_EII, x_RI, other_RI, counts_E, weight_R, sum_EII.shape[1])


def _add_products(
    sum_EII: Tensor, x_RI: Tensor, other_RI: Tensor | None, counts_E: Tensor, weight_R: Tensor | None, band: int
) -> None:
    """Of each band of columns what lies right of its first."""
    num_experts, size, _ = sum_EII.shape
    root_R = None if weight_R is None else weight_R.sqrt()
    # S: steps of 32 rows, of which the last of each expert may be short
    expert_S, begin_S, end_S = blocks_of(counts_E, STEP)
    starts_E = torch.searchsorted(expert_S, torch.arange(num_experts + 1))
    together = max(1, _PACKED // (2 * STEP * size * x_RI.itemsize))
    for start in range(0, len(expert_S), together):
        part = slice(start, start + together)
        num_steps = len(expert_S[part])
        first, last = int(expert_S[part][0]), int(expert_S[part][-1])
        packed = torch.empty(num_steps * size * STEP)  # rows and their transposes
        rows = (x_RI, other_RI, root_R, begin_S[part], end_S[part], packed)
        run_parts(_SOURCE, "pack_rows", rows, (size, num_steps), num_steps, STEP * size * _PACK)
        inner_E = (starts_E - start).clamp(0, num_steps)
        cost = num_steps * STEP**2 * size / (last - first + 1) / _PRODUCT
        total = (last - first + 1) * (size // STEP)
        run_parts(_SOURCE, "add_grams", (packed, inner_E, sum_EII), (size, num_steps, band, first), total, cost)


def _over_tiles(name: str, tensors: Sequence[Tensor | None], columns: Columns, cut: slice, fmt: Format) -> None:
    num_experts, num_columns, num_rows = columns.w_EIO.shape
    width = cut.stop - cut.start
    assert width <= _COLUMNS  # more would leave the tile
    grid = Grid.of(fmt, has_zero=columns.zero_EIO is not None)
    num_tiles = num_experts * -(-num_rows // _ROWS)
    _run(name, tensors, (num_columns, num_rows, cut.start, width), num_tiles, width * _ROWS * _WALK, grid)


def _run(
    name: str,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    total: int,
    cost: int,
    grid: Grid | None,
    *numbers: float,
) -> None:
    """Call a function of the library for `total` parts of its work, each of about `cost` nanoseconds."""
    assert all(x is None or x.element_size() == _ITEM for x in tensors)
    kind = [] if grid is None else [_Grid(*grid)]
    run_parts(_SOURCE, name, tensors, (*sizes, *kind, *map(float, numbers)), total, cost)
