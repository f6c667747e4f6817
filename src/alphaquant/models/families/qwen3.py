"""Qwen3: dense, with queries and keys normed head by head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import Family, attention, dense, qwen_windows
from alphaquant.models.spec import LayerSpec, QKNorm

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["QWEN3"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    bias = cfg.flag("attention_bias", default=False)
    heads = [
        attention(
            cfg, num_kv_heads=32, head_dim=128, qkv_bias=bias, out_bias=bias, qk_norm=QKNorm.HEAD, sliding_window=window
        )
        for window in qwen_windows(cfg)
    ]
    return tuple(LayerSpec(layer, dense(cfg)) for layer in heads)


QWEN3 = Family("standard", _layers)
