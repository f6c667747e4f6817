"""Tiny random checkpoints and texts, written without our own writer, and one call that quantizes them.

Weights are large enough that attention, routing and every linear show in the logits; norms are not ones.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from alphaquant.models import ModelSpec, detect
from alphaquant.pipeline import Calibration, QuantizeResult, prepare, quantize_checkpoint
from alphaquant.plan import Plan
from alphaquant.solver import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

VOCAB = 128
LATENT = {
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    family: {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "dtype": "float32",
        **particular,
    }
    for family, particular in {
        "olmoe": {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
        "llama": {"intermediate_size": 128, "num_key_value_heads": 2},
        "mixtral": {"intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2},
        "qwen2_moe": {
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        "qwen3_moe": {
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "head_dim": 16,
        },
        "deepseek": {
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
        "deepseek_v2": LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        "deepseek_v3": LATENT | {"n_group": 2, "topk_group": 1, "q_lora_rank": 64},
    }.items()
}

# Seven formats, all of which compressed-tensors has; experts of one layer differ.
SERVED_PLAN: dict[str, Any] = {
    "default": {"wq": "int4", "group_size": 32},
    "overrides": [
        {"pattern": "*.self_attn.*", "wq": "mxfp6"},
        {"pattern": "*.self_attn.o_proj", "wq": "nvfp4"},
        {"pattern": "model.layers.1.self_attn.k_proj", "skip": True},
        {"pattern": "*.up_proj", "wq": "int3", "group_size": 64, "symmetric": False},
        {"pattern": "*.down_proj", "wq": "mxfp4"},
        {"pattern": "model.layers.1.mlp.*", "wq": "fp8", "group_size": -1},
        {"pattern": "model.layers.1.**.up_proj", "wq": "mxfp8"},
        {"pattern": "model.layers.0.mlp.experts.[0-2].*", "wq": "int8", "group_size": -1},
    ],
}
# Eight formats, of which compressed-tensors lacks most.
HUMMING_PLAN: dict[str, Any] = {
    "default": {"wq": "fp4", "group_size": 32},
    "overrides": [
        {"pattern": "*.self_attn.*", "wq": "mxfp6", "group_size": 64},
        {"pattern": "*.self_attn.o_proj", "wq": "nvfp4"},
        {"pattern": "*.down_proj", "wq": "int2", "group_size": 32, "symmetric": False},
        {"pattern": "model.layers.0.**.up_proj", "wq": "fp6_e3m2", "group_size": 64},
        {"pattern": "model.layers.1.self_attn.v_proj", "wq": "mxfp8_e5m2"},
        {"pattern": "model.layers.1.**.up_proj", "wq": "fp8_e5m2", "group_size": -1},
        {"pattern": "model.layers.1.**.gate_proj", "wq": "mxfp4"},
    ],
}
PLANS = {"served": SERVED_PLAN, "humming": HUMMING_PLAN}


def random_tensors(family: str) -> dict[str, Tensor]:
    """The tensors of the family's unchanged model in fp32, to be changed."""
    return _tensors_of(detect(CONFIGS[family]), torch.float32, 0)


def _tensors_of(spec: ModelSpec, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Random tensors for every name that a model must have."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {f"{p.role}.{p.leaf}": p.shape for p in spec.outer_parameters()}
    for layer in range(spec.num_layers):
        for parameter in spec.parameters(layer):
            shapes |= dict.fromkeys(spec.tensor_names(layer, parameter), parameter.shape)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.3 * noise
        elif "embed_tokens" not in name:
            noise *= 1.5 / math.sqrt(shape[-1])
        tensors[name] = noise.to(dtype)
    return tensors


def write_model(
    directory: Path,
    family: str = "olmoe",
    *,
    seed: int = 0,
    shards: int = 1,
    tokenizer: bool = True,
    changes: Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> Path:
    """Write a checkpoint directory; `changes` replace tensors, `overrides` keys of config.json."""
    config = CONFIGS[family] | overrides
    spec = detect(config)
    tensors = _tensors_of(spec, spec.dtype, seed) | dict(changes or {})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    else:
        names = sorted(tensors)
        weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
        for file in sorted(set(weight_map.values())):
            save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file, {"format": "pt"})
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if tokenizer:
        write_tokenizer(directory / "tokenizer.json")
    return directory


def write_fused(directory: Path, twin: Path, *, transposed: bool = False) -> Path:
    """The same model as transformers 5 holds it: experts in 3-D, everything beside them under canonical names."""
    shutil.copytree(twin, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((twin / "config.json").read_text())
    spec, tensors = detect(config), load_file(twin / "model.safetensors")
    for layer in range(spec.num_layers):
        stacks = {}
        for parameter in spec.parameters(layer):
            names = spec.tensor_names(layer, parameter)
            if parameter.num_experts:
                stacks[parameter.role.rsplit(".", 1)[1]] = torch.stack([tensors.pop(name) for name in names])
            elif spec.family == "mixtral":
                tensors[f"model.layers.{layer}.{parameter.role}.{parameter.leaf}"] = tensors.pop(names[0])
        if stacks:
            at = f"model.layers.{layer}.mlp.experts"
            gate_up = torch.cat([stacks["gate_proj"], stacks["up_proj"]], 1)
            tensors[f"{at}.gate_up_proj"] = gate_up.transpose(1, 2).contiguous() if transposed else gate_up
            tensors[f"{at}.down_proj"] = stacks["down_proj"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def write_tokenizer(path: Path) -> None:
    """A tokenizer whose words are `w0` … `w126`, each of its own id."""
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"[unk]": VOCAB - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(path))


def write_text(path: Path, num_tokens: int, seed: int = 0) -> Path:
    """Words in which each makes some others likely, so that activations are correlated."""
    rng = random.Random(seed)
    follow = [random.Random(word).choices(range(VOCAB - 1), k=4) for word in range(VOCAB)]
    words = [0]
    while len(words) < num_tokens:
        words.append(rng.choice(follow[words[-1]]) if rng.random() < 0.8 else rng.randrange(VOCAB - 1))
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


def token_ids(batch: int = 4, length: int = 24, seed: int = 5) -> Tensor:
    """Random token ids `[B, L]`."""
    return torch.randint(0, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def as_plan(plan: Plan | Mapping[str, Any] | str) -> Plan:
    """A plan from an object of JSON, or from shorthand."""
    if isinstance(plan, Plan):
        return plan
    return Plan.from_shorthand(plan) if isinstance(plan, str) else Plan.from_dict(plan)


def quantize(
    model: Path,
    out: Path,
    plan: Plan | Mapping[str, Any] | str,
    text: Path | None,
    *,
    num_samples: int = 24,
    seqlen: int = 32,
    recipe: Recipe | None = None,
    **options: Any,
) -> QuantizeResult:
    """Quantize a model directory; without a text nothing is calibrated."""
    return quantize_checkpoint(
        prepare(model, as_plan(plan)),
        out,
        recipe=recipe or Recipe(),
        calibration=None if text is None else Calibration(str(text), num_samples, seqlen),
        **options,
    )


def listing(directory: Path) -> set[str]:
    """Every path below a directory, with hidden ones."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
