"""Typed descriptor of a decoder: what a family's config.json means, and which tensors it implies.

`Parameter` rows are the one place that says which tensors a layer has, what they are called in the checkpoint,
which of them share an input, and what a plan may address.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch

from alphaquant.plan import Module, ModuleKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "AttentionSpec",
    "LatentSpec",
    "LayerSpec",
    "MLPSpec",
    "MoESpec",
    "ModelSpec",
    "Parameter",
    "QKNorm",
    "RopeKind",
    "RopeSpec",
    "Scoring",
    "Source",
]

_LAYER = re.compile(r"model\.layers\.([0-9]+)\.")


class QKNorm(Enum):
    """Where queries and keys are normalised: nowhere, over all heads at once (OLMoE), or head by head (Qwen3)."""

    NONE = "none"
    FULL = "full"
    HEAD = "head"


class RopeKind(Enum):
    """How rotary frequencies follow from theta."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"


class Scoring(Enum):
    """How a router's logits become scores.

    SOFTMAX: over all experts; a group counts as much as its best expert (DeepSeek-V2).
    SIGMOID: of each by itself; a learned correction is added where experts are chosen, not where their outputs are
    weighted, and a group counts as much as its best two (DeepSeek-V3).
    """

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class Source(Enum):
    """An activation that linears read; linears with one source share its Hessian."""

    ATTENTION_IN = "attention_in"
    QUERY_LATENT = "query_latent"
    KV_LATENT = "kv_latent"
    ATTENTION_OUT = "attention_out"
    MLP_IN = "mlp_in"
    MLP_HIDDEN = "mlp_hidden"
    EXPERT_IN = "expert_in"
    EXPERT_HIDDEN = "expert_hidden"
    SHARED_IN = "shared_in"
    SHARED_HIDDEN = "shared_hidden"
    HEAD_IN = "head_in"


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021) and its length extensions.

    `attention_factor` multiplies cosines and sines; `latent_gain` the softmax scale of latent attention.
    """

    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    latent_gain: float = 1.0


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped-query attention; the first `rotary_dim` channels of a head turn with the position."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm = QKNorm.NONE
    clip_qkv: float | None = None
    sliding_window: int | None = None


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values come from one low-rank latent.

    A query or key is `nope_dim` channels without position, then `rotary_dim` with it, of which neighbours turn
    together where `interleaved`, else halves; the key's are shared by all heads. Without `q_rank` queries have no
    latent.
    """

    num_heads: int
    nope_dim: int
    rotary_dim: int
    value_dim: int
    kv_rank: int
    q_rank: int | None
    softmax_scale: float
    bias: bool = False
    interleaved: bool = True


@dataclass(frozen=True, slots=True)
class MLPSpec:
    """Gated SiLU feed-forward block."""

    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MoESpec:
    """Routed experts with top-k scores, and shared experts where `shared` is set.

    `routed_scaling` multiplies the scores, after they were renormalised where they are. With `num_groups` above one
    only the experts of the best `top_groups` may be chosen. `exact_logits`: the router's product itself is fp32.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize_top_k: bool
    routed_scaling: float = 1.0
    shared: MLPSpec | None = None
    shared_gate: bool = False
    scoring: Scoring = Scoring.SOFTMAX
    num_groups: int = 1
    top_groups: int = 1
    exact_logits: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: attention, then a dense or a routed feed-forward block."""

    attention: AttentionSpec | LatentSpec
    mlp: MLPSpec | MoESpec


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a layer, stacked over experts where `num_experts` is set.

    `role` is its canonical name inside the layer, with `*` for the expert; `shape` is that of one expert.
    Parameters with a `source` are linears that a plan may quantize. One with a `dtype` keeps it, whatever the type
    that is worked in.
    """

    role: str
    leaf: str
    shape: tuple[int, ...]
    kind: ModuleKind
    num_experts: int | None = None
    source: Source | None = None
    dtype: torch.dtype | None = None

    @property
    def key(self) -> str:
        """Its key among a layer's weights: `mlp.experts.gate_proj.weight` holds all experts `[E, O, I]`."""
        return f"{self.role.replace('.*', '')}.{self.leaf}"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything that the decoder needs to know of a model.

    `prediction_layers` may lie behind the last one in a checkpoint, for multi-token prediction: they go along unread.
    """

    family: str
    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    rms_norm_eps: float
    rope: RopeSpec
    max_positions: int
    tie_embeddings: bool
    dtype: torch.dtype
    renames: Mapping[str, str] = field(default_factory=dict)
    prediction_layers: int = 0

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def has_experts(self) -> bool:
        """Whether any layer routes its tokens."""
        return any(isinstance(layer.mlp, MoESpec) for layer in self.layers)

    def parameters(self, layer: int) -> tuple[Parameter, ...]:
        """All parameters of layer `layer`, in the order of the forward pass."""
        return tuple(_layer_parameters(self.hidden_size, self.layers[layer]))

    def outer_parameters(self) -> tuple[Parameter, ...]:
        """The parameters outside the layers: embedding, final norm, head."""
        shape = (self.vocab_size, self.hidden_size)
        rows = [
            Parameter("model.embed_tokens", "weight", shape, ModuleKind.EMBEDDING),
            Parameter("model.norm", "weight", (self.hidden_size,), ModuleKind.NORM),
        ]
        if not self.tie_embeddings:
            rows.append(Parameter("lm_head", "weight", shape, ModuleKind.HEAD, source=Source.HEAD_IN))
        return tuple(rows)

    def module_names(self, layer: int, parameter: Parameter) -> list[str]:
        """Checkpoint names (without the leaf) of a layer's parameter, one for each expert."""
        native = self.renames.get(parameter.role, parameter.role)
        return _expand(f"model.layers.{layer}.{native}", parameter.num_experts)

    def tensor_names(self, layer: int, parameter: Parameter) -> list[str]:
        """Checkpoint names of the tensors behind a layer's parameter, one for each expert."""
        return [f"{name}.{parameter.leaf}" for name in self.module_names(layer, parameter)]

    def expected_tensors(self) -> set[str]:
        """Names of all tensors that the checkpoint must hold."""
        names = {f"{p.role}.{p.leaf}" for p in self.outer_parameters()}
        for layer in range(self.num_layers):
            for parameter in self.parameters(layer):
                names.update(self.tensor_names(layer, parameter))
        return names

    def is_carried(self, name: str) -> bool:
        """Whether a tensor is one of a layer for multi-token prediction."""
        found = _LAYER.match(name)
        return found is not None and 0 <= int(found[1]) - self.num_layers < self.prediction_layers

    def modules(self) -> Iterator[Module]:
        """Every module with a weight, as a plan sees it: checkpoint name, canonical alias, kind and shape."""
        outer = self.outer_parameters()
        yield _module(outer[0].role, outer[0].role, outer[0])
        for layer in range(self.num_layers):
            for parameter in self.parameters(layer):
                if parameter.leaf != "weight":
                    continue
                aliases = _expand(f"model.layers.{layer}.{parameter.role}", parameter.num_experts)
                for name, alias in zip(self.module_names(layer, parameter), aliases, strict=True):
                    yield _module(name, alias, parameter)
        for parameter in outer[1:]:
            yield _module(parameter.role, parameter.role, parameter)


def _expand(pattern: str, num_experts: int | None) -> list[str]:
    if num_experts is None:
        return [pattern]
    return [pattern.replace(".*", f".{expert}") for expert in range(num_experts)]


def _module(name: str, alias: str, parameter: Parameter) -> Module:
    out_features, in_features = parameter.shape if len(parameter.shape) == 2 else (1, parameter.shape[0])
    return Module(name, alias, parameter.kind, out_features, in_features)


def _layer_parameters(hidden: int, layer: LayerSpec) -> Iterator[Parameter]:
    yield Parameter("input_layernorm", "weight", (hidden,), ModuleKind.NORM)
    if isinstance(layer.attention, LatentSpec):
        yield from _latent_parameters(hidden, layer.attention)
    else:
        yield from _attention_parameters(hidden, layer.attention)
    yield Parameter("post_attention_layernorm", "weight", (hidden,), ModuleKind.NORM)
    if isinstance(layer.mlp, MLPSpec):
        yield from _mlp_parameters("mlp", hidden, layer.mlp, ModuleKind.MLP, (Source.MLP_IN, Source.MLP_HIDDEN))
        return
    moe = layer.mlp
    yield Parameter("mlp.gate", "weight", (moe.num_experts, hidden), ModuleKind.ROUTER, source=Source.MLP_IN)
    if moe.scoring is Scoring.SIGMOID:
        leaf = "e_score_correction_bias"
        yield Parameter("mlp.gate", leaf, (moe.num_experts,), ModuleKind.ROUTER, dtype=torch.float32)
    experts = MLPSpec(moe.intermediate_size)
    sources = (Source.EXPERT_IN, Source.EXPERT_HIDDEN)
    yield from _mlp_parameters("mlp.experts.*", hidden, experts, ModuleKind.EXPERT, sources, moe.num_experts)
    if moe.shared is not None:
        sources = (Source.SHARED_IN, Source.SHARED_HIDDEN)
        yield from _mlp_parameters("mlp.shared_expert", hidden, moe.shared, ModuleKind.SHARED_EXPERT, sources)
    if moe.shared_gate:
        kind = ModuleKind.SHARED_EXPERT_GATE
        yield Parameter("mlp.shared_expert_gate", "weight", (1, hidden), kind, source=Source.MLP_IN)


def _attention_parameters(hidden: int, spec: AttentionSpec) -> Iterator[Parameter]:
    width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    kind = ModuleKind.ATTENTION
    for name, out in (("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)):
        yield Parameter(f"self_attn.{name}", "weight", (out, hidden), kind, source=Source.ATTENTION_IN)
        if spec.qkv_bias:
            yield Parameter(f"self_attn.{name}", "bias", (out,), kind)
    if spec.qk_norm is not QKNorm.NONE:
        q_size, k_size = (width, kv_width) if spec.qk_norm is QKNorm.FULL else (spec.head_dim, spec.head_dim)
        yield Parameter("self_attn.q_norm", "weight", (q_size,), ModuleKind.NORM)
        yield Parameter("self_attn.k_norm", "weight", (k_size,), ModuleKind.NORM)
    yield Parameter("self_attn.o_proj", "weight", (hidden, width), kind, source=Source.ATTENTION_OUT)
    if spec.out_bias:
        yield Parameter("self_attn.o_proj", "bias", (hidden,), kind)


def _latent_parameters(hidden: int, spec: LatentSpec) -> Iterator[Parameter]:
    kind = ModuleKind.ATTENTION

    def linear(name: str, out: int, wide: int, source: Source, *, bias: bool = False) -> Iterator[Parameter]:
        yield Parameter(f"self_attn.{name}", "weight", (out, wide), kind, source=source)
        if bias:
            yield Parameter(f"self_attn.{name}", "bias", (out,), kind)

    query_width = spec.num_heads * (spec.nope_dim + spec.rotary_dim)
    if spec.q_rank is None:
        yield from linear("q_proj", query_width, hidden, Source.ATTENTION_IN)
    else:
        yield from linear("q_a_proj", spec.q_rank, hidden, Source.ATTENTION_IN, bias=spec.bias)
        yield Parameter("self_attn.q_a_layernorm", "weight", (spec.q_rank,), ModuleKind.NORM)
        yield from linear("q_b_proj", query_width, spec.q_rank, Source.QUERY_LATENT)
    latent_width = spec.kv_rank + spec.rotary_dim
    yield from linear("kv_a_proj_with_mqa", latent_width, hidden, Source.ATTENTION_IN, bias=spec.bias)
    yield Parameter("self_attn.kv_a_layernorm", "weight", (spec.kv_rank,), ModuleKind.NORM)
    yield from linear("kv_b_proj", spec.num_heads * (spec.nope_dim + spec.value_dim), spec.kv_rank, Source.KV_LATENT)
    yield from linear("o_proj", hidden, spec.num_heads * spec.value_dim, Source.ATTENTION_OUT, bias=spec.bias)


def _mlp_parameters(
    prefix: str,
    hidden: int,
    spec: MLPSpec,
    kind: ModuleKind,
    sources: tuple[Source, Source],
    num_experts: int | None = None,
) -> Iterator[Parameter]:
    inner = spec.intermediate_size
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for name, shape in shapes.items():
        source = sources[1] if name == "down_proj" else sources[0]
        yield Parameter(f"{prefix}.{name}", "weight", shape, kind, num_experts, source)
        if spec.bias:
            yield Parameter(f"{prefix}.{name}", "bias", shape[:1], kind, num_experts)
