"""Checkpoints on disk: a lazy safetensors reader and an atomic shard writer."""

from __future__ import annotations

from alphaquant.checkpoint.blocks import BlockScaled, unquantized
from alphaquant.checkpoint.hub import SIDE_FILES, hub_id_of, open_model, resolve_model
from alphaquant.checkpoint.reader import Checkpoint, read_safetensors
from alphaquant.checkpoint.shard import Slot, TensorInfo, load_shard, read_rows
from alphaquant.checkpoint.writer import (
    ShardInfo,
    copy_file,
    sync_directory,
    write_bytes,
    write_index,
    write_json,
    write_shard,
    write_text,
)

__all__ = [
    "SIDE_FILES",
    "BlockScaled",
    "Checkpoint",
    "ShardInfo",
    "Slot",
    "TensorInfo",
    "copy_file",
    "hub_id_of",
    "load_shard",
    "open_model",
    "read_rows",
    "read_safetensors",
    "resolve_model",
    "sync_directory",
    "unquantized",
    "write_bytes",
    "write_index",
    "write_json",
    "write_shard",
    "write_text",
]
