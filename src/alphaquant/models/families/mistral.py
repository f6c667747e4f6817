"""Mistral: dense, with one sliding window for all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import Family, attention, dense, uniform
from alphaquant.models.spec import LayerSpec

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["MISTRAL"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    window = cfg.nullable_size("sliding_window", absent=4096)  # as transformers reads it
    return uniform(cfg, LayerSpec(attention(cfg, num_kv_heads=8, sliding_window=window), dense(cfg)))


MISTRAL = Family("standard", _layers)
