"""The one door between the torch code and what does the same faster: Triton on a GPU, C on a CPU."""

from __future__ import annotations

from enum import Enum
from importlib.util import find_spec
from typing import TYPE_CHECKING

from alphaquant.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

__all__ = ["Backend", "backend_for", "kernels_for"]


class Backend(Enum):
    """What runs the inner loops: the fastest that the machine has; or always torch, C, or Triton."""

    AUTO = "auto"
    TORCH = "torch"
    NATIVE = "native"
    TRITON = "triton"


def backend_for(device_type: str, backend: Backend) -> Backend:
    """What runs on tensors of a device: never `AUTO`.

    Raises:
        ConfigError: what was asked for is not there.
    """
    from alphaquant.solver import native  # noqa: PLC0415  (not before it is needed: it looks for a compiler)

    if backend is Backend.AUTO:
        if device_type == "cuda":
            return Backend.TORCH if find_spec("triton") is None else Backend.TRITON
        return Backend.NATIVE if device_type == "cpu" and native.is_available() else Backend.TORCH
    if backend is Backend.TRITON and find_spec("triton") is None:
        raise ConfigError("--kernels triton, but Triton is not installed", remedy="pip install 'alphaquant-moe[gpu]'")
    if backend is Backend.NATIVE and device_type != "cpu":
        raise ConfigError(f"--kernels native on {device_type}: it runs on a CPU", remedy="--device cpu, or another")
    if backend is Backend.NATIVE and not native.is_available():
        raise ConfigError("--kernels native, but no C compiler (cc, gcc, clang) works here", remedy="install one")
    return backend


def kernels_for(x: Tensor, backend: Backend) -> ModuleType | None:
    """The kernels that work on tensors like `x`; None where torch does. Each has the loops that it does faster.

    Raises:
        ConfigError: what was asked for is not there.
    """
    found = backend_for(x.device.type, backend)
    if found is Backend.TRITON:
        from alphaquant.solver import kernels  # noqa: PLC0415  (slow, and optional)

        return kernels
    if found is Backend.NATIVE:
        from alphaquant.solver import native  # noqa: PLC0415

        return native
    return None
