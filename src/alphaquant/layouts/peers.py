"""Checkpoints that other tools quantized, read as de-quantized weights: compressed-tensors and GPTQ.

What is stored is told by the `quantization_config` of config.json. Codes are not kept: zero points a group of any
kind, scales a tensor or a block, and rows in another order have no place in our schemes.
Shapes: w [O, I], G groups a row; GPTQ stores all of it transposed.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.errors import CheckpointError
from alphaquant.formats import FORMATS, decode, unpack_int32, unpack_rows
from alphaquant.layouts.derived import Derived, DerivedSource
from alphaquant.layouts.stored import dtype_name, exponent_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from alphaquant.checkpoint import Checkpoint

__all__ = ["is_peer", "open_peer"]

_REMEDY = "export it anew with the tool that made it, or give the original model"
_FP4, _FP6, _FP8 = (FORMATS[name] for name in ("mxfp4", "mxfp6", "mxfp8"))
_CT_LEAVES = (
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_g_idx",
)
_GPTQ_LEAVES = ("qweight", "qzeros", "scales", "g_idx")


def is_peer(checkpoint: Checkpoint) -> bool:
    """Whether config.json tells of a quantization that `open_peer` reads."""
    quantization = checkpoint.config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") in _METHODS


def open_peer(checkpoint: Checkpoint) -> DerivedSource:
    """The tensors of a checkpoint that another tool quantized, de-quantized as they are read.

    Raises:
        CheckpointError: it is of a kind that is not read, or its tensors are not what config.json says.
    """
    quantization = checkpoint.config["quantization_config"]
    derived = _METHODS[quantization["quant_method"]](checkpoint, quantization)
    if not derived:
        raise _unread(checkpoint, "no tensor of it is quantized, whatever config.json says")
    return DerivedSource(checkpoint, derived)


def _unread(checkpoint: Checkpoint, why: str, where: str = "config.json, quantization_config") -> CheckpointError:
    return CheckpointError(
        f"this quantized checkpoint cannot be read: {why}", where=f"{checkpoint.path}: {where}", remedy=_REMEDY
    )


# --- compressed-tensors ---------------------------------------------------------------------------------------------


def _compressed_tensors(checkpoint: Checkpoint, quantization: dict[str, Any]) -> dict[str, Derived]:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise _unread(checkpoint, "it has no config_groups")
    default = quantization.get("format")
    names = set(checkpoint.names())
    modules = dict.fromkeys(
        name.rpartition(".")[0] for name in checkpoint.names() if name.endswith((".weight_packed", ".weight_scale"))
    )
    derived = {}
    for module in modules:
        group = _group_of(checkpoint, module, groups.values())
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise _unread(checkpoint, "its group has no weights", module)
        inputs = group.get("input_activations")
        if inputs is not None:
            raise _unread(checkpoint, "it rounds the inputs of its linears, which is not computed here", module)
        parts = tuple(f"{module}.{leaf}" for leaf in ("weight", *_CT_LEAVES) if f"{module}.{leaf}" in names)
        kind = group.get("format") or default
        decoder = _CT_DECODERS.get(str(kind))
        if decoder is None:
            raise _unread(checkpoint, f"the format {kind!r} is not read", module)
        stored = _Stored(checkpoint, module, weights)
        derived[module] = Derived(_ct_shape(stored, str(kind)), parts, partial(decoder, stored))
    return derived


def _group_of(checkpoint: Checkpoint, module: str, groups: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The group whose targets name the module, else the one for every linear."""
    groups = list(groups)
    for group in groups:
        for target in group.get("targets", ()):
            if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                return group
    catch_all = [group for group in groups if "Linear" in group.get("targets", ())] or groups
    if len(catch_all) != 1:
        raise _unread(checkpoint, "no config group, or more than one, has a target for it", module)
    return catch_all[0]


class _Stored:
    """The stored tensors of one module, checked as they are read, and what its group says of the weights."""

    def __init__(self, checkpoint: Checkpoint, module: str, weights: Mapping[str, Any]) -> None:
        self.checkpoint, self.module, self.weights = checkpoint, module, weights

    def has(self, leaf: str) -> bool:
        return f"{self.module}.{leaf}" in self.checkpoint

    def get(self, leaf: str, *dtypes: torch.dtype) -> Tensor:
        name = f"{self.module}.{leaf}"
        if name not in self.checkpoint:
            raise self.wrong(f"there is no {leaf}")
        tensor = self.checkpoint.read(name)
        if dtypes and tensor.dtype not in dtypes:
            raise self.wrong(f"{leaf} is {dtype_name(tensor.dtype)}, not {' or '.join(map(dtype_name, dtypes))}")
        return tensor

    def shape_of(self, leaf: str) -> tuple[int, ...]:
        if not self.has(leaf):
            raise self.wrong(f"there is no {leaf}")
        return self.checkpoint.info(f"{self.module}.{leaf}").shape

    @property
    def bits(self) -> int:
        bits = self.weights.get("num_bits", self.weights.get("bits"))
        if type(bits) is not int or not 1 < bits <= 8:
            raise self.wrong(f"its weights have {bits!r} bits")
        return bits

    def wrong(self, why: str) -> CheckpointError:
        return _unread(self.checkpoint, why, self.module)


def _ct_shape(stored: _Stored, kind: str) -> tuple[int, int]:
    if stored.has("weight"):
        shape = stored.shape_of("weight")
    elif stored.has("weight_shape"):
        shape = tuple(stored.get("weight_shape", torch.int64, torch.int32).tolist())
    else:
        rows, size = stored.shape_of("weight_packed")
        shape = (rows, size * 8 // (6 if "mxfp6" in kind else 4))
    if len(shape) != 2:
        raise stored.wrong(f"its shape is {list(shape)}, not [outputs, inputs]")
    return shape[0], shape[1]


def _packed(words: Tensor, bits: int, length: int) -> Tensor | None:
    """Codes of rows of words, either one dense stream or, before version 0.18, whole codes in each word; else None."""
    if words.shape[-1] == -(-length * bits // 32):
        return unpack_int32(words, bits, length)
    a_word = 32 // bits
    if words.shape[-1] != -(-length // a_word):
        return None
    shifts = torch.arange(a_word, dtype=torch.int32) * bits
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :length].to(torch.uint8)


def _ct_integers(stored: _Stored) -> Tensor:
    """pack-quantized: offset-binary codes, w = (q - z) * s."""
    bits, (rows, length) = stored.bits, _ct_shape(stored, "")
    codes = _packed(stored.get("weight_packed", torch.int32), bits, length)
    if codes is None or codes.shape[0] != rows:
        raise stored.wrong(f"weight_packed does not hold {rows} x {length} codes of {bits} bits")
    zero = None
    if stored.weights.get("symmetric") is False:
        zero = _ct_packed_zero(stored, bits, rows)
    return _scaled(stored, codes.float() - (1 << (bits - 1)), zero)


def _ct_packed_zero(stored: _Stored, bits: int, rows: int) -> Tensor:
    packed = stored.get("weight_zero_point", torch.int32, torch.int8)
    if packed.dtype is torch.int8:
        return packed.float()
    zero = _packed(packed.T, bits, rows)
    if zero is None:
        raise stored.wrong(f"weight_zero_point does not hold {rows} zero points of {bits} bits a group")
    return zero.T.float() - (1 << (bits - 1))


def _ct_plain(stored: _Stored) -> Tensor:
    """int-quantized, float-quantized and naive-quantized: one value an element."""
    values = stored.get("weight", torch.int8, torch.float8_e4m3fn)
    zero = None
    if stored.has("weight_zero_point") and stored.weights.get("symmetric") is False:
        zero = stored.get("weight_zero_point").float()
    return _scaled(stored, values.float(), zero)


def _ct_mx(stored: _Stored) -> Tensor:
    """MX: elements under powers of two, a byte 127 + log2 for each 32."""
    if stored.has("weight"):
        values = stored.get("weight", torch.float8_e4m3fn).float()
    else:
        fmt = _FP4 if stored.bits == 4 else _FP6
        packed = stored.get("weight_packed", torch.uint8)
        values = decode(unpack_rows(packed, fmt.bits, packed.shape[1] * 8 // fmt.bits), fmt)
    scale = exponent_scale(stored.get("weight_scale", torch.uint8))
    return values * _spread(stored, scale, values.shape)


def _ct_nvfp4(stored: _Stored) -> Tensor:
    """NVFP4: E2M1 under an E4M3 scale for each 16, all under one that divides."""
    packed = stored.get("weight_packed", torch.uint8)
    values = decode(unpack_rows(packed, 4, packed.shape[1] * 2), _FP4)
    scale = stored.get("weight_scale", torch.float8_e4m3fn).float() / stored.get("weight_global_scale", torch.float32)
    return values * _spread(stored, scale, values.shape)


_CT_DECODERS: Mapping[str, Callable[[_Stored], Tensor]] = {
    "pack-quantized": _ct_integers,
    "int-quantized": _ct_plain,
    "float-quantized": _ct_plain,
    "naive-quantized": _ct_plain,
    "mxfp4-pack-quantized": _ct_mx,
    "mxfp6-pack-quantized": _ct_mx,
    "mxfp8-quantized": _ct_mx,
    "nvfp4-pack-quantized": _ct_nvfp4,
}


def _scaled(stored: _Stored, values: Tensor, zero: Tensor | None) -> Tensor:
    scale = _spread(stored, stored.get("weight_scale").float(), values.shape)
    if zero is not None:
        values = values - _spread(stored, zero, values.shape)
    return values * scale


def _spread(stored: _Stored, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale of a tensor [1], a row [O, 1], groups [O, G] or blocks as large as its weight [O, I]."""
    rows, length = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        scale = scale[:, None]
    block = stored.weights.get("block_structure")
    if stored.weights.get("strategy") == "block" and isinstance(block, list) and len(block) == 2:
        spread = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :length]
    elif stored.has("weight_g_idx"):
        spread = scale[:, stored.get("weight_g_idx").long()]
    else:
        spread = scale if scale.shape[1] == 1 else scale.repeat_interleave(length // scale.shape[1], 1)
    if spread.shape not in ((rows, length), (rows, 1)):
        raise stored.wrong(f"scales of shape {list(scale.shape)} do not fit {rows} x {length} weights")
    return spread


# --- GPTQ -----------------------------------------------------------------------------------------------------------


def _gptq(checkpoint: Checkpoint, quantization: dict[str, Any]) -> dict[str, Derived]:
    """AutoGPTQ's and GPTQModel's: w[o, i] = (q[i, o] - z[g, o]) * s[g, o], g the group of input i."""
    names = set(checkpoint.names())
    dynamic = quantization.get("dynamic") or {}
    derived = {}
    for name in checkpoint.names():
        module, _, leaf = name.rpartition(".")
        if leaf != "qweight":
            continue
        settings = dict(quantization)
        for pattern, changes in dynamic.items():
            if pattern[:1] != "-" and re.match(pattern.removeprefix("+:"), module):
                settings |= changes
                break
        stored = _Stored(checkpoint, module, settings)
        size, rows = stored.shape_of("qweight")
        parts = tuple(f"{module}.{leaf}" for leaf in _GPTQ_LEAVES if f"{module}.{leaf}" in names)
        derived[module] = Derived((rows, size * 32 // stored.bits), parts, partial(_gptq_weight, stored))
    return derived


def _gptq_weight(stored: _Stored) -> Tensor:
    bits = stored.bits
    packed = stored.get("qweight", torch.int32).T
    rows, length = packed.shape[0], packed.shape[1] * 32 // bits
    codes_OI = unpack_int32(packed.contiguous(), bits, length).float()
    scale_GO = stored.get("scales", torch.float16, torch.bfloat16, torch.float32).float()
    if scale_GO.ndim != 2 or scale_GO.shape[1] != rows:
        raise stored.wrong(f"scales of shape {list(scale_GO.shape)} do not fit {rows} outputs")
    zeros = _packed(stored.get("qzeros", torch.int32), bits, rows)
    if zeros is None or len(zeros) != len(scale_GO):
        raise stored.wrong(f"qzeros does not hold {len(scale_GO)} x {rows} zero points of {bits} bits")
    # the first layout stores zero points less one, in `bits` bits
    shift = 0 if stored.weights.get("checkpoint_format") == "gptq_v2" else 1
    zero_GO = ((zeros.int() + shift) & ((1 << bits) - 1) if shift else zeros).float()
    if stored.has("g_idx"):
        group_I = stored.get("g_idx", torch.int32, torch.int64).long()
    else:
        group_I = torch.arange(length) * len(scale_GO) // length
    if len(group_I) != length or not 0 <= int(group_I.min()) <= int(group_I.max()) < len(scale_GO):
        raise stored.wrong(f"g_idx does not give one of {len(scale_GO)} groups to each of {length} inputs")
    return (codes_OI - zero_GO[group_I].T) * scale_GO[group_I].T


_METHODS: Mapping[str, Callable[[Checkpoint, dict[str, Any]], dict[str, Derived]]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
}
