"""Attention half of a layer.

Shapes: B sequences, L positions, D hidden, H query heads, K key-value heads, C head channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from alphaquant.models import native
from alphaquant.models.linear import linear
from alphaquant.models.spec import AttentionSpec, LatentSpec, QKNorm, Source
from alphaquant.numerics import bf16_products

if TYPE_CHECKING:
    from collections.abc import Mapping

    from alphaquant.models.tap import Tap

__all__ = ["KeyValueCache", "attention", "rms_norm"]

_QUERIES = 128  # queries of a block
_LATENT_EPS = 1e-6  # of the latents' norms, whatever the config says of the others
_SCORES = 1 << 19  # scores alive together: they stay in a core's cache
_NORMED = 1 << 18  # values normed together: the same
_ALIGNED = 16  # keys, at whose multiples blocks begin


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
    if native.fits(x, weight, width=x.shape[-1]):
        return native.rms_norm(x, weight, eps)
    if x.device.type == "cpu" and x.is_contiguous() and not torch.is_grad_enabled():
        out = torch.empty_like(x)  # by blocks that stay in a core's cache: twice as fast
        rows = max(1, _NORMED // x.shape[-1])
        for part, target in zip(x.flatten(0, -2).split(rows), out.flatten(0, -2).split(rows), strict=True):
            torch.mul(weight, _normed(part, eps), out=target)
        return out
    return weight * _normed(x, eps)


def _normed(x: Tensor, eps: float) -> Tensor:
    x_fp32 = x.float()
    norm = torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True)
    return (x_fp32 * torch.rsqrt(norm.square() / x.shape[-1] + eps)).to(x.dtype)


def _rotate(x_BHLC: Tensor, rope_LC: tuple[Tensor, Tensor]) -> Tensor:
    """The first channels, as many as the tables have, turned by halves; those behind them as they are."""
    x_BLHC = x_BHLC.transpose(1, 2)
    if native.fits(x_BLHC, width=rope_LC[0].shape[-1] // 2):
        return native.rotate(x_BLHC, *(table.to(x_BHLC.dtype).float() for table in rope_LC))
    cos_LC, sin_LC = (table.to(x_BHLC.dtype) for table in rope_LC)
    width, half = cos_LC.shape[-1], cos_LC.shape[-1] // 2
    turned, still = x_BHLC.split([width, x_BHLC.shape[-1] - width], -1)
    first, second = turned.chunk(2, -1)
    out = turned * cos_LC
    out[..., :half].addcmul_(second, sin_LC[:, :half], value=-1)
    out[..., half:].addcmul_(first, sin_LC[:, half:])
    return torch.cat([out, still], -1) if still.shape[-1] else out


def _causal_mask(query_len: int, key_len: int, window: int | None, device: torch.device) -> Tensor | None:
    """Boolean mask of what each query may see; None where plain causal attention says it all."""
    if query_len == key_len and (window is None or key_len <= window):
        return None
    query = torch.arange(key_len - query_len, key_len, device=device)[:, None]
    key = torch.arange(key_len, device=device)[None]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def _scaled_dot_product(
    q_BHLC: Tensor, k_BKLC: Tensor, v_BKLC: Tensor, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Causal attention; the last query sees the last key. Scores are scaled by one over the root of C by default."""
    if native.attends(q_BHLC, k_BKLC, v_BKLC):
        return native.attention(q_BHLC, k_BKLC, v_BKLC, window, q_BHLC.shape[-1] ** -0.5 if scale is None else scale)
    blocked = q_BHLC.device.type == "cpu" and q_BHLC.dtype is torch.bfloat16 and not torch.is_grad_enabled()
    if blocked and q_BHLC.shape[2] == k_BKLC.shape[2]:
        return _blocked_attention(q_BHLC, k_BKLC, v_BKLC, window, scale)
    mask = _causal_mask(q_BHLC.shape[2], k_BKLC.shape[2], window, q_BHLC.device)
    grouped = q_BHLC.shape[1] != k_BKLC.shape[1]
    return F.scaled_dot_product_attention(
        q_BHLC, k_BKLC, v_BKLC, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped, scale=scale
    )


def _blocked_attention(
    q_BHLC: Tensor, k_BKLC: Tensor, v_BKLC: Tensor, window: int | None, scale: float | None
) -> Tensor:
    """The same in bf16 on a CPU, twice as fast: block by block of queries over the keys they may see.

    Scores are fp32 sums of bf16 products, probabilities are rounded to bf16, as in the library's own kernel.
    """
    num_sequences, num_heads, length, channels = q_BHLC.shape
    repeats = num_heads // k_BKLC.shape[1]
    if repeats > 1:
        k_BKLC, v_BKLC = k_BKLC.repeat_interleave(repeats, 1), v_BKLC.repeat_interleave(repeats, 1)
    # S: sequences times heads; values may have channels of another number
    q_SLC, k_SLC, v_SLC = (t.reshape(-1, length, t.shape[-1]) for t in (q_BHLC, k_BKLC, v_BKLC))
    out_SLC = torch.empty_like(v_SLC)
    scale = channels**-0.5 if scale is None else scale
    hidden = torch.full((_QUERIES, _QUERIES), -torch.inf).triu(1)
    step = max(1, _SCORES // (_QUERIES * length))
    for cut in range(0, num_sequences * num_heads, step):
        part = slice(cut, cut + step)
        q, k, v = q_SLC[part].float().mul_(scale), k_SLC[part].float().transpose(1, 2), v_SLC[part]
        for start in range(0, length, _QUERIES):
            end = min(start + _QUERIES, length)
            first = 0 if window is None else max(0, start - window + 1) // _ALIGNED * _ALIGNED
            with bf16_products(q_BHLC):
                scores = torch.bmm(q[:, start:end], k[..., first:end])
            if native.fits(width=end - first):
                shares = native.softmax(scores, start, first, window)
                torch.bmm(shares, v[:, first:end], out=out_SLC[part, start:end])
                continue
            scores[..., start - first :].add_(hidden[: end - start, : end - start])
            if window is not None and end - first > window:
                query, key = torch.arange(start, end)[:, None], torch.arange(first, end)[None]
                scores.masked_fill_(key <= query - window, -torch.inf)
            out_SLC[part, start:end] = torch.bmm(scores.softmax(-1).bfloat16(), v[:, first:end])
    return out_SLC.view(num_sequences, num_heads, length, -1)


def attention(
    x_BLD: Tensor,
    weights: Mapping[str, Tensor],
    spec: AttentionSpec | LatentSpec,
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
    if isinstance(spec, LatentSpec):
        window, scale = None, spec.softmax_scale
        q, k, v = _latent_heads(x_BLD, weights, spec, rope_LC, tap)
    else:
        window, scale = spec.sliding_window, None
        q, k, v = _heads(x_BLD, weights, spec, eps, rope_LC)
    if cache is not None:
        k, v = cache.append(k, v)
    context = _scaled_dot_product(q, k, v, window, scale)
    context_BLD = context.transpose(1, 2).flatten(2)
    if tap is not None:
        tap(Source.ATTENTION_OUT, context_BLD)
        return x_BLD
    return _project("o_proj", context_BLD, weights)


def _project(name: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    return linear(x, weights, f"self_attn.{name}")


def _heads(
    x_BLD: Tensor, weights: Mapping[str, Tensor], spec: AttentionSpec, eps: float, rope_LC: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, H, L, C]`, keys and values `[B, K, L, C]` of grouped-query attention."""
    q, k, v = (_project(name, x_BLD, weights) for name in ("q_proj", "k_proj", "v_proj"))
    if spec.qk_norm is QKNorm.FULL:
        q = rms_norm(q, weights["self_attn.q_norm.weight"], eps)
        k = rms_norm(k, weights["self_attn.k_norm.weight"], eps)
    if spec.clip_qkv is not None:
        q, k, v = (t.clamp(-spec.clip_qkv, spec.clip_qkv) for t in (q, k, v))
    q, k, v = (t.unflatten(-1, (-1, spec.head_dim)) for t in (q, k, v))
    if spec.qk_norm is QKNorm.HEAD:
        q = rms_norm(q, weights["self_attn.q_norm.weight"], eps)
        k = rms_norm(k, weights["self_attn.k_norm.weight"], eps)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _rotate(q, rope_LC), _rotate(k, rope_LC), v


def _latent_heads(
    x_BLD: Tensor, weights: Mapping[str, Tensor], spec: LatentSpec, rope_LC: tuple[Tensor, Tensor], tap: Tap | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys `[B, H, L, C]` and values `[B, H, L, V]` of latent attention, keys and values expanded.

    Source: DeepSeek-V2 (2024), equations 9 to 19 and 37 to 47, with norms of both latents as its checkpoints have.
    """

    def latent(name: str, x: Tensor, source: Source) -> Tensor:
        normed = rms_norm(x, weights[f"self_attn.{name}_layernorm.weight"], _LATENT_EPS)
        if tap is not None:
            tap(source, normed)
        return normed

    def turned(x_BHLC: Tensor) -> Tensor:
        if spec.interleaved:  # neighbours to halves, in queries and keys alike: their products stay what they are
            x_BHLC = x_BHLC.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return _rotate(x_BHLC, rope_LC)

    if spec.q_rank is None:
        q = _project("q_proj", x_BLD, weights)
    else:
        q = latent("q_a", _project("q_a_proj", x_BLD, weights), Source.QUERY_LATENT)
        q = _project("q_b_proj", q, weights)
    q_nope, q_rope = q.unflatten(-1, (spec.num_heads, -1)).transpose(1, 2).split([spec.nope_dim, spec.rotary_dim], -1)
    compressed = _project("kv_a_proj_with_mqa", x_BLD, weights)
    kv, k_rope = compressed.split([spec.kv_rank, spec.rotary_dim], -1)
    kv = _project("kv_b_proj", latent("kv_a", kv, Source.KV_LATENT), weights)
    k_nope, v = kv.unflatten(-1, (spec.num_heads, -1)).transpose(1, 2).split([spec.nope_dim, spec.value_dim], -1)
    k_rope = turned(k_rope[:, None]).expand(-1, spec.num_heads, -1, -1)
    return torch.cat([q_nope, turned(q_rope)], -1), torch.cat([k_nope, k_rope], -1), v
