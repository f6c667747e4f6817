"""The dense layout: the de-quantized weight under its own name, for any engine; the codes are not kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from alphaquant.errors import CheckpointError
from alphaquant.formats import dequantize
from alphaquant.layouts.stored import finished, group_misfit, require

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from alphaquant.formats import QuantizedTensor, Scheme
    from alphaquant.plan import ModuleKind

__all__ = ["DenseLayout"]

_AT_ONCE = 1 << 20  # weights


class DenseLayout:
    """``<module>.weight`` in the model's dtype.

    Args:
        dtype: the type of the written weights.
    """

    name = "dense"

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def unsupported(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why the scheme does not fit the weight, or None."""
        return group_misfit(scheme, shape)

    def tensor_names(self, module: str, scheme: Scheme) -> tuple[str, ...]:  # noqa: ARG002  (the same for all)
        """The weight alone."""
        return (f"{module}.weight",)

    def tensors(self, module: str, q: QuantizedTensor) -> dict[str, Tensor]:
        """The de-quantized weight [O, I].

        Raises:
            PlanError: the scheme does not fit the weight.
        """
        require(self.unsupported(q.scheme, (q.codes.shape[-2], q.codes.shape[-1])), module, self.name)
        weight_OI = torch.empty(q.codes.shape, dtype=self.dtype, device=q.codes.device)
        rows = max(1, _AT_ONCE // weight_OI.shape[-1])
        for start in range(0, len(weight_OI), rows):  # no fp32 copy of a large matrix beside it
            some = slice(start, start + rows)
            zero = None if q.zero is None else q.zero[some]
            weight_OI[some] = dequantize(replace(q, codes=q.codes[some], scale=q.scale[some], zero=zero), self.dtype)
        return finished({"weight": weight_OI}, module)

    def read(
        self,
        module: str,
        read: Callable[[str], Tensor],  # noqa: ARG002
        scheme: Scheme,  # noqa: ARG002
        shape: tuple[int, int],  # noqa: ARG002
    ) -> QuantizedTensor:
        """Not possible.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            "a dense checkpoint keeps no codes",
            where=module,
            remedy="convert from the quantized checkpoint that it was made of",
        )

    def quantization_config(
        self,
        schemes: Mapping[str, Scheme | None],  # noqa: ARG002
        kinds: Mapping[str, ModuleKind] | None = None,  # noqa: ARG002
    ) -> None:
        """None: to an engine the model is not quantized."""
        return
