"""The compressed-tensors layout, as vLLM, SGLang and transformers read it.

Bytes and config follow compressed-tensors 0.18 and later, where integers are one dense bit stream a row
(https://github.com/vllm-project/compressed-tensors); it is not imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from alphaquant.errors import CheckpointError
from alphaquant.formats import (
    Activation,
    ElementKind,
    QuantizedTensor,
    ScaleKind,
    pack_int32,
    pack_rows,
    unpack_int32,
    unpack_rows,
)
from alphaquant.layouts.dynamic import ignored_modules
from alphaquant.layouts.names import NamePatterns
from alphaquant.layouts.stored import (
    MISMATCH,
    exponent_scale,
    finished,
    getter,
    group_misfit,
    pack_zeros,
    require,
    scale_exponent,
    unpack_zeros,
    word_count,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.plan import ModuleKind

__all__ = ["CompressedTensorsLayout"]

_VERSION = "0.18.0"  # the first release with the dense bit stream
_INT_FORMAT = "pack-quantized"
_FLOAT_FORMATS = {
    "fp8": "naive-quantized",
    "fp8_block": "naive-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}
# whose inputs are rounded as well
_ROUNDED_FORMATS = {"int8": "int-quantized", "fp8": "float-quantized", "fp8_block": "float-quantized"}
_SCALE_DTYPES = {ScaleKind.E8M0: torch.uint8, ScaleKind.E4M3: torch.float8_e4m3fn}


class CompressedTensorsLayout:
    """``weight_packed`` or ``weight`` with ``weight_scale`` beside it; config groups with regular expressions."""

    name = "compressed-tensors"

    def unsupported(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why it cannot hold this scheme on an [O, I] weight, or None."""
        fmt = scheme.format
        if (misfit := group_misfit(scheme, shape)) is not None:
            return misfit
        if scheme.activation is not Activation.BF16:
            is_held = fmt.name in _ROUNDED_FORMATS and (scheme.group_size == -1 or fmt.block_rows > 1)
            what = "compressed-tensors rounds inputs for int8 and fp8 weights of one scale a row, and for fp8_block"
            return None if is_held else what
        return None if fmt.kind is ElementKind.INT else self._unsupported_float(scheme)

    def _unsupported_float(self, scheme: Scheme) -> str | None:
        fmt = scheme.format
        if fmt.name not in _FLOAT_FORMATS:
            return f"compressed-tensors has no format for {fmt.name} weights"
        if fmt.scale is ScaleKind.MODEL and scheme.group_size != -1 and fmt.block_rows == 1:
            return f"compressed-tensors stores {fmt.name} weights with one scale a row, not in groups"
        if fmt.native_group is not None and scheme.group_size != fmt.native_group:
            return f"compressed-tensors stores {fmt.name} in blocks of {fmt.native_group} only"
        return None

    def tensor_names(self, module: str, scheme: Scheme) -> tuple[str, ...]:
        """The full names of the tensors that stand for the module's weight."""
        return tuple(f"{module}.{leaf}" for leaf in _leaves(scheme))

    def tensors(self, module: str, q: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors to store for one weight [O, I], by full name.

        Raises:
            PlanError: the layout cannot hold the scheme.
        """
        scheme, fmt = q.scheme, q.scheme.format
        out_features, in_features = q.codes.shape
        require(self.unsupported(scheme, (out_features, in_features)), module, self.name)
        stored: dict[str, Tensor] = {}
        if fmt.kind is ElementKind.INT and scheme.activation is not Activation.BF16:
            stored["weight"] = (q.codes ^ 0x80).view(torch.int8)  # two's complement of offset-binary codes
        elif fmt.kind is ElementKind.INT:
            stored["weight_packed"] = pack_int32(q.codes, fmt.bits)
            stored["weight_shape"] = torch.tensor([out_features, in_features])
        elif fmt.bits == 8:
            stored["weight"] = q.codes.contiguous().view(torch.float8_e4m3fn)
        else:
            stored["weight_packed"] = pack_rows(q.codes, fmt.bits)
        is_power, scale = fmt.scale is ScaleKind.E8M0, q.scale[:: fmt.block_rows]
        stored["weight_scale"] = scale_exponent(scale) if is_power else scale.to(_scale_dtype(scheme))
        if q.zero is not None:
            stored["weight_zero_point"] = pack_zeros(q.zero, fmt.bits)
        if q.global_scale is not None:
            stored["weight_global_scale"] = q.global_scale.reshape(1)
        return finished(stored, module)

    def read(
        self, module: str, read: Callable[[str], Tensor], scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The weight that ``tensors`` stored, bit for bit.

        Raises:
            CheckpointError: a tensor is not what the scheme implies.
        """
        fmt, (out_features, in_features) = scheme.format, shape
        num_groups = scheme.num_groups(in_features)
        get = getter(module, read)
        if fmt.kind is ElementKind.INT and scheme.activation is not Activation.BF16:
            codes = get("weight", torch.int8, out_features, in_features).view(torch.uint8) ^ 0x80
        elif fmt.kind is ElementKind.INT:
            packed = get("weight_packed", torch.int32, out_features, word_count(in_features, fmt.bits))
            codes = unpack_int32(packed, fmt.bits, in_features)
            _check_shape(module, get("weight_shape", torch.int64, 2).tolist(), shape)
        elif fmt.bits == 8:
            codes = get("weight", torch.float8_e4m3fn, out_features, in_features).view(torch.uint8)
        else:
            packed = get("weight_packed", torch.uint8, out_features, in_features * fmt.bits // 8)
            codes = unpack_rows(packed, fmt.bits, in_features)
        scale = get("weight_scale", _scale_dtype(scheme), -(-out_features // fmt.block_rows), num_groups)
        zero = global_scale = None
        if not scheme.symmetric:
            packed = get("weight_zero_point", torch.int32, word_count(out_features, fmt.bits), num_groups)
            zero = unpack_zeros(packed, fmt.bits, out_features)
        if fmt.scale is ScaleKind.E4M3:
            global_scale = get("weight_global_scale", torch.float32, 1).reshape(())
        scale = exponent_scale(scale) if fmt.scale is ScaleKind.E8M0 else scale.float()
        if fmt.block_rows > 1:
            scale = scale.repeat_interleave(fmt.block_rows, 0)[:out_features]
        return QuantizedTensor(codes, scale, zero, global_scale, scheme)

    def quantization_config(
        self, schemes: Mapping[str, Scheme | None], kinds: Mapping[str, ModuleKind] | None = None
    ) -> dict[str, Any] | None:
        """Disjoint config groups, one for each kind of weight; None when nothing is quantized."""
        patterns = NamePatterns(schemes)
        groups: dict[tuple[str, int, bool, Activation], dict[str, Any]] = {}
        members: dict[tuple[str, int, bool, Activation], list[str]] = {}
        for name, scheme in schemes.items():
            if scheme is None:
                continue
            key = (scheme.format.name, scheme.group_size, scheme.symmetric, scheme.activation)
            groups.setdefault(key, _group(scheme))
            members.setdefault(key, []).append(name)
        if not groups:
            return None
        for key, group in groups.items():
            group["targets"] = [f"re:{pattern}" for pattern in patterns.cover(members[key])]
        formats = sorted({group["format"] for group in groups.values()})
        return {
            "quant_method": self.name,
            "version": _VERSION,
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
            "ignore": patterns.cover_marked(ignored_modules(schemes, kinds)),
        }


def _leaves(scheme: Scheme) -> Iterator[str]:
    fmt = scheme.format
    is_plain = fmt.bits == 8 and (fmt.kind is ElementKind.FLOAT or scheme.activation is not Activation.BF16)
    yield "weight" if is_plain else "weight_packed"
    yield "weight_scale"
    if fmt.kind is ElementKind.INT and not is_plain:
        yield "weight_shape"
    if not scheme.symmetric:
        yield "weight_zero_point"
    if fmt.scale is ScaleKind.E4M3:
        yield "weight_global_scale"


def _check_shape(module: str, stored: list[int], shape: tuple[int, int]) -> None:
    if stored != list(shape):
        raise CheckpointError(
            f"the stored matrix is {stored}, but the module's scheme implies {list(shape)}",
            where=f"{module}.weight_shape",
            remedy=MISMATCH,
        )


def _scale_dtype(scheme: Scheme) -> torch.dtype:
    return _SCALE_DTYPES.get(scheme.format.scale, scheme.scale_dtype)


def _strategy(scheme: Scheme) -> str:
    if scheme.format.block_rows > 1:
        return "block"
    if scheme.format.scale is ScaleKind.E4M3:
        return "tensor_group"
    return "channel" if scheme.group_size == -1 else "group"


def _group(scheme: Scheme) -> dict[str, Any]:
    """A config group without its targets."""
    fmt = scheme.format
    weights: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": fmt.kind.value,
        "symmetric": scheme.symmetric,
        "strategy": _strategy(scheme),
        "group_size": None if scheme.group_size == -1 or fmt.block_rows > 1 else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
    if fmt.block_rows > 1:
        weights["block_structure"] = [fmt.block_rows, scheme.group_size]
    if fmt.scale in _SCALE_DTYPES:
        weights["scale_dtype"] = str(_SCALE_DTYPES[fmt.scale])
    inputs = None
    if scheme.activation is not Activation.BF16:
        kind = ElementKind.INT if scheme.activation is Activation.INT8 else ElementKind.FLOAT
        inputs = {"num_bits": 8, "type": kind.value, "symmetric": True, "strategy": "token", "dynamic": True}
        if scheme.inputs.group_size > 0:
            inputs |= {"strategy": "group", "group_size": scheme.inputs.group_size}
    formats = _FLOAT_FORMATS if inputs is None else _ROUNDED_FORMATS
    return {
        "targets": [],
        "format": formats.get(fmt.name, _INT_FORMAT),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
