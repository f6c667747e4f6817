"""The families: one short descriptor each, from config.json to `ModelSpec`."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.errors import ConfigError
from alphaquant.models.config import ConfigReader
from alphaquant.models.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, MoESpec, QKNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["FAMILIES", "Family", "detect"]


class Family(NamedTuple):
    """A family: its coarse architecture name, how to read its config, and its native names."""

    architecture: str
    layers: Callable[[ConfigReader], tuple[LayerSpec, ...]]
    renames: Mapping[str, str] = {}


def _attention(cfg: ConfigReader, **particular: Any) -> AttentionSpec:
    """Grouped-query attention as most families spell it."""
    num_heads = cfg.size("num_attention_heads")
    num_kv_heads = cfg.size("num_key_value_heads", num_heads)
    hidden = cfg.size("hidden_size")
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}",
            where="config.json",
        )
    if not cfg.has("head_dim") and hidden % num_heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {num_heads}", where="config.json"
        )
    return AttentionSpec(num_heads, num_kv_heads, cfg.size("head_dim", hidden // num_heads), **particular)


def _olmoe(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    cfg.choice("hidden_act", ("silu",))
    bias = cfg.flag("attention_bias", default=False)
    attention = _attention(
        cfg, qkv_bias=bias, out_bias=bias, qk_norm=QKNorm.FULL, clip_qkv=cfg.optional_number("clip_qkv")
    )
    moe = MoESpec(
        num_experts=cfg.size("num_experts"),
        top_k=cfg.size("num_experts_per_tok"),
        intermediate_size=cfg.size("intermediate_size"),
        normalize_top_k=cfg.flag("norm_topk_prob", default=False),
    )
    return (LayerSpec(attention, moe),) * cfg.size("num_hidden_layers")


def _llama(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    cfg.choice("hidden_act", ("silu",))
    bias = cfg.flag("attention_bias", default=False)
    mlp = MLPSpec(cfg.size("intermediate_size"), bias=cfg.flag("mlp_bias", default=False))
    layer = LayerSpec(_attention(cfg, qkv_bias=bias, out_bias=bias), mlp)
    return (layer,) * cfg.size("num_hidden_layers")


def _mistral(cfg: ConfigReader) -> tuple[LayerSpec, ...]:
    cfg.choice("hidden_act", ("silu",))
    window = cfg.nullable_size("sliding_window", absent=4096)  # as transformers reads it
    layer = LayerSpec(_attention(cfg, sliding_window=window), MLPSpec(cfg.size("intermediate_size")))
    return (layer,) * cfg.size("num_hidden_layers")


FAMILIES: dict[str, Family] = {
    "llama": Family("standard", _llama),
    "mistral": Family("standard", _mistral),
    "olmoe": Family("olmoe", _olmoe),
}


def detect(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The model that a config.json describes.

    Raises:
        ConfigError: for an unknown family, a missing key, or a behaviour that is not implemented.
    """
    cfg = ConfigReader(config, where)
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        close = get_close_matches(str(name), FAMILIES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"model_type is {name!r}, which is not a known family",
            where=where,
            remedy=f"known families: {', '.join(sorted(FAMILIES))}{hint}",
        )
    layers = family.layers(cfg)
    for layer in layers:
        if isinstance(layer.mlp, MoESpec) and layer.mlp.top_k > layer.mlp.num_experts:
            raise ConfigError(
                f"num_experts_per_tok {layer.mlp.top_k} exceeds the {layer.mlp.num_experts} experts", where=where
            )
    return ModelSpec(
        family=str(name),
        architecture=family.architecture,
        vocab_size=cfg.size("vocab_size"),
        hidden_size=cfg.size("hidden_size"),
        layers=layers,
        rms_norm_eps=cfg.number("rms_norm_eps"),
        rope=cfg.rope(),
        max_positions=cfg.size("max_position_embeddings"),
        tie_embeddings=cfg.flag("tie_word_embeddings", default=False),
        dtype=cfg.dtype(),
        renames=family.renames,
    )
