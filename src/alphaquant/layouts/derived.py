"""Tensors by logical names over a checkpoint that stores some weights otherwise: a `TensorSource`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from alphaquant.checkpoint import TensorInfo
from alphaquant.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from alphaquant.checkpoint import Checkpoint

__all__ = ["Derived", "DerivedSource"]


class Derived(NamedTuple):
    """A weight that is computed from stored tensors.

    Attributes:
        shape: [O, I].
        parts: full names of the stored tensors.
        weight: reads them and gives the float32 weight.
    """

    shape: tuple[int, int]
    parts: tuple[str, ...]
    weight: Callable[[], Tensor]


class DerivedSource:
    """A checkpoint's tensors, of which some ``<module>.weight`` are derived from others as they are read.

    Args:
        checkpoint: the checkpoint.
        derived: for each such module how its weight comes about.
    """

    def __init__(self, checkpoint: Checkpoint, derived: Mapping[str, Derived]) -> None:
        self.checkpoint = checkpoint
        self._derived = derived
        stored = {name for module in derived.values() for name in module.parts}
        plain = (name for name in checkpoint.names() if name not in stored)
        self._names = tuple(sorted([*plain, *(f"{module}.weight" for module in derived)]))

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        return self.checkpoint.config

    def names(self) -> tuple[str, ...]:
        """All logical tensor names, sorted: a quantized module appears as ``<module>.weight``."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one logical tensor.

        Raises:
            CheckpointError: the checkpoint holds no such tensor.
        """
        derived = self._of(name)
        return self.checkpoint.info(name).shape if derived is None else derived.shape

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and stored bytes of one logical tensor: float32 where it is de-quantized.

        Raises:
            CheckpointError: the checkpoint holds no such tensor.
        """
        derived = self._of(name)
        if derived is None:
            return self.checkpoint.info(name)
        stored = sum(self.checkpoint.info(part).num_bytes for part in derived.parts)
        return TensorInfo(name, torch.float32, derived.shape, stored)

    def read(self, name: str) -> Tensor:
        """One logical tensor in the dtype that `info` gives.

        Raises:
            CheckpointError: there is no such tensor, or it is not what its scheme implies.
        """
        derived = self._of(name)
        return self.checkpoint.read(name) if derived is None else derived.weight()

    def read_into(self, name: str, out: Tensor) -> None:
        """Read one logical tensor into ``out``: the float32 weight of a quantized module, cast once to its dtype.

        Raises:
            CheckpointError: there is no such tensor, or it is not what its scheme implies.
        """
        derived = self._of(name)
        if derived is None:
            self.checkpoint.read_into(name, out)
            return
        if tuple(out.shape) != derived.shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(derived.shape)}, but {list(out.shape)} is expected",
                where=str(self.checkpoint.path),
                remedy="check that config.json belongs to these weights",
            )
        out.detach().copy_(derived.weight())

    def _of(self, name: str) -> Derived | None:
        return self._derived.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
