"""DeepSeek-V3 and R1: latent attention, sigmoid scores with a learned correction, experts from the best groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import (
    SHARED_EXPERTS,
    Family,
    deepseek_is_routed,
    dense,
    latent,
    sigmoid_experts,
)
from alphaquant.models.spec import LayerSpec

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["DEEPSEEK_V3"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    heads = latent(cfg, num_kv_heads=128, interleaved=cfg.flag("rope_interleave", default=True))
    moe, plain = sigmoid_experts(cfg), dense(cfg)
    return tuple(LayerSpec(heads, moe if is_routed else plain) for is_routed in deepseek_is_routed(cfg))


DEEPSEEK_V3 = Family("deepseek", _layers, SHARED_EXPERTS, prediction_layers=1)
