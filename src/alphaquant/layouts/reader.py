"""Reading a checkpoint that a layout wrote: weights by their logical names, de-quantized as they are read.

``alphaquant/modules.json`` in the checkpoint's directory says which modules are quantized, and how:
``{"version": 1, "layout": "humming", "modules": {NAME: {"format": "int4", "group_size": 128, "symmetric": true,
"scale_dtype": "bfloat16", "shape": [O, I]}}}``, and ``"activation": "int8"`` where a module rounds its inputs.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from alphaquant.checkpoint import BlockScaled, Checkpoint, unquantized
from alphaquant.errors import CheckpointError, PlanError
from alphaquant.formats import Activation, Scheme, dequantize, parse_format
from alphaquant.layouts.base import LAYOUTS, Layout
from alphaquant.layouts.derived import Derived, DerivedSource
from alphaquant.layouts.peers import is_peer, open_peer
from alphaquant.layouts.stored import MISMATCH, dtype_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from alphaquant.formats import QuantizedTensor
    from alphaquant.models.weights import TensorSource

__all__ = ["MODULES_FILE", "QuantizedCheckpoint", "StoredModule", "module_table", "open_source"]

MODULES_FILE = "alphaquant/modules.json"
"""The module table's place in a checkpoint directory."""

_VERSION = 1
_MAX_BYTES = 1 << 28
_KEYS = ("format", "group_size", "symmetric", "scale_dtype", "shape")
_SCALE_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
_REMEDY = "the file is damaged or edited: copy it again from where the checkpoint was made, or quantize again"


class StoredModule(NamedTuple):
    """A quantized module of a checkpoint: its scheme and its weight's shape [O, I]."""

    scheme: Scheme
    shape: tuple[int, int]


def module_table(
    schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]], layout: str
) -> dict[str, Any]:
    """The JSON object of ``alphaquant/modules.json``.

    Args:
        schemes: every module by checkpoint name; None is left out.
        shapes: [O, I] of at least the quantized modules.
        layout: the layout's name.
    """
    modules = {
        name: {
            "format": scheme.format.name,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
            "scale_dtype": dtype_name(scheme.scale_dtype),
            "shape": list(shapes[name]),
            **({} if scheme.activation is Activation.BF16 else {"activation": scheme.activation.value}),
        }
        for name, scheme in schemes.items()
        if scheme is not None
    }
    return {"version": _VERSION, "layout": layout, "modules": modules}


class QuantizedCheckpoint(DerivedSource):
    """A quantized checkpoint's tensors by their logical names: a `TensorSource` that de-quantizes as it reads.

    Args:
        checkpoint: the checkpoint.
        layout: how its quantized modules are stored.
        modules: its quantized modules by name.

    Raises:
        CheckpointError: a tensor of a quantized module is missing.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout, modules: Mapping[str, StoredModule]) -> None:
        self.layout = layout
        self.modules = modules
        derived: dict[str, Derived] = {}
        for module, (scheme, shape) in modules.items():
            names = layout.tensor_names(module, scheme)
            missing = next((name for name in names if name not in checkpoint), None)
            if missing is not None:
                raise CheckpointError(
                    f"{MODULES_FILE} lists {module} as {scheme}, but the checkpoint holds no tensor {missing!r}",
                    where=str(checkpoint.path),
                    remedy=MISMATCH,
                )
            derived[module] = Derived(shape, names, partial(self._dequantized, module))
        super().__init__(checkpoint, derived)

    @classmethod
    def open(cls, path: str | Path) -> QuantizedCheckpoint:
        """Open a directory that holds ``alphaquant/modules.json``.

        Raises:
            CheckpointError: the checkpoint or its module table is missing or malformed, or they disagree.
        """
        checkpoint = Checkpoint.open(path)
        table = _read_table(checkpoint.path / MODULES_FILE)
        if table is None:
            raise CheckpointError(
                f"the checkpoint has no {MODULES_FILE}",
                where=str(checkpoint.path),
                remedy="give a directory that a quantization run wrote",
            )
        return cls(checkpoint, *table)

    def read_quantized(self, module: str) -> QuantizedTensor:
        """Codes and scales of one quantized module, as they were stored.

        Raises:
            CheckpointError: the module is not quantized, or a tensor is not what its scheme implies.
        """
        if module not in self.modules:
            raise CheckpointError(
                f"{module} is not among the quantized modules",
                where=str(self.checkpoint.path / MODULES_FILE),
                remedy="read it as a plain tensor",
            )
        scheme, shape = self.modules[module]
        return self.layout.read(module, self.checkpoint.read, scheme, shape)

    def codes_of(self, module: str) -> QuantizedTensor | None:
        """As `read_quantized`, but None where the module is not quantized."""
        return self.read_quantized(module) if module in self.modules else None

    def _dequantized(self, module: str) -> Tensor:
        return dequantize(self.read_quantized(module))


def open_source(path: str | Path) -> Checkpoint | BlockScaled | DerivedSource:
    """The tensors of a checkpoint directory, de-quantized where ``alphaquant/modules.json`` says they are quantized.

    Without that table it is an original, whose weights may be FP8 with scales for blocks, or one that another tool
    has quantized to compressed-tensors or GPTQ.

    Raises:
        CheckpointError: the checkpoint or its module table is malformed, or they disagree.
    """
    checkpoint = Checkpoint.open(path)
    table = _read_table(checkpoint.path / MODULES_FILE)
    if table is None or table[0].name == "dense":  # a dense checkpoint's weights are plain tensors
        return open_peer(checkpoint) if is_peer(checkpoint) else unquantized(checkpoint)
    return QuantizedCheckpoint(checkpoint, *table)


def _read_table(path: Path) -> tuple[Layout, dict[str, StoredModule]] | None:
    """The parsed module table, or None when there is no such file."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"the table has more than {_MAX_BYTES} bytes", where=str(path), remedy=_REMEDY)
        table = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {error.strerror or error}",
            where=str(path),
            remedy="check the file and its rights",
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8 errors
        raise _malformed(path, f"it is not valid JSON: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("modules"), dict):
        raise _malformed(path, 'it is no object with "version", "layout" and "modules"')
    version, layout = table.get("version"), table.get("layout")
    if type(version) is not int or version != _VERSION:
        raise CheckpointError(
            f"the module table is of version {version!r}, and {_VERSION} is read",
            where=str(path),
            remedy="install a newer alphaquant" if type(version) is int and version > _VERSION else _REMEDY,
        )
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise _malformed(path, f"its layout is {layout!r}, and known ones are {', '.join(LAYOUTS)}")
    return LAYOUTS[layout], {
        name: _parse_entry(path, name, entry, LAYOUTS[layout]) for name, entry in table["modules"].items()
    }


def _parse_entry(path: Path, name: str, entry: Any, layout: Layout) -> StoredModule:
    where = f"its entry {name!r}"
    if not isinstance(entry, dict) or {"activation", *entry} != {"activation", *_KEYS}:
        raise _malformed(path, f"{where} does not have exactly the keys {', '.join(_KEYS)}, and activation or not")
    format_name, group_size, symmetric, scale_dtype, shape = (entry[key] for key in _KEYS)
    if type(group_size) is not int or not isinstance(symmetric, bool) or not isinstance(format_name, str):
        raise _malformed(path, f"{where} has a format, group_size or symmetric of a wrong type")
    if not isinstance(scale_dtype, str) or scale_dtype not in _SCALE_DTYPES:
        raise _malformed(path, f"{where} has the scale_dtype {scale_dtype!r}, not one of {', '.join(_SCALE_DTYPES)}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise _malformed(path, f"{where} has the shape {str(shape)[:80]}, not [outputs, inputs]")
    activation = entry.get("activation", Activation.BF16.value)
    if activation not in (known := [each.value for each in Activation]):
        raise _malformed(path, f"{where} has the activation {str(activation)[:80]!r}, not one of {', '.join(known)}")
    try:
        fmt = parse_format(format_name)
        if fmt is None:
            raise _malformed(path, f"{where} has the format {format_name!r}, which is none of a quantized module")
        dtype = _SCALE_DTYPES[scale_dtype]
        scheme = Scheme(fmt, group_size, symmetric=symmetric, scale_dtype=dtype, activation=Activation(activation))
    except PlanError as error:
        raise _malformed(path, f"{where}: {error.what}") from error
    size = (shape[0], shape[1])
    if (reason := layout.unsupported(scheme, size)) is not None:
        raise _malformed(path, f"{where} does not go into the {layout.name} layout: {reason}")
    return StoredModule(scheme, size)


def _malformed(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"the module table cannot be used: {why}", where=str(path), remedy=_REMEDY)


if TYPE_CHECKING:
    _PLAIN: type[TensorSource] = Checkpoint
    _BLOCKS: type[TensorSource] = BlockScaled
    _QUANTIZED: type[TensorSource] = QuantizedCheckpoint
