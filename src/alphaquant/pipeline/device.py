"""Which device a name means."""

from __future__ import annotations

import torch

from alphaquant.errors import ConfigError

__all__ = ["torch_device"]


def torch_device(name: str | torch.device) -> torch.device:
    """The device of that name; for `auto` a GPU where there is one.

    Raises:
        ConfigError: it is no device, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    remedy = "give auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device '{name}' is not a device", remedy=remedy) from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{name}' is not supported", remedy=remedy)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"device '{name}' is not there: {found} CUDA devices found", remedy="give auto, or cpu")
    return device
