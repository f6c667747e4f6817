"""Tiny random checkpoints, written by transformers, and the same models loaded by us.

Weights are large enough that attention, routing, norms and biases all show in the logits; norms are not ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alphaquant.checkpoint import Checkpoint, TensorInfo
from alphaquant.models import Decoder, ModelSpec, detect, load_decoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {}),
    "olmoe-normalised-clipped": ("olmoe", {"norm_topk_prob": True, "clip_qkv": 0.8, "num_key_value_heads": 2}),
    "olmoe-bias-top1": ("olmoe", {"attention_bias": True, "num_experts_per_tok": 1}),
    "olmoe-all-experts": ("olmoe", {"num_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama-grouped-biased": ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "llama-tied-linear": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0},
            "rms_norm_eps": 1e-2,
        },
    ),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3, "num_key_value_heads": 1, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 12, "num_key_value_heads": 2}),
    "mistral-unlimited": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
}
"""Name to family and what differs from its defaults."""


def config_of(name: str, **overrides: Any) -> Any:
    """The transformers config of a model of `MODELS`."""
    import transformers  # noqa: PLC0415  (slow)

    family, particular = MODELS[name]
    sizes = _SIZES | (_MOE if family == "olmoe" else {})
    cls = {"olmoe": "OlmoeConfig", "llama": "LlamaConfig", "mistral": "MistralConfig"}[family]
    return getattr(transformers, cls)(**(sizes | particular | overrides))


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill every parameter with noise that keeps activations near one but lets each weight show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / math.sqrt(parameter.shape[-1]))


def save(directory: Path, name: str = "olmoe", *, max_shard_size: str = "5GB", seed: int = 0, **overrides: Any) -> Any:
    """Write a tiny fp32 checkpoint of a model of `MODELS`; returns the transformers model."""
    import transformers  # noqa: PLC0415  (slow)

    family = MODELS[name][0]
    cls = {"olmoe": "OlmoeForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[family]
    model = getattr(transformers, cls)(config_of(name, **overrides)).eval().requires_grad_(requires_grad=False)
    randomise(model, seed)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory, safe_serialization=True, max_shard_size=max_shard_size)
    return model


class Source:
    """A checkpoint as `load_decoder` wants it; `changes` replace tensors (None removes one), for damage on purpose."""

    def __init__(self, checkpoint: Checkpoint, changes: dict[str, Tensor | None] | None = None) -> None:
        self._checkpoint = checkpoint
        self._changes = changes or {}

    def names(self) -> tuple[str, ...]:
        kept = set(self._checkpoint.names()) | set(self._changes)
        return tuple(sorted(name for name in kept if self._changes.get(name, True) is not None))

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self._changes.get(name)
        return self._checkpoint.info(name).shape if tensor is None else tuple(tensor.shape)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, self.read(name).dtype, self.shape(name), self.read(name).nbytes)

    def read(self, name: str) -> Tensor:
        tensor = self._changes.get(name)
        return self._checkpoint.read(name) if tensor is None else tensor

    def read_into(self, name: str, out: Tensor) -> None:
        tensor = self._changes.get(name)
        if tensor is None:
            self._checkpoint.read_into(name, out)
        else:
            out.copy_(tensor)


@dataclass
class Tiny:
    """One tiny model, theirs and ours."""

    theirs: Any
    checkpoint: Checkpoint
    spec: ModelSpec

    @property
    def source(self) -> Source:
        return Source(self.checkpoint)

    def ours(self, dtype: torch.dtype | None = None) -> Decoder:
        return load_decoder(self.source, self.spec, dtype)


def zoo(root: Path) -> Callable[[str], Tiny]:
    """Models of `MODELS` by name, each made once."""
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            theirs = save(root / name, name)
            checkpoint = Checkpoint.open(root / name)
            made[name] = Tiny(theirs, checkpoint, detect(checkpoint.config))
        return made[name]

    return get


def token_ids(batch: int = 2, length: int = 14, seed: int = 0, vocab_size: int = 96) -> Tensor:
    """Random token ids `[B, L]`."""
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
