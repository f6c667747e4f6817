"""Tiny models as large as vLLM's kernels for CPUs ask for: sizes in multiples of 64, heads of 32."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline import tiny

if TYPE_CHECKING:
    from pathlib import Path

_WIDE = {"intermediate_size": 256, "moe_intermediate_size": 128, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"architectures": ["OlmoeForCausalLM"], "intermediate_size": 128},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "intermediate_size": 128, "num_key_value_heads": 2},
    "qwen2_moe": {"architectures": ["Qwen2MoeForCausalLM"], **_WIDE, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], **_WIDE, "head_dim": 32, "num_key_value_heads": 2},
    "deepseek": {
        "architectures": ["DeepseekForCausalLM"],
        **_WIDE,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    },
    "llama": {"architectures": ["LlamaForCausalLM"], "intermediate_size": 256, "num_key_value_heads": 2},
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "intermediate_size": 256,
        "num_key_value_heads": 2,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "intermediate_size": 256,
        "num_key_value_heads": 2,
    },
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "intermediate_size": 256, "head_dim": 32},
}
"""What each family's config.json has beside `tiny.CONFIGS` and the common sizes."""

DENSE = ("llama", "mistral", "qwen2", "qwen3")

# transformers has no class for the first DeepSeek-MoE; its checkpoints bring one along, and engines ask for it.
_DEEPSEEK_CONFIG = """from transformers import PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"
"""


def write(directory: Path, family: str, **overrides: Any) -> Path:
    """A tiny model of that family in bf16, with all that an engine wants to find in its directory."""
    sizes = (
        {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "dtype": "bfloat16"}
        | FAMILIES[family]
        | overrides
    )
    tiny.write_model(directory, family if family in tiny.CONFIGS else "llama", **sizes)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[unk]"})
    )
    if family == "deepseek":
        (directory / "configuration_deepseek.py").write_text(_DEEPSEEK_CONFIG)
    return directory
