"""DeepSeek-MoE (the first) from its published description, naively: loops over tokens and experts in float64.

Source: Dai et al. 2024, "DeepSeekMoE", equations 9 to 11, and the model card's config.json. It knows tensors by their
native names and nothing of the library.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / math.sqrt(float((x * x).mean()) + eps)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _mlp(x: Tensor, tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
    gate, up, down = (tensors[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return down @ (_silu(gate @ x) * (up @ x))


def choose(x: Tensor, router: Tensor, config: Mapping[str, Any]) -> dict[int, float]:
    """The experts of one token with their scores."""
    logits = [float(row @ x) for row in router]
    total = sum(math.exp(value) for value in logits)
    scores = {expert: math.exp(value) / total for expert, value in enumerate(logits)}
    chosen = sorted(scores, key=scores.__getitem__, reverse=True)[: config["num_experts_per_tok"]]
    whole = 1.0
    if config.get("norm_topk_prob") and len(chosen) > 1:
        whole = sum(scores[expert] for expert in chosen)
    return {expert: config.get("routed_scaling_factor", 1.0) * scores[expert] / whole for expert in chosen}


def _feed_forward(x: Tensor, tensors: Mapping[str, Tensor], layer: int, config: Mapping[str, Any]) -> Tensor:
    mlp = f"model.layers.{layer}.mlp"
    if layer < config.get("first_k_dense_replace", 0) or layer % config.get("moe_layer_freq", 1):
        return _mlp(x, tensors, mlp)
    out = torch.zeros_like(x)
    for expert, score in choose(x, tensors[f"{mlp}.gate.weight"], config).items():
        out = out + score * _mlp(x, tensors, f"{mlp}.experts.{expert}")
    if config.get("n_shared_experts"):
        out = out + _mlp(x, tensors, f"{mlp}.shared_experts")
    return out


def _turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of one head at one position: channel i turns with channel i + half."""
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def _attend(rows: list[Tensor], tensors: Mapping[str, Tensor], layer: int, config: Mapping[str, Any]) -> list[Tensor]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    def project(name: str, x: Tensor) -> Tensor:
        module = f"model.layers.{layer}.self_attn.{name}_proj"
        out = tensors[f"{module}.weight"] @ x
        return out + tensors[f"{module}.bias"] if f"{module}.bias" in tensors else out

    theta = config.get("rope_theta", 10000.0)
    q = [[_turn(h, p, theta) for h in project("q", x).chunk(heads)] for p, x in enumerate(rows)]
    k = [[_turn(h, p, theta) for h in project("k", x).chunk(kv_heads)] for p, x in enumerate(rows)]
    v = [project("v", x).chunk(kv_heads) for x in rows]
    out = []
    for position in range(len(rows)):
        context = []
        for head in range(heads):
            shared, query = head // (heads // kv_heads), q[position][head]
            weights = [math.exp(float(query @ k[p][shared]) / math.sqrt(len(query))) for p in range(position + 1)]
            seen = [weight * v[p][shared] for p, weight in enumerate(weights)]
            context.append(torch.stack(seen).sum(0) / sum(weights))
        out.append(project("o", torch.cat(context)))
    return out


def logits(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ids_BL: Tensor) -> Tensor:
    """Logits `[B, L, V]` in float64 of native tensors."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    eps, out = config["rms_norm_eps"], []
    for ids in ids_BL.tolist():
        rows = [tensors["model.embed_tokens.weight"][token] for token in ids]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            normed = [_norm(x, tensors[f"{prefix}.input_layernorm.weight"], eps) for x in rows]
            rows = [x + y for x, y in zip(rows, _attend(normed, tensors, layer, config), strict=True)]
            weight = tensors[f"{prefix}.post_attention_layernorm.weight"]
            rows = [x + _feed_forward(_norm(x, weight, eps), tensors, layer, config) for x in rows]
        out.append(torch.stack([tensors["lm_head.weight"] @ _norm(x, tensors["model.norm.weight"], eps) for x in rows]))
    return torch.stack(out)
