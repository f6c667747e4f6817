"""Qwen3-MoE: routed experts without a shared one, queries and keys normed head by head, some layers dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import Family, attention, dense, qwen_is_routed, without_windows
from alphaquant.models.spec import LayerSpec, MoESpec, QKNorm

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["QWEN3_MOE"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    without_windows(cfg)
    bias = cfg.flag("attention_bias", default=False)
    heads = attention(cfg, num_kv_heads=4, qkv_bias=bias, out_bias=bias, qk_norm=QKNorm.HEAD)
    moe = MoESpec(
        num_experts=cfg.size("num_experts", or_key="num_local_experts"),
        top_k=cfg.size("num_experts_per_tok"),
        intermediate_size=cfg.size("moe_intermediate_size"),
        normalize_top_k=cfg.flag("norm_topk_prob", default=False),
    )
    plain = dense(cfg)
    return tuple(LayerSpec(heads, moe if is_routed else plain) for is_routed in qwen_is_routed(cfg))


QWEN3_MOE = Family("qwen", _layers)
