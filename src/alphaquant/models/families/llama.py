"""Llama: dense, with biases where the config asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models.families.base import Family, attention, uniform
from alphaquant.models.spec import LayerSpec, MLPSpec

if TYPE_CHECKING:
    from alphaquant.models.config import ConfigReader

__all__ = ["LLAMA"]


def _layers(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    bias = cfg.flag("attention_bias", default=False)
    mlp = MLPSpec(cfg.size("intermediate_size"), bias=cfg.flag("mlp_bias", default=False))
    return uniform(cfg, LayerSpec(attention(cfg, qkv_bias=bias, out_bias=bias), mlp))


LLAMA = Family("standard", _layers)
