"""DeepSeek-MoE, the first: fine-grained experts, shared ones without a gate, the first layers dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import SHARED_EXPERTS, Family, attention, deepseek_is_routed, dense
from alphaquant.models.spec import LayerSpec, MLPSpec, MoESpec

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["DEEPSEEK"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    cfg.choice("scoring_func", ("softmax",), "softmax")
    cfg.choice("topk_method", ("greedy",), "greedy")
    cfg.never("n_group", "topk_group")
    bias = cfg.flag("attention_bias", default=False)
    heads = attention(cfg, qkv_bias=bias, out_bias=bias)
    inner, top_k = cfg.size("moe_intermediate_size"), cfg.size("num_experts_per_tok")
    num_shared = cfg.count("n_shared_experts", 0)
    moe = MoESpec(
        num_experts=cfg.size("n_routed_experts"),
        top_k=top_k,
        intermediate_size=inner,
        normalize_top_k=cfg.flag("norm_topk_prob", default=False) and top_k > 1,  # one score stays what it is
        routed_scaling=cfg.number("routed_scaling_factor", 1.0),
        shared=MLPSpec(num_shared * inner) if num_shared else None,
    )
    plain, routed = dense(cfg), deepseek_is_routed(cfg, num_dense=0)
    return tuple(LayerSpec(heads, moe if is_routed else plain) for is_routed in routed)


DEEPSEEK = Family("deepseek", _layers, SHARED_EXPERTS)
