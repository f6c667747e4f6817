"""Mixtral: experts in every layer under names of its own, their scores always renormalised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import Family, attention, uniform
from alphaquant.models.spec import LayerSpec, MoESpec

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["MIXTRAL"]

_NAMES = {
    "mlp.gate": "block_sparse_moe.gate",
    "mlp.experts.*.gate_proj": "block_sparse_moe.experts.*.w1",
    "mlp.experts.*.up_proj": "block_sparse_moe.experts.*.w3",
    "mlp.experts.*.down_proj": "block_sparse_moe.experts.*.w2",
}


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    moe = MoESpec(
        num_experts=cfg.size("num_local_experts", or_key="num_experts"),
        top_k=cfg.size("num_experts_per_tok"),
        intermediate_size=cfg.size("intermediate_size"),
        normalize_top_k=True,
    )
    window = cfg.nullable_size("sliding_window", absent=None)
    return uniform(cfg, LayerSpec(attention(cfg, num_kv_heads=8, sliding_window=window), moe))


MIXTRAL = Family("mixtral", _layers, _NAMES, rope_theta=1e6)
