"""Evaluating a checkpoint, original or quantized, layer by layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.calibration import evaluation_windows, is_tokenised, load_tokenizer
from alphaquant.checkpoint import resolve_model
from alphaquant.errors import CalibrationError, ConfigError, NumericsError
from alphaquant.evaluation import Quality, WindowScores, router_agreement, score_windows
from alphaquant.layouts import QuantizedCheckpoint, open_source
from alphaquant.models import (
    Decoder,
    ModelSpec,
    MoESpec,
    TensorSource,
    detect,
    expert_choice,
    head_input,
    head_weight,
    load_decoder,
    logical,
    read_outer,
)
from alphaquant.pipeline.run import compute_dtype
from alphaquant.pipeline.stream import Progress, chunks, embed, silent, through

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.models import LayerWeights

__all__ = ["evaluate_checkpoint", "load"]

_HEAD_TOKENS = 1024  # tokens whose logits are alive together
_ROUTED_TOKENS = 1 << 16  # tokens whose experts are compared; their ids are kept for all layers
_MAX_NATS = 500.0  # whose exponential is a number still; guessing among a million tokens is 14


def load(path: str | Path, *, dtype: str = "auto", device: torch.device | str = "cpu") -> Decoder:
    """A checkpoint directory, original or quantized by us, as a model in memory that computes and generates.

    Args:
        path: checkpoint directory, or a hub id.
        dtype: `auto` (the checkpoint's), `bf16`, `fp16` or `fp32`.
        device: where the weights go.

    Raises:
        CheckpointError, ConfigError: the directory is not a checkpoint of a known family.
    """
    source, spec, schemes = _open(resolve_model(path))
    return load_decoder(source, spec, compute_dtype(dtype, spec, torch.device(device)), device, schemes)


def evaluate_checkpoint(
    path: Path,
    *,
    data: str,
    seqlen: int,
    max_windows: int | None = None,
    against: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    progress: Progress = silent,
) -> Quality:
    """Perplexity of a checkpoint on windows of a text, and its divergence from an original.

    The whole text is tokenised at once and cut into windows that do not overlap, from the start; in each, tokens
    2 … L are predicted.

    Args:
        path: checkpoint directory, original or quantized by us.
        data: text source, as for calibration; its evaluation split.
        seqlen: tokens in a window, capped at the model's own limit.
        max_windows: at most so many windows.
        against: the original to compare with, token for token.
        device: where to compute.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        progress: is told what happens.

    Raises:
        AlphaQuantError: what is wrong with the checkpoint or the text.
    """
    model = _open(path)
    spec = model.spec
    seqlen = min(seqlen, spec.max_positions)
    if seqlen < 2:
        raise CalibrationError(f"a window of {seqlen} tokens predicts nothing", remedy="give --seqlen 2 or more")
    tokenizer = None if is_tokenised(data) else load_tokenizer(path)
    batch = evaluation_windows(data, tokenizer, seqlen=seqlen, max_windows=max_windows, vocab_size=spec.vocab_size)
    models = [model]
    if against is not None:
        original = _open(against)
        if original.spec.vocab_size != spec.vocab_size:
            raise ConfigError(
                f"the vocabularies differ: {spec.vocab_size} and {original.spec.vocab_size} tokens",
                where=f"{path}, {against}",
                remedy="give as --against the model that was quantized",
            )
        models.append(original)
    chosen: list[list[Tensor | None]] = [[] for _ in models]
    streams = [
        _final(each, batch.ids, torch.device(device), dtype, progress, ids if against is not None else None)
        for each, ids in zip(models, chosen, strict=True)
    ]
    scores = WindowScores()
    size = max(1, _HEAD_TOKENS // seqlen)
    for start in range(0, len(batch.ids), size):
        cut = slice(start, start + size)
        logits = [F.linear(x[cut], head) for x, head in streams]
        score_windows(logits[0], batch.ids[cut], logits[1] if against is not None else None, scores)
    _require_sane(scores, path)
    router = router_agreement(*chosen) if against is not None else ()
    return scores.quality(seqlen - 1, router)


def _require_sane(scores: WindowScores, path: Path) -> None:
    """Figures that can be told: a loss whose exponential is a number, a divergence that is finite.

    Raises:
        NumericsError: the model's logits are too large, or are no numbers.
    """
    for name, values in (("loss", scores.loss), ("original's loss", scores.original_loss), ("KL", scores.kl)):
        worst = max(values, key=lambda value: (math.isnan(value), value), default=0.0)
        if not worst < _MAX_NATS:
            raise NumericsError(
                f"no perplexity can be told: the {name} of a window is {worst:.4g} nats a token",
                where=str(path),
                remedy="run with --dtype fp32, or look at the weights of the head",
            )


class _Model(NamedTuple):
    """A checkpoint that was opened: its tensors, what they are, and the schemes of its quantized modules."""

    source: TensorSource
    spec: ModelSpec
    schemes: Mapping[str, Scheme]


def _open(path: Path) -> _Model:
    source = open_source(path)
    spec = detect(source.config, str(path / "config.json"))
    quantized = source.modules if isinstance(source, QuantizedCheckpoint) else {}
    return _Model(logical(source, spec), spec, {name: module.scheme for name, module in quantized.items()})


@torch.no_grad()
def _final(
    model: _Model,
    ids_NL: Tensor,
    device: torch.device,
    dtype: str,
    progress: Progress,
    chosen: list[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """What the head reads `[N, L, D]`, and the head `[V, D]`; to `chosen` the experts `[T, K]` of each layer go."""
    source, spec, schemes = model
    work_dtype = compute_dtype(dtype, spec, device)
    outer: LayerWeights = read_outer(source, spec, work_dtype, device)
    x_NLD = embed(ids_NL, outer["model.embed_tokens.weight"])
    for layer, weights in through(x_NLD, source, spec, work_dtype, "evaluate", progress, schemes):
        if chosen is not None:
            chosen.append(_chosen(x_NLD, weights, spec, layer))
    for cut in chunks(*x_NLD.shape[:2]):
        x_NLD[cut] = head_input(x_NLD[cut], outer, spec)
    return x_NLD, head_weight(outer)


def _chosen(x_NLD: Tensor, weights: LayerWeights, spec: ModelSpec, layer: int) -> Tensor | None:
    """Experts `[T, K]` of the first tokens; None in a dense layer."""
    if not isinstance(spec.layers[layer].mlp, MoESpec):
        return None
    first = x_NLD[: max(1, _ROUTED_TOKENS // x_NLD.shape[1])]
    parts = (expert_choice(first[cut], weights, spec, layer) for cut in chunks(*first.shape[:2]))
    return torch.cat([choice.topk_ids_TK.short() for choice in parts])
