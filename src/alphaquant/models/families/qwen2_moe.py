"""Qwen2-MoE and Qwen1.5-MoE: routed experts and a shared one behind a sigmoid gate, some layers dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import Family, attention, dense, qwen_is_routed, without_windows
from alphaquant.models.spec import LayerSpec, MLPSpec, MoESpec

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["QWEN2_MOE"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    without_windows(cfg)
    heads = attention(cfg, num_kv_heads=16, qkv_bias=cfg.flag("qkv_bias", default=True))
    moe = MoESpec(
        num_experts=cfg.size("num_experts", or_key="num_local_experts"),
        top_k=cfg.size("num_experts_per_tok"),
        intermediate_size=cfg.size("moe_intermediate_size"),
        normalize_top_k=cfg.flag("norm_topk_prob", default=False),
        shared=MLPSpec(cfg.size("shared_expert_intermediate_size")),
        shared_gate=True,
    )
    plain = dense(cfg)
    return tuple(LayerSpec(heads, moe if is_routed else plain) for is_routed in qwen_is_routed(cfg))


QWEN2_MOE = Family("qwen", _layers)
