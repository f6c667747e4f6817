"""DeepSeek-V2 and V2-Lite: latent attention, experts chosen from the best groups or from all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import (
    SHARED_EXPERTS,
    Family,
    deepseek_is_routed,
    dense,
    grouped_experts,
    latent,
)
from alphaquant.models.spec import LayerSpec

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["DEEPSEEK_V2"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    cfg.choice("scoring_func", ("softmax",), "softmax")
    # the published code renormalises where it is true, transformers does not: no checkpoint has it
    cfg.never("norm_topk_prob", "mlp_bias")
    method = cfg.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    moe = grouped_experts(cfg, limited=method != "greedy", normalize_top_k=False)
    heads, plain = latent(cfg), dense(cfg)
    return tuple(LayerSpec(heads, moe if is_routed else plain) for is_routed in deepseek_is_routed(cfg))


DEEPSEEK_V2 = Family("deepseek", _layers, SHARED_EXPERTS)
