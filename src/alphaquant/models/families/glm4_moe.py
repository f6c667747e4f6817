"""GLM-4.5 and GLM-4-MoE: half of each head turns, routed as DeepSeek-V3 is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import (
    SHARED_EXPERTS,
    Family,
    attention,
    deepseek_is_routed,
    dense,
    sigmoid_experts,
)
from alphaquant.models.spec import LayerSpec, QKNorm

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["GLM4_MOE"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    bias = cfg.flag("attention_bias", default=False)
    norm = QKNorm.HEAD if cfg.flag("use_qk_norm", default=False) else QKNorm.NONE
    heads = attention(cfg, num_kv_heads=8, rotary_share=0.5, qkv_bias=bias, qk_norm=norm)
    moe, plain = sigmoid_experts(cfg), dense(cfg)
    return tuple(LayerSpec(heads, moe if is_routed else plain) for is_routed in deepseek_is_routed(cfg))


GLM4_MOE = Family("glm", _layers, SHARED_EXPERTS, prediction_layers=1)
