"""FP8 weights with a scale for each block, as DeepSeek-V3 is published: de-quantized as they are read.

Source: DeepSeek-V3's inference code, ``weight_dequant``: ``weight_scale_inv`` holds what a block is multiplied with.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.checkpoint.shard import TensorInfo
from alphaquant.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from alphaquant.checkpoint.reader import Checkpoint

__all__ = ["BlockScaled", "unquantized"]

_SUFFIX = "_scale_inv"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_KEY = "config.json, quantization_config"


class BlockScaled:
    """A checkpoint's tensors with its block-scaled ones de-quantized: a source like the checkpoint itself.

    Args:
        checkpoint: the checkpoint.
        block: rows and columns that share a scale.

    Raises:
        CheckpointError: an FP8 tensor has no scales, or scales of another shape.
    """

    def __init__(self, checkpoint: Checkpoint, block: tuple[int, int]) -> None:
        self._checkpoint, self._block = checkpoint, block
        found = set(checkpoint.names())
        scaled = {name for name in found if f"{name}{_SUFFIX}" in found}
        for name in sorted(found):
            if name in scaled:
                self._check(name)
            elif checkpoint.info(name).dtype in _FP8:
                raise CheckpointError(
                    f"{name} is FP8, and the checkpoint holds no {name}{_SUFFIX}",
                    where=str(checkpoint.path),
                    remedy="fetch the missing shards",
                )
        self._scaled = scaled
        self._names = tuple(sorted(found - {f"{name}{_SUFFIX}" for name in scaled}))
        config = checkpoint.config
        self.config: dict[str, Any] = {key: value for key, value in config.items() if key != "quantization_config"}
        # bfloat16 is what the published weights were rounded from
        self._dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)

    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted; scales are no tensors of their own."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor.

        Raises:
            CheckpointError: the checkpoint holds no such tensor.
        """
        return self._checkpoint.shape(name)

    def info(self, name: str) -> TensorInfo:
        """What `read` gives: a de-quantized tensor has the dtype that config.json says.

        Raises:
            CheckpointError: the checkpoint holds no such tensor.
        """
        info = self._checkpoint.info(name)
        if name not in self._scaled:
            return info
        return TensorInfo(name, self._dtype, info.shape, math.prod(info.shape) * self._dtype.itemsize)

    def read(self, name: str) -> Tensor:
        """Read one tensor in the dtype that `info` gives, to the CPU.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read any more.
        """
        return self._weight(name).to(self._dtype) if name in self._scaled else self._checkpoint.read(name)

    def read_into(self, name: str, out: Tensor) -> None:
        """Read one tensor into ``out``; a product of weight and scale is rounded once, to its dtype.

        Raises:
            CheckpointError: there is no such tensor, its shape is another, or its file cannot be read any more.
        """
        if name not in self._scaled:
            self._checkpoint.read_into(name, out)
            return
        if tuple(out.shape) != self.shape(name):
            raise CheckpointError(
                f"tensor {name!r} has shape {list(self.shape(name))}, but {list(out.shape)} is expected",
                where=str(self._checkpoint.path),
                remedy="check that config.json belongs to these weights",
            )
        out.detach().copy_(self._weight(name))

    def _weight(self, name: str) -> Tensor:
        """The fp32 weight `[..., O, I]`, a row of blocks at a time."""
        weight, scale = self._checkpoint.read(name).float(), self._checkpoint.read(f"{name}{_SUFFIX}").float()
        rows, columns = self._block
        for index in range(scale.shape[-2]):
            factor = scale[..., index, None, :].repeat_interleave(columns, -1)[..., : weight.shape[-1]]
            weight[..., index * rows : (index + 1) * rows, :] *= factor
        return weight

    def _check(self, name: str) -> None:
        shape, expected = self._checkpoint.shape(name), None
        if len(shape) >= 2:
            expected = [*shape[:-2], -(-shape[-2] // self._block[0]), -(-shape[-1] // self._block[1])]
        found = list(self._checkpoint.shape(f"{name}{_SUFFIX}"))
        if found != expected:
            raise CheckpointError(
                f"{name}{_SUFFIX} has shape {found}; blocks of {self._block[0]} x {self._block[1]} imply {expected}",
                where=str(self._checkpoint.path),
                remedy="check that config.json belongs to these weights",
            )


def unquantized(checkpoint: Checkpoint) -> Checkpoint | BlockScaled:
    """The checkpoint as a source of floats: FP8 blocks are de-quantized, and no other quantization is read.

    Raises:
        CheckpointError: it is quantized otherwise, or its blocks and scales disagree.
    """
    quantization: Any = checkpoint.config.get("quantization_config")
    if quantization is None:
        return checkpoint
    settings = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    method, block = settings.get("quant_method"), settings.get("weight_block_size")
    if method != "fp8" or settings.get("expert_dtype", "fp8") != "fp8":
        raise CheckpointError(
            f"{checkpoint.path} is quantized already, by {method!r}",
            where=_KEY,
            remedy="give the original model; of quantized ones only FP8 with scales for blocks is read",
        )
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(
            f"weight_block_size is {block!r}; expected two positive integers, as in [128, 128]",
            where=_KEY,
            remedy="give the original model; of FP8 only scales for blocks are read",
        )
    return BlockScaled(checkpoint, (block[0], block[1]))
