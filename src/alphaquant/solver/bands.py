"""Half of a symmetric matrix: bands of rows, of which only what lies right of their first column is summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["bands", "mirrored", "width_of"]

_LEAST = 128  # narrower products are slower than what they leave out


def width_of(size: int) -> int:
    """Rows of a band."""
    return max(_LEAST, size // 4)


def bands(size: int) -> Iterator[tuple[int, int]]:
    """Where bands begin and end."""
    width = width_of(size)
    for start in range(0, size, width):
        yield start, min(start + width, size)


def mirrored(upper_EII: Tensor) -> Tensor:
    """The whole of symmetric matrices of which the upper bands are filled, in place."""
    for start, end in bands(upper_EII.shape[1]):
        upper_EII[:, end:, start:end] = upper_EII[:, start:end, end:].transpose(1, 2)
    return upper_EII
