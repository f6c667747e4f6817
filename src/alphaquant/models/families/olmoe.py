"""OLMoE: experts in every layer, queries and keys normed over all heads at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import Family, attention, uniform
from alphaquant.models.spec import LayerSpec, MoESpec, QKNorm

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["OLMOE"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    bias = cfg.flag("attention_bias", default=False)
    clip = cfg.optional_number("clip_qkv")
    moe = MoESpec(
        num_experts=cfg.size("num_experts"),
        top_k=cfg.size("num_experts_per_tok"),
        intermediate_size=cfg.size("intermediate_size"),
        normalize_top_k=cfg.flag("norm_topk_prob", default=False),
    )
    heads = attention(cfg, qkv_bias=bias, out_bias=bias, qk_norm=QKNorm.FULL, clip_qkv=clip)
    return uniform(cfg, LayerSpec(heads, moe))


OLMOE = Family("olmoe", _layers)
