"""How quantized modules are named and stored, both ways: compressed-tensors, humming, GPTQ and dense."""

from __future__ import annotations

from alphaquant.layouts.base import LAYOUTS, Layout, choose_layout
from alphaquant.layouts.compressed_tensors import CompressedTensorsLayout
from alphaquant.layouts.dense import DenseLayout
from alphaquant.layouts.gptq import GptqLayout
from alphaquant.layouts.humming import HummingLayout
from alphaquant.layouts.reader import (
    MODULES_FILE,
    QuantizedCheckpoint,
    StoredModule,
    module_table,
    open_source,
)

__all__ = [
    "LAYOUTS",
    "MODULES_FILE",
    "CompressedTensorsLayout",
    "DenseLayout",
    "GptqLayout",
    "HummingLayout",
    "Layout",
    "QuantizedCheckpoint",
    "StoredModule",
    "choose_layout",
    "module_table",
    "open_source",
]
