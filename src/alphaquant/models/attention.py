"""Attention half of a layer.

Shapes: B sequences, L positions, D hidden, H query heads, K key-value heads, C head channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from alphaquant.models.spec import AttentionSpec, QKNorm, RopeKind, RopeSpec, Source
from alphaquant.numerics import bf16_products

if TYPE_CHECKING:
    from collections.abc import Mapping

    from alphaquant.models.tap import Tap

__all__ = ["KeyValueCache", "attention", "rms_norm", "rope_tables"]

_QUERIES = 128  # queries of a block
_SCORES = 1 << 19  # scores alive together: they stay in a core's cache


class KeyValueCache:
    """Keys and values of one layer, grown as tokens are generated."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of positions held."""
        return 0 if self._keys is None else self._keys.shape[2]

    def append(self, k_BKLC: Tensor, v_BKLC: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions; return all keys and values."""
        if self._keys is not None and self._values is not None:
            k_BKLC = torch.cat([self._keys, k_BKLC], 2)
            v_BKLC = torch.cat([self._values, v_BKLC], 2)
        self._keys, self._values = k_BKLC, v_BKLC
        return k_BKLC, v_BKLC


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, computed in fp32 (Zhang and Sennrich 2019)."""
    x_fp32 = x.float()
    norm = torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True)
    normed = x_fp32 * torch.rsqrt(norm.square() / x.shape[-1] + eps)
    return weight * normed.to(x.dtype)


def rope_tables(spec: RopeSpec, head_dim: int, positions_L: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[L, C]` in fp32 of the rotary embedding at the given positions.

    Source: Su et al. 2021 (RoFormer), half-split layout; `llama3` as published with Llama 3.1.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions_L.device).float() / head_dim
    inv_freq = 1.0 / spec.theta**exponents
    if spec.kind is RopeKind.LINEAR:
        inv_freq = inv_freq / spec.factor
    elif spec.kind is RopeKind.LLAMA3:
        wavelength = 2 * math.pi / inv_freq
        turns = spec.original_max_positions / wavelength
        smooth = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
        smooth = smooth.clamp(0, 1)
        inv_freq = (1 - smooth) * inv_freq / spec.factor + smooth * inv_freq
    angles = positions_L.float()[:, None] * inv_freq[None]
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rotate(x_BHLC: Tensor, cos_LC: Tensor, sin_LC: Tensor) -> Tensor:
    first, second = x_BHLC.chunk(2, -1)
    out = x_BHLC * cos_LC
    half = x_BHLC.shape[-1] // 2
    out[..., :half].addcmul_(second, sin_LC[:, :half], value=-1)
    out[..., half:].addcmul_(first, sin_LC[:, half:])
    return out


def _causal_mask(query_len: int, key_len: int, window: int | None, device: torch.device) -> Tensor | None:
    """Boolean mask of what each query may see; None where plain causal attention says it all."""
    if query_len == key_len and (window is None or key_len <= window):
        return None
    query = torch.arange(key_len - query_len, key_len, device=device)[:, None]
    key = torch.arange(key_len, device=device)[None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def _scaled_dot_product(q_BHLC: Tensor, k_BKLC: Tensor, v_BKLC: Tensor, window: int | None) -> Tensor:
    """Causal attention; the last query sees the last key."""
    blocked = q_BHLC.device.type == "cpu" and q_BHLC.dtype is torch.bfloat16 and not torch.is_grad_enabled()
    if blocked and q_BHLC.shape[2] == k_BKLC.shape[2]:
        return _blocked_attention(q_BHLC, k_BKLC, v_BKLC, window)
    mask = _causal_mask(q_BHLC.shape[2], k_BKLC.shape[2], window, q_BHLC.device)
    grouped = q_BHLC.shape[1] != k_BKLC.shape[1]
    return F.scaled_dot_product_attention(
        q_BHLC, k_BKLC, v_BKLC, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def _blocked_attention(q_BHLC: Tensor, k_BKLC: Tensor, v_BKLC: Tensor, window: int | None) -> Tensor:
    """The same in bf16 on a CPU, twice as fast: block by block of queries over the keys they may see.

    Scores are fp32 sums of bf16 products, probabilities are rounded to bf16, as in the library's own kernel.
    """
    num_sequences, num_heads, length, channels = q_BHLC.shape
    repeats = num_heads // k_BKLC.shape[1]
    if repeats > 1:
        k_BKLC, v_BKLC = k_BKLC.repeat_interleave(repeats, 1), v_BKLC.repeat_interleave(repeats, 1)
    # S: sequences times heads
    q_SLC, k_SLC, v_SLC = (t.reshape(-1, length, channels) for t in (q_BHLC, k_BKLC, v_BKLC))
    out_SLC = torch.empty_like(q_SLC)
    hidden = torch.full((_QUERIES, _QUERIES), -torch.inf).triu(1)
    step = max(1, _SCORES // (_QUERIES * length))
    for cut in range(0, num_sequences * num_heads, step):
        part = slice(cut, cut + step)
        q, k, v = q_SLC[part].float().mul_(channels**-0.5), k_SLC[part].float().transpose(1, 2), v_SLC[part]
        for start in range(0, length, _QUERIES):
            end = min(start + _QUERIES, length)
            first = 0 if window is None else max(0, start - window + 1)
            with bf16_products(q_BHLC):
                scores = torch.bmm(q[:, start:end], k[..., first:end])
            scores[..., start - first :].add_(hidden[: end - start, : end - start])
            if window is not None and end - first > window:
                query, key = torch.arange(start, end)[:, None], torch.arange(first, end)[None]
                scores.masked_fill_(key <= query - window, -torch.inf)
            out_SLC[part, start:end] = torch.bmm(scores.softmax(-1).bfloat16(), v[:, first:end])
    return out_SLC.view_as(q_BHLC)


def attention(
    x_BLD: Tensor,
    weights: Mapping[str, Tensor],
    spec: AttentionSpec,
    eps: float,
    rope_LC: tuple[Tensor, Tensor],
    tap: Tap | None = None,
    cache: KeyValueCache | None = None,
) -> Tensor:
    """Causal self-attention of normed inputs `[B, L, D]`, without the residual.

    With a `tap` it shows every linear's input and skips the last product: the result is then meaningless.
    """
    if tap is not None:
        tap(Source.ATTENTION_IN, x_BLD)

    def project(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"self_attn.{name}.weight"], weights.get(f"self_attn.{name}.bias"))

    q, k, v = project("q_proj", x_BLD), project("k_proj", x_BLD), project("v_proj", x_BLD)
    if spec.qk_norm is QKNorm.FULL:
        q = rms_norm(q, weights["self_attn.q_norm.weight"], eps)
        k = rms_norm(k, weights["self_attn.k_norm.weight"], eps)
    if spec.clip_qkv is not None:
        q, k, v = (t.clamp(-spec.clip_qkv, spec.clip_qkv) for t in (q, k, v))
    q, k, v = (t.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2) for t in (q, k, v))
    if spec.qk_norm is QKNorm.HEAD:
        q = rms_norm(q, weights["self_attn.q_norm.weight"], eps)
        k = rms_norm(k, weights["self_attn.k_norm.weight"], eps)
    cos, sin = (table.to(q.dtype) for table in rope_LC)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    if cache is not None:
        k, v = cache.append(k, v)
    context = _scaled_dot_product(q, k, v, spec.sliding_window)
    context_BLD = context.transpose(1, 2).flatten(2)
    if tap is not None:
        tap(Source.ATTENTION_OUT, context_BLD)
        return x_BLD
    return project("o_proj", context_BLD)
