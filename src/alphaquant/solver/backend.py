"""The one door between the torch code and the Triton kernels that do the same."""

from __future__ import annotations

from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING

from alphaquant.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

__all__ = ["Backend", "kernels_for"]


class Backend(Enum):
    """What runs the inner loops: Triton on a GPU that has it, else torch; or always the one or the other."""

    AUTO = "auto"
    TORCH = "torch"
    TRITON = "triton"


def kernels_for(x: Tensor, backend: Backend) -> ModuleType | None:
    """The kernels that work on tensors like `x`; None where torch does.

    Raises:
        ConfigError: Triton was asked for and is not installed.
    """
    if backend is Backend.TORCH or (backend is Backend.AUTO and not x.is_cuda):
        return None
    if find_spec("triton") is None:
        if backend is Backend.AUTO:
            return None
        raise ConfigError("--kernels triton, but Triton is not installed", remedy="pip install 'alphaquant-moe[gpu]'")
    from alphaquant.solver import kernels  # noqa: PLC0415  (slow, and optional)

    return kernels
