"""Qwen2 and Qwen2.5: dense, with biases on queries, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import Family, attention, dense, qwen_windows
from alphaquant.models.spec import LayerSpec

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["QWEN2"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    return tuple(
        LayerSpec(attention(cfg, num_kv_heads=32, qkv_bias=True, sliding_window=window), dense(cfg))
        for window in qwen_windows(cfg)
    )


QWEN2 = Family("standard", _layers)
