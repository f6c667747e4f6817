"""Tiny models of every mixture and of Qwen, as transformers writes them or with names spelled out here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file

from alphaquant.checkpoint import Checkpoint
from alphaquant.models import detect
from pipeline import tiny as runs

from . import deepseek_reference, tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CLASSES = {
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "glm4_moe": "Glm4Moe",
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}
MIXTRAL = {"num_local_experts": 6, "intermediate_size": 64}
QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = {"shared_expert_intermediate_size": 96}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "mscale": 0.707,
    "mscale_all_dim": 1.3,
}
V2 = LATENT | {"routed_scaling_factor": 1.5}
V3 = LATENT | {"n_group": 4, "topk_group": 2}
GLM = {
    "head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
}
# a model under its family's own name for each of them, and variants
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": (
        "deepseek_v2",
        V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
    ),
    "deepseek_v2-lite-biased": ("deepseek_v2", V2 | {"q_lora_rank": None, "attention_bias": True}),
    "deepseek_v3": ("deepseek_v3", V3 | {"rope_parameters": YARN}),
    "deepseek_v3-halves-linear": (
        "deepseek_v3",
        V3
        | {
            "rope_interleave": False,
            "norm_topk_prob": False,
            "attention_bias": True,
            "n_shared_experts": 1,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale_all_dim": 0.5, "rope_theta": 300.0},
        },
    ),
    "deepseek_v3-one-group": ("deepseek_v3", V3 | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "glm4_moe": ("glm4_moe", GLM | {"attention_bias": True, "routed_scaling_factor": 1.7}),
    "glm4_moe-normed-quarter": (
        "glm4_moe",
        GLM
        | {
            "use_qk_norm": True,
            "norm_topk_prob": False,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25},
        },
    ),
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "olmoe": ("olmoe", {"intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2}),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral-window-top3": ("mixtral", MIXTRAL | {"sliding_window": 5, "num_experts_per_tok": 3, "head_dim": 12}),
    "qwen2_moe": ("qwen2_moe", QWEN | SHARED),
    "qwen2_moe-some-dense": (
        "qwen2_moe",
        QWEN | SHARED | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "qkv_bias": False},
    ),
    "qwen2_moe-normalised": ("qwen2_moe", QWEN | SHARED | {"norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3_moe", QWEN | {"head_dim": 32, "norm_topk_prob": True}),
    "qwen3_moe-some-dense": (
        "qwen3_moe",
        QWEN | {"mlp_only_layers": [2], "attention_bias": True, "norm_topk_prob": False},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_hidden_layers": 2,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-windows-tied": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}
DEEPSEEK = {
    **SIZES,
    "model_type": "deepseek",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "dtype": "float32",
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
}
DEEPSEEKS: dict[str, dict[str, Any]] = {
    "deepseek": {},
    "deepseek-normalised-scaled": {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_shared_experts": 1},
    "deepseek-scaled": {"routed_scaling_factor": 0.5, "n_shared_experts": None, "attention_bias": True},
    "deepseek-every-second": {"moe_layer_freq": 2, "num_hidden_layers": 4, "num_experts_per_tok": 3},
    "deepseek-top1": {"norm_topk_prob": True, "num_experts_per_tok": 1, "first_k_dense_replace": 0},
}


def config_of(family: str) -> dict[str, Any]:
    """The config.json of a family's plain model."""
    return _theirs(family).to_dict() if family in MODELS else dict(DEEPSEEK)


def _theirs(name: str) -> Any:
    import transformers  # noqa: PLC0415  (slow)

    family, particular = MODELS[name]
    return getattr(transformers, f"{CLASSES[family]}Config")(**(SIZES | particular))


def save_with_transformers(directory: Path, name: str) -> Any:
    """Write a tiny model of `MODELS` as transformers writes it."""
    import transformers  # noqa: PLC0415  (slow)

    model = (
        getattr(transformers, f"{CLASSES[MODELS[name][0]]}ForCausalLM")(_theirs(name))
        .eval()
        .requires_grad_(requires_grad=False)
    )
    tiny.randomise(model)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory, safe_serialization=True)
    return model


def save_deepseek(directory: Path, name: str) -> dict[str, Any]:
    """Write a tiny DeepSeek-MoE with names and shapes spelled out here, not by the library."""
    config = {key: value for key, value in (DEEPSEEK | DEEPSEEKS[name]).items() if value is not None}
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (128, hidden), "lm_head": (128, hidden), "model.norm": (hidden,)}
    biases = {}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for projection, out in {"q": hidden, "k": kv, "v": kv, "o": hidden}.items():
            shapes[f"{at}.self_attn.{projection}_proj"] = (out, hidden)
            if config.get("attention_bias"):
                biases[f"{at}.self_attn.{projection}_proj.bias"] = (out,)
        shapes |= {f"{at}.input_layernorm": (hidden,), f"{at}.post_attention_layernorm": (hidden,)}
        blocks = {f"{at}.mlp": config["intermediate_size"]}
        if layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0:
            blocks = {f"{at}.mlp.experts.{expert}": inner for expert in range(config["n_routed_experts"])}
            shapes[f"{at}.mlp.gate"] = (config["n_routed_experts"], hidden)
            if shared := config.get("n_shared_experts"):
                blocks[f"{at}.mlp.shared_experts"] = shared * inner
        for block, width in blocks.items():
            shapes |= {f"{block}.gate_proj": (width, hidden), f"{block}.up_proj": (width, hidden)}
            shapes[f"{block}.down_proj"] = (hidden, width)
    module = torch.nn.ParameterDict()
    holder = torch.nn.Module()
    for full, shape in ({f"{key}.weight": shape for key, shape in shapes.items()} | biases).items():
        module[full.replace(".", "/")] = torch.nn.Parameter(torch.empty(shape))
    holder.tensors = module
    tiny.randomise(holder)
    directory.mkdir(parents=True)
    tensors = {key.replace("/", "."): value.detach() for key, value in module.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return config


class Made(NamedTuple):
    """A tiny model on disk, with the transformers model where there is one."""

    path: Path
    theirs: Any

    @property
    def tiny(self) -> tiny.Tiny:
        checkpoint = Checkpoint.open(self.path)
        return tiny.Tiny(self.theirs, checkpoint, detect(checkpoint.config))

    def tensors(self) -> dict[str, Tensor]:
        checkpoint = Checkpoint.open(self.path)
        return {name: checkpoint.read(name) for name in checkpoint.names()}


def zoo(root: Path) -> Callable[[str], Made]:
    """Models by name, each made once; nothing may write into them."""
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            theirs = save_with_transformers(root / name, name) if name in MODELS else None
            if theirs is None:
                save_deepseek(root / name, name)
            runs.write_tokenizer(root / name / "tokenizer.json")
            made[name] = Made(root / name, theirs)
        return made[name]

    return get


def witness(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ids: Tensor, directory: Path) -> Tensor:
    """Logits of native tensors by transformers, read through its own names, or by the naive reference."""
    import transformers  # noqa: PLC0415  (slow)

    if config["model_type"] == "deepseek":
        return deepseek_reference.logits(tensors, config, ids)
    directory.mkdir()
    save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(config)))
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits
