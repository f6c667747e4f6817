"""The decoder: one function for each half-layer, and a small model around them.

Every family runs through this file; what differs between them is data in `ModelSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.models.attention import KeyValueCache, attention, rms_norm
from alphaquant.models.linear import LayerWeights
from alphaquant.models.moe import feed_forward, route
from alphaquant.models.rope import rope_tables
from alphaquant.models.spec import MoESpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from alphaquant.models.spec import ModelSpec
    from alphaquant.models.tap import Choice, Tap

__all__ = [
    "Decoder",
    "LayerWeights",
    "attention_half",
    "expert_choice",
    "head_input",
    "mlp_half",
    "rope_for",
    "router_input",
]


def rope_for(spec: ModelSpec, length: int, device: torch.device | str, start: int = 0) -> tuple[Tensor, Tensor]:
    """Rotary tables for positions `start … start + length`."""
    return rope_tables(spec.rope, spec.layers[0].attention.rotary_dim, length, device, start)


def attention_half(
    x_BLD: Tensor,
    weights: Mapping[str, Tensor],
    spec: ModelSpec,
    layer: int,
    rope_LC: tuple[Tensor, Tensor],
    *,
    tap: Tap | None = None,
    cache: KeyValueCache | None = None,
) -> Tensor:
    """Residual stream `[B, L, D]` after the attention of `layer`; with a `tap` only the inputs are shown."""
    normed = rms_norm(x_BLD, weights["input_layernorm.weight"], spec.rms_norm_eps)
    out = attention(normed, weights, spec.layers[layer].attention, spec.rms_norm_eps, rope_LC, tap, cache)
    return x_BLD if tap is not None else x_BLD + out


def mlp_half(
    x_BLD: Tensor,
    weights: Mapping[str, Tensor],
    spec: ModelSpec,
    layer: int,
    *,
    tap: Tap | None = None,
    choice: Choice | None = None,
) -> Tensor:
    """Residual stream `[B, L, D]` after the feed-forward of `layer`; see `feed_forward`."""
    normed = rms_norm(x_BLD, weights["post_attention_layernorm.weight"], spec.rms_norm_eps)
    out = feed_forward(normed, weights, spec.layers[layer].mlp, tap, choice)
    return x_BLD if tap is not None else x_BLD + out


def expert_choice(x_BLD: Tensor, weights: Mapping[str, Tensor], spec: ModelSpec, layer: int) -> Choice:
    """What the router of `layer` chooses for a residual stream before its feed-forward, token by token."""
    mlp = spec.layers[layer].mlp
    assert isinstance(mlp, MoESpec)
    return route(router_input(x_BLD, weights, spec), weights, mlp)


def router_input(x_BLD: Tensor, weights: Mapping[str, Tensor], spec: ModelSpec) -> Tensor:
    """What the router reads `[T, D]` of a residual stream before the feed-forward."""
    return rms_norm(x_BLD, weights["post_attention_layernorm.weight"], spec.rms_norm_eps).flatten(0, -2)


def head_input(x_BLD: Tensor, outer: Mapping[str, Tensor], spec: ModelSpec) -> Tensor:
    """Final norm: what the head reads."""
    return rms_norm(x_BLD, outer["model.norm.weight"], spec.rms_norm_eps)


def head_weight(outer: Mapping[str, Tensor]) -> Tensor:
    """The head's weight `[V, D]`: its own, or the embedding where they are tied."""
    weight = outer.get("lm_head.weight")
    return outer["model.embed_tokens.weight"] if weight is None else weight


@dataclass(frozen=True)
class Decoder:
    """A whole model in memory: computes logits and generates.

    `outer` holds embedding, final norm and head; `layers` the weights of each layer, experts stacked `[E, O, I]`.
    """

    spec: ModelSpec
    outer: LayerWeights
    layers: Sequence[LayerWeights]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.outer["model.norm.weight"].device

    def logits(self, ids_BL: Tensor, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """Logits `[B, L, V]` of token ids `[B, L]`; with caches, of positions that follow what they hold."""
        start = caches[0].length if caches else 0
        rope = rope_for(self.spec, ids_BL.shape[1], ids_BL.device, start)
        x = F.embedding(ids_BL, self.outer["model.embed_tokens.weight"])
        for index, weights in enumerate(self.layers):
            cache = caches[index] if caches else None
            x = attention_half(x, weights, self.spec, index, rope, cache=cache)
            x = mlp_half(x, weights, self.spec, index)
        return F.linear(head_input(x, self.outer, self.spec), head_weight(self.outer))

    @torch.no_grad()
    def generate(
        self,
        ids_BL: Tensor,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Prompt and continuation `[B, L + n]`: greedy at temperature 0, sampled above; stops when all saw `eos_id`."""
        caches = [KeyValueCache() for _ in self.layers]
        ids, step = ids_BL, ids_BL
        finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            logits_BV = self.logits(step, caches)[:, -1].float()
            if temperature > 0:
                step = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
            else:
                step = logits_BV.argmax(-1, keepdim=True)
            if eos_id is not None:
                step = step.masked_fill(finished[:, None], eos_id)
                finished |= step[:, 0] == eos_id
            ids = torch.cat([ids, step], 1)
            if bool(finished.all()):
                break
        return ids
