"""What a family is, and what most families spell alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.errors import ConfigError
from alphaquant.models.spec import AttentionSpec, LayerSpec, MLPSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from alphaquant.models.config import ConfigReader

__all__ = ["Family", "attention", "dense", "qwen_is_routed", "qwen_windows", "uniform", "without_windows"]

_LAYER_TYPES = ("full_attention", "sliding_attention")


class Family(NamedTuple):
    """A family: its coarse architecture name, how to read its layers, its native names, its default for theta."""

    architecture: str
    layers: Callable[[ConfigReader], tuple[LayerSpec, ...]]
    renames: Mapping[str, str] = {}
    rope_theta: float = 10000.0


def attention(cfg: ConfigReader, *, head_dim: int | None = None, **particular: Any) -> AttentionSpec:
    """Grouped-query attention; `head_dim` holds where the config has none, hidden size by heads where neither has.

    Raises:
        ConfigError: names heads that do not divide.
    """
    num_heads = cfg.size("num_attention_heads")
    num_kv_heads = cfg.size("num_key_value_heads", num_heads)
    hidden = cfg.size("hidden_size")
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}",
            where=cfg.where,
        )
    if head_dim is None and not cfg.has("head_dim") and hidden % num_heads:
        raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {num_heads}", where=cfg.where)
    head_dim = cfg.size("head_dim", head_dim or hidden // num_heads)
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} is odd, and rotary embeddings turn pairs", where=cfg.where)
    return AttentionSpec(num_heads, num_kv_heads, head_dim, **particular)


def uniform(cfg: ConfigReader, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """The same layer all the way up."""
    return (layer,) * cfg.size("num_hidden_layers")


def dense(cfg: ConfigReader) -> MLPSpec:
    """A dense block without biases."""
    return MLPSpec(cfg.size("intermediate_size"))


def qwen_windows(cfg: ConfigReader) -> tuple[int | None, ...]:
    """The sliding window of each layer as Qwen's dense models spell it, None where all is seen.

    Raises:
        ConfigError: a layer slides, and there is no window.
    """
    window = None
    if cfg.flag("use_sliding_window", default=False):
        window = cfg.nullable_size("sliding_window", absent=4096)
    num_layers = cfg.size("num_hidden_layers")
    first = cfg.count("max_window_layers", 28)
    types = cfg.choices("layer_types", _LAYER_TYPES, num_layers)
    if types is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if window is None and "sliding_attention" in types:
        raise ConfigError(
            f"layer_types has sliding_attention for layer {types.index('sliding_attention')}, and no sliding_window",
            where=cfg.where,
            remedy="set use_sliding_window and sliding_window, or full_attention for every layer",
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def without_windows(cfg: ConfigReader) -> None:
    """Refuse sliding windows in Qwen's mixtures: which layers slide differs between releases of transformers.

    Raises:
        ConfigError: names the key.
    """
    cfg.never("use_sliding_window")
    cfg.choices("layer_types", _LAYER_TYPES[:1], cfg.size("num_hidden_layers"))


def qwen_is_routed(cfg: ConfigReader) -> tuple[bool, ...]:
    """Which layers have experts, as Qwen's mixtures spell it."""
    step, plain = cfg.size("decoder_sparse_step", 1), cfg.counts("mlp_only_layers")
    return tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(cfg.size("num_hidden_layers")))
