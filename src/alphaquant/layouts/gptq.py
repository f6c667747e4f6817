"""The GPTQ layout of AutoGPTQ and GPTQModel: integers of 2, 3, 4 or 8 bits, packed along the inputs.

Every module has ``qweight`` [I * bits / 32, O], ``qzeros`` [G, O * bits / 32], ``scales`` [G, O] and ``g_idx`` [I];
the columns are in their natural order whatever order they were solved in, so ``desc_act`` is false. Version 1
(``gptq``) stores each zero point less one, and readers differ on a zero that borrows; version 2 stores it as it is.
Source: https://github.com/ModelCloud/GPTQModel, ``nn_modules/qlinear``; it is not imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from alphaquant.errors import CheckpointError
from alphaquant.formats import Activation, QuantizedTensor, pack_int32, unpack_int32
from alphaquant.layouts.dynamic import dynamic_rules
from alphaquant.layouts.stored import MISMATCH, expect, finished, getter, group_misfit, require

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.layouts.dynamic import Settings
    from alphaquant.plan import ModuleKind

__all__ = ["GptqLayout"]

_FORMATS = ("int2", "int3", "int4", "int8")


class GptqLayout:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of each module; ``dynamic`` rules where schemes differ.

    Args:
        version: 1 holds symmetric integers, 2 also asymmetric ones.
    """

    def __init__(self, version: int) -> None:
        self.name = "gptq" if version == 1 else "gptq_v2"
        self._offset = 1 if version == 1 else 0  # what is taken off a stored zero point

    def unsupported(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why it cannot hold this scheme on an [O, I] weight, or None."""
        (out_features, in_features), bits = shape, scheme.format.bits
        if (misfit := group_misfit(scheme, shape)) is not None:
            return misfit
        if scheme.format.name not in _FORMATS:
            return f"GPTQ checkpoints hold integers of 2, 3, 4 or 8 bits, not {scheme.format}"
        if scheme.activation is not Activation.BF16:
            return "GPTQ checkpoints do not say that inputs are rounded"
        if not scheme.symmetric and self._offset:
            return "readers of gptq differ on a zero point of 0, and gptq_v2 stores it as it is"
        if in_features * bits % 32 or out_features * bits % 32:
            return (
                f"GPTQ checkpoints are of whole 32-bit words, and {in_features} inputs and {out_features} outputs of "
                f"{bits} bits do not fill them"
            )
        return None

    def tensor_names(self, module: str, scheme: Scheme) -> tuple[str, ...]:  # noqa: ARG002  (the same for all)
        """The full names of the tensors that stand for the module's weight."""
        return tuple(f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx"))

    def tensors(self, module: str, q: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors to store for one weight [O, I], by full name.

        Raises:
            PlanError: the layout cannot hold the scheme.
        """
        scheme, bits = q.scheme, q.scheme.format.bits
        out_features, in_features = q.codes.shape
        require(self.unsupported(scheme, (out_features, in_features)), module, self.name)
        zero_OG = torch.full(q.scale.shape, 1 << (bits - 1), dtype=torch.uint8) if q.zero is None else q.zero
        stored = {
            "qweight": pack_int32(q.codes, bits).T,
            "qzeros": pack_int32((zero_OG - self._offset).T, bits),
            "scales": _narrowed(q.scale, scheme.scale_dtype).T,
            "g_idx": _group_index(scheme, in_features),
        }
        return finished(stored, module)

    def read(
        self, module: str, read: Callable[[str], Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The weight that ``tensors`` stored, bit for bit.

        Raises:
            CheckpointError: a tensor is not what the scheme implies.
        """
        (out_features, in_features), bits = shape, scheme.format.bits
        num_groups = scheme.num_groups(in_features)
        get = getter(module, read)
        packed = get("qweight", torch.int32, in_features * bits // 32, out_features)
        packed_zeros = get("qzeros", torch.int32, num_groups, out_features * bits // 32)
        zero_OG = unpack_int32(packed_zeros, bits, out_features).T.contiguous() + self._offset
        if scheme.symmetric and not bool((zero_OG == 1 << (bits - 1)).all()):
            raise _differs(f"{module}.qzeros", "its zero points are not those of a symmetric format")
        if not torch.equal(get("g_idx", torch.int32, in_features), _group_index(scheme, in_features)):
            raise _differs(f"{module}.g_idx", "its columns are not in the order of their groups")
        scale = read(f"{module}.scales")
        if scale.dtype != torch.float16:
            expect(scale, f"{module}.scales", scheme.scale_dtype, (num_groups, out_features))
        expect(scale, f"{module}.scales", scale.dtype, (num_groups, out_features))
        codes = unpack_int32(packed.T.contiguous(), bits, in_features)
        zero = None if scheme.symmetric else zero_OG
        return QuantizedTensor(codes, scale.T.contiguous().float(), zero, None, scheme)

    def quantization_config(
        self, schemes: Mapping[str, Scheme | None], kinds: Mapping[str, ModuleKind] | None = None
    ) -> dict[str, Any] | None:
        """The most common scheme as the default, rules for the others; None when nothing is quantized."""
        found = dynamic_rules(schemes, kinds, _settings)
        if found is None:
            return None
        return {
            "quant_method": "gptq",
            **dict(found.default),
            "desc_act": False,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "lm_head": schemes.get("lm_head") is not None,
            "dynamic": found.rules,
        }


def _settings(scheme: Scheme) -> Settings:
    return ("bits", scheme.format.bits), ("group_size", scheme.group_size), ("sym", scheme.symmetric)


def _group_index(scheme: Scheme, in_features: int) -> Tensor:
    """The group of each input column, int32 [I]."""
    width = in_features // scheme.num_groups(in_features)
    return torch.arange(in_features, dtype=torch.int32) // width


def _narrowed(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as float16, which all readers expect, where nothing is lost by it; else as they are kept elsewhere."""
    half = scale.to(torch.float16)
    return half if torch.equal(half.float(), scale) else scale.to(dtype)


def _differs(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{what}, as its entry in alphaquant/modules.json says", where=where, remedy=MISMATCH)
