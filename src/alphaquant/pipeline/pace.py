"""Going on with fewer samples at a time where a device's memory runs out."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.errors import AlphaQuantError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

__all__ = ["Pace", "fits", "out_of_memory"]

# what a device raises; a process whose main memory runs out is killed, and goes on by the same command
_OutOfMemory = torch.cuda.OutOfMemoryError
_REMEDY = "give --max-memory, fewer --nsamples, or a device with more memory; the same command goes on from here"


@dataclass(slots=True)
class Pace:
    """How many samples of a chunk go through a half-layer at a time.

    Attributes:
        samples: at most; None for all of a chunk, half as many after each time that memory ran out.
    """

    samples: int | None = None

    def cut(self, cuts: Sequence[slice | Tensor]) -> list[slice | Tensor]:
        """The chunks, in pieces where they are too large; sums over fewer samples differ in their last bits."""
        if self.samples is None:
            return list(cuts)
        return [piece for cut in cuts for piece in _numbers(cut).split(self.samples)]

    def slower(self, cuts: Sequence[slice | Tensor], where: str) -> str:
        """Take half as many samples at a time; returns what to note of it.

        Args:
            cuts: the chunks that memory ran out in.
            where: what it ran out in.

        Raises:
            AlphaQuantError: they are single samples already.
        """
        before = max(len(piece) for cut in self.cut(cuts) for piece in [_numbers(cut)])
        if before == 1:
            raise AlphaQuantError("a single sample takes more memory than there is", where=where, remedy=_REMEDY)
        self.samples = -(-before // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return f"{where}: memory ran out; {self.samples} samples at a time from here on, not {before}"


def fits(run: Callable[..., None], *arguments: Any, **options: Any) -> bool:
    """Whether there was memory for a call."""
    try:
        run(*arguments, **options)
    except _OutOfMemory:
        return False
    return True


@contextmanager
def out_of_memory(where: str) -> Iterator[None]:
    """Say what to do where memory runs out in what cannot be cut further.

    Raises:
        AlphaQuantError: it did.
    """
    try:
        yield
    except _OutOfMemory as error:
        raise AlphaQuantError("the device's memory ran out", where=where, remedy=_REMEDY) from error


def _numbers(cut: slice | Tensor) -> Tensor:
    return torch.arange(cut.start, cut.stop) if isinstance(cut, slice) else cut
