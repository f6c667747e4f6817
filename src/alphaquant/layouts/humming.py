"""The humming layout: every format of ours, for vLLM through the humming-kernels library.

Names, shapes and config follow ``humming/schema/humming.py`` of humming-kernels 0.1.19 and vLLM's
``quantization/humming.py`` (https://github.com/vllm-project/humming); neither is imported.

``weight_scale_2``, which multiplies, is 1 / global scale of NVFP4. In float32 that reciprocal is not invertible:
between sqrt(2) and 2 there are fewer reciprocals than global scales. It is stored as float64, whose rounding is so
fine that both ways are exact: rounded to float32, as engines load it, it is the correctly rounded float32 reciprocal
(for 24-bit g, 1/g stays more than 2^-50 away from any midpoint of two float32), and its own reciprocal rounds to g.

vLLM 0.32 has one place for ``weight_scale_2`` in a fused module (qkv, gate with up, experts) and fails to load a
second: there NVFP4 is served from compressed-tensors only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from alphaquant.formats import Activation, ElementKind, QuantizedTensor, ScaleKind, pack_int32, unpack_int32
from alphaquant.layouts.dynamic import dynamic_rules
from alphaquant.layouts.stored import (
    exponent_scale,
    finished,
    getter,
    group_misfit,
    pack_zeros,
    require,
    scale_exponent,
    unpack_zeros,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.layouts.dynamic import Settings
    from alphaquant.plan import ModuleKind

__all__ = ["HummingLayout"]

_E8M0: torch.dtype | None = getattr(torch, "float8_e8m0fnu", None)  # torch 2.7
_INPUTS = {Activation.INT8: "int8", Activation.FP8: "float8e4m3"}
_SCALE_NAMES = {ScaleKind.E8M0: "float8e8m0", ScaleKind.E4M3: "float8e4m3"}


class HummingLayout:
    """``weight`` as int32 words with ``weight_scale`` beside it; a default scheme and regular expressions."""

    name = "humming"

    def unsupported(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why it cannot hold this scheme on an [O, I] weight, or None."""
        (out_features, in_features), fmt = shape, scheme.format
        if (misfit := group_misfit(scheme, shape)) is not None:
            return misfit
        if fmt.block_rows > 1:
            return f"{fmt} is written in compressed-tensors, where its engines look for it"
        if in_features * fmt.bits % 32:
            return (
                f"humming stores rows in whole 32-bit words: {in_features} inputs of {fmt.bits} bits do not fill them"
            )
        if not scheme.symmetric and out_features * fmt.bits % 32:
            return (
                f"humming stores zero points in whole 32-bit words: {out_features} outputs of {fmt.bits} bits do not "
                "fill them"
            )
        if fmt.scale is ScaleKind.E8M0 and _E8M0 is None:
            return "power-of-two scales need float8_e8m0fnu, which torch has since 2.7"
        return None

    def tensor_names(self, module: str, scheme: Scheme) -> tuple[str, ...]:
        """The full names of the tensors that stand for the module's weight."""
        leaves = ["weight", "weight_scale"]
        leaves += [] if scheme.symmetric else ["zero_point"]
        leaves += ["weight_scale_2"] if scheme.format.scale is ScaleKind.E4M3 else []
        return tuple(f"{module}.{leaf}" for leaf in leaves)

    def tensors(self, module: str, q: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors to store for one weight [O, I], by full name.

        Raises:
            PlanError: the layout cannot hold the scheme.
        """
        scheme, bits = q.scheme, q.scheme.format.bits
        out_features, in_features = q.codes.shape
        require(self.unsupported(scheme, (out_features, in_features)), module, self.name)
        is_power = scheme.format.scale is ScaleKind.E8M0
        scale = scale_exponent(q.scale) if is_power else q.scale
        dtype = _scale_dtype(scheme)
        stored = {
            "weight": pack_int32(q.codes, bits),
            "weight_scale": scale.view(dtype) if is_power else scale.to(dtype),
        }
        if q.zero is not None:
            stored["zero_point"] = pack_zeros(q.zero, bits)
        if q.global_scale is not None:
            stored["weight_scale_2"] = q.global_scale.double().reciprocal().reshape(1)
        return finished(stored, module)

    def read(
        self, module: str, read: Callable[[str], Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The weight that ``tensors`` stored, bit for bit.

        Raises:
            CheckpointError: a tensor is not what the scheme implies.
            PlanError: the layout cannot hold the scheme.
        """
        require(self.unsupported(scheme, shape), module, self.name)
        (out_features, in_features), bits = shape, scheme.format.bits
        num_groups = scheme.num_groups(in_features)
        get = getter(module, read)
        codes = unpack_int32(get("weight", torch.int32, out_features, in_features * bits // 32), bits, in_features)
        scale = get("weight_scale", _scale_dtype(scheme), out_features, num_groups)
        zero = global_scale = None
        if not scheme.symmetric:
            packed = get("zero_point", torch.int32, out_features * bits // 32, num_groups)
            zero = unpack_zeros(packed, bits, out_features)
        if scheme.format.scale is ScaleKind.E4M3:
            global_scale = get("weight_scale_2", torch.float64, 1).reciprocal().float().reshape(())
        is_power = scheme.format.scale is ScaleKind.E8M0
        scale = exponent_scale(scale.view(torch.uint8)) if is_power else scale.float()
        return QuantizedTensor(codes, scale, zero, global_scale, scheme)

    def quantization_config(
        self, schemes: Mapping[str, Scheme | None], kinds: Mapping[str, ModuleKind] | None = None
    ) -> dict[str, Any] | None:
        """The most common scheme as the default, rules for the others; None when nothing is quantized."""
        found = dynamic_rules(schemes, kinds, _settings)
        if found is None:
            return None
        # Both spellings: "ignore" is what people and other readers look for; its expressions are newer in vLLM.
        return {
            "quant_method": self.name,
            **{key: value for key, value in found.default if value is not None and value is not False},
            "dynamic": found.rules,
            "ignore": found.ignore,
        }


def _settings(scheme: Scheme) -> Settings:
    """A scheme in the words of humming's schema."""
    fmt = scheme.format
    is_int = fmt.kind is ElementKind.INT
    return (
        ("b_dtype", f"uint{fmt.bits}" if is_int else f"float{fmt.bits}e{fmt.exponent_bits}m{fmt.mantissa_bits}"),
        ("bs_dtype", _SCALE_NAMES.get(fmt.scale)),  # None: the model's own
        ("weight_scale_group_size", max(scheme.group_size, 0)),  # 0: one scale a row
        ("has_zero_point", not scheme.symmetric),
        ("weight_scale_2_type", "tensor" if fmt.scale is ScaleKind.E4M3 else None),
        ("a_dtype", _INPUTS.get(scheme.activation)),  # None: the model's own; scales are the token's
    )


def _scale_dtype(scheme: Scheme) -> torch.dtype:
    if scheme.format.scale is ScaleKind.E8M0:
        assert _E8M0 is not None
        return _E8M0
    return torch.float8_e4m3fn if scheme.format.scale is ScaleKind.E4M3 else scheme.scale_dtype
