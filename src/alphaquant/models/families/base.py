"""What a family is, and what most families spell alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.errors import ConfigError
from alphaquant.models.spec import AttentionSpec, LatentSpec, LayerSpec, MLPSpec, MoESpec, Scoring

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from alphaquant.models.config import ConfigReader

__all__ = [
    "SHARED_EXPERTS",
    "Family",
    "attention",
    "deepseek_is_routed",
    "dense",
    "grouped_experts",
    "latent",
    "qwen_is_routed",
    "qwen_windows",
    "sigmoid_experts",
    "uniform",
    "without_windows",
]

_REMEDY = "check these keys in config.json: get the model's own file again"

SHARED_EXPERTS = {
    f"mlp.shared_expert.{name}": f"mlp.shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


class Family(NamedTuple):
    """A family: its coarse architecture name, how to read its layers, its native names, and defaults.

    Those are theta, and how many layers for multi-token prediction may follow the last one.
    """

    architecture: str
    layers: Callable[[ConfigReader], tuple[LayerSpec, ...]]
    renames: Mapping[str, str] = {}
    rope_theta: float = 10000.0
    prediction_layers: int = 0


def attention(
    cfg: ConfigReader,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rotary_share: float | None = None,
    **particular: Any,
) -> AttentionSpec:
    """Grouped-query attention, with a family's defaults for keys that its config leaves out, as transformers has them.

    Without a default keys and values have as many heads as queries, these divide the hidden size, and all of a head
    turns, which is then the only share that is implemented.

    Raises:
        ConfigError: names heads that do not divide.
    """
    num_heads = cfg.size("num_attention_heads")
    num_kv_heads = cfg.nullable_size("num_key_value_heads", absent=num_kv_heads) or num_heads
    hidden = cfg.size("hidden_size")
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}",
            where=cfg.where,
            remedy=_REMEDY,
        )
    if head_dim is None and not cfg.has("head_dim") and hidden % num_heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {num_heads}",
            where=cfg.where,
            remedy=_REMEDY,
        )
    head_dim = cfg.size("head_dim", head_dim or hidden // num_heads)
    rotary_dim = int(head_dim * cfg.rotary_share(rotary_share))
    _check_pairs(cfg, "head_dim", head_dim, rotary_dim)
    return AttentionSpec(num_heads, num_kv_heads, head_dim, rotary_dim, **particular)


def latent(cfg: ConfigReader, *, num_kv_heads: int | None = None, interleaved: bool = True) -> LatentSpec:
    """Multi-head latent attention as DeepSeek spells it; `num_kv_heads` holds where the config has none.

    Raises:
        ConfigError: names heads of keys that differ from those of queries.
    """
    num_heads, bias = cfg.size("num_attention_heads"), cfg.flag("attention_bias", default=False)
    num_kv_heads = cfg.nullable_size("num_key_value_heads", absent=num_kv_heads) or num_heads
    if num_kv_heads != num_heads:
        raise ConfigError(
            f"num_key_value_heads {num_kv_heads} is not num_attention_heads {num_heads}, as latent attention has it",
            where=cfg.where,
            remedy=_REMEDY,
        )
    nope_dim, rotary_dim = cfg.size("qk_nope_head_dim"), cfg.size("qk_rope_head_dim")
    _check_pairs(cfg, "qk_rope_head_dim", rotary_dim, rotary_dim)
    cfg.rotary_share()
    return LatentSpec(
        num_heads,
        nope_dim,
        rotary_dim,
        value_dim=cfg.size("v_head_dim"),
        kv_rank=cfg.size("kv_lora_rank"),
        q_rank=cfg.nullable_size("q_lora_rank", absent=1536),  # as transformers reads it
        softmax_scale=cfg.rope().latent_gain * (nope_dim + rotary_dim) ** -0.5,
        bias=bias,
        interleaved=interleaved,
    )


def _check_pairs(cfg: ConfigReader, key: str, size: int, rotary_dim: int) -> None:
    if rotary_dim % 2 or not rotary_dim:
        turned = "" if size == rotary_dim else f", of which {rotary_dim} channels turn,"
        raise ConfigError(
            f"{key} {size}{turned} is odd, and rotary embeddings turn pairs", where=cfg.where, remedy=_REMEDY
        )


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


def deepseek_is_routed(cfg: ConfigReader, *, num_dense: int | None = None) -> tuple[bool, ...]:
    """Which layers have experts, as DeepSeek's mixtures spell it; `num_dense` holds where the config has none."""
    first, every = cfg.count("first_k_dense_replace", num_dense), cfg.size("moe_layer_freq", 1)
    return tuple(layer >= first and layer % every == 0 for layer in range(cfg.size("num_hidden_layers")))


def grouped_experts(cfg: ConfigReader, *, limited: bool, **particular: Any) -> MoESpec:
    """Experts as DeepSeek spells them from V2 on; where `limited`, chosen from the best groups only.

    Raises:
        ConfigError: names groups that do not divide, or that hold too few experts.
    """
    num_experts, top_k = cfg.size("n_routed_experts"), cfg.size("num_experts_per_tok")
    inner, num_shared = cfg.size("moe_intermediate_size"), cfg.count("n_shared_experts")
    num_groups, top_groups = (cfg.size("n_group"), cfg.size("topk_group")) if limited else (1, 1)
    if num_experts % num_groups or top_groups > num_groups or num_experts == num_groups > 1:
        raise ConfigError(
            f"n_group {num_groups} and topk_group {top_groups} do not divide {num_experts} experts",
            where=cfg.where,
            remedy=_REMEDY,
        )
    if top_k > num_experts // num_groups * top_groups:
        raise ConfigError(
            f"num_experts_per_tok {top_k} exceeds the {num_experts // num_groups * top_groups} experts of topk_group "
            f"{top_groups}",
            where=cfg.where,
            remedy=_REMEDY,
        )
    return MoESpec(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=inner,
        routed_scaling=cfg.number("routed_scaling_factor"),
        shared=MLPSpec(num_shared * inner) if num_shared else None,
        num_groups=num_groups,
        top_groups=top_groups,
        exact_logits=True,
        **particular,
    )


def sigmoid_experts(cfg: ConfigReader) -> MoESpec:
    """Experts of DeepSeek-V3 and those who follow it: sigmoid scores with a correction, chosen from the best groups."""
    cfg.choice("scoring_func", ("sigmoid",), "sigmoid")
    cfg.choice("topk_method", ("noaux_tc",), "noaux_tc")
    normalize = cfg.flag("norm_topk_prob", default=True)
    return grouped_experts(cfg, limited=True, normalize_top_k=normalize, scoring=Scoring.SIGMOID)
