"""How scales and zero points lie in a checkpoint, and checks of what is read back; shared by the layouts.

Shapes: scale [O, G], zero [O, G], packed zero points [ceil(O * bits / 32), G].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from alphaquant.errors import CheckpointError, PlanError
from alphaquant.formats import pack_int32, unpack_int32

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from alphaquant.formats import Scheme

__all__ = [
    "MISMATCH",
    "Getter",
    "dtype_name",
    "expect",
    "exponent_scale",
    "finished",
    "getter",
    "group_misfit",
    "pack_zeros",
    "require",
    "scale_exponent",
    "unpack_zeros",
    "word_count",
]

MISMATCH = "the weights and alphaquant/modules.json are of different runs: copy or convert the model again"
"""The remedy where they disagree."""

_SMALLEST_EXPONENT_BITS = 0x00400000  # float32 pattern of 2^-127, a subnormal


def scale_exponent(scale: Tensor) -> Tensor:
    """E8M0 bytes 127 + log2(scale) of float32 powers of two, any shape."""
    # The biased exponent field of the float32 is that byte; 2^-127 is a subnormal, whose field is 0: right as well.
    return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def exponent_scale(exponent: Tensor) -> Tensor:
    """The float32 powers of two of E8M0 bytes (uint8), any shape; 255 stands for no number and becomes infinity."""
    bits = exponent.to(torch.int32) << 23
    return torch.where(bits == 0, _SMALLEST_EXPONENT_BITS, bits).view(torch.float32)


def pack_zeros(zero: Tensor, bits: int) -> Tensor:
    """Zero points uint8 [O, G] packed along O, int32 [ceil(O * bits / 32), G]."""
    return pack_int32(zero.T, bits).T


def unpack_zeros(packed: Tensor, bits: int, out_features: int) -> Tensor:
    """The inverse of ``pack_zeros``, uint8 [O, G]."""
    return unpack_int32(packed.T, bits, out_features).T.contiguous()


def word_count(num_codes: int, bits: int) -> int:
    """Int32 words that hold so many codes."""
    return -(-num_codes * bits // 32)


def finished(tensors: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """Tensors by full name, contiguous and on the CPU."""
    return {f"{module}.{leaf}": tensor.detach().cpu().contiguous() for leaf, tensor in tensors.items()}


def expect(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor, if it is what its scheme implies.

    Raises:
        CheckpointError: its dtype or shape is another.
    """
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        found, wanted = (f"{dtype_name(t)} {list(s)}" for t, s in ((tensor.dtype, tuple(tensor.shape)), (dtype, shape)))
        raise CheckpointError(
            f"the stored tensor is {found}, but the module's scheme implies {wanted}",
            where=name,
            remedy=MISMATCH,
        )
    return tensor


class Getter(Protocol):
    """Gives a module's stored tensor by its last name, checked as ``expect`` does."""

    def __call__(self, leaf: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """The tensor."""


def getter(module: str, read: Callable[[str], Tensor]) -> Getter:
    """The ``Getter`` of one module, over a reader of tensors by full name."""

    def get(leaf: str, dtype: torch.dtype, *shape: int) -> Tensor:
        return expect(read(f"{module}.{leaf}"), f"{module}.{leaf}", dtype, shape)

    return get


def require(reason: str | None, module: str, layout: str) -> None:
    """Pass when there is no reason against it.

    Raises:
        PlanError: the layout cannot hold the module's scheme, for ``reason``.
    """
    if reason is not None:
        raise PlanError(
            f"the {layout} layout cannot hold this: {reason}", where=module, remedy="choose another layout or format"
        )


def group_misfit(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why the scheme's groups do not fit an [O, I] matrix, or None."""
    if scheme.group_size != -1 and shape[1] % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide {shape[1]} inputs"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
