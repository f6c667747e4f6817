"""The one place that maps `model_type` to a family."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from alphaquant.errors import ConfigError
from alphaquant.models.config import ConfigReader
from alphaquant.models.families.deepseek import DEEPSEEK
from alphaquant.models.families.deepseek_v2 import DEEPSEEK_V2
from alphaquant.models.families.deepseek_v3 import DEEPSEEK_V3
from alphaquant.models.families.glm4_moe import GLM4_MOE
from alphaquant.models.families.llama import LLAMA
from alphaquant.models.families.mistral import MISTRAL
from alphaquant.models.families.mixtral import MIXTRAL
from alphaquant.models.families.olmoe import OLMOE
from alphaquant.models.families.qwen2 import QWEN2
from alphaquant.models.families.qwen2_moe import QWEN2_MOE
from alphaquant.models.families.qwen3 import QWEN3
from alphaquant.models.families.qwen3_moe import QWEN3_MOE
from alphaquant.models.spec import ModelSpec, MoESpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from alphaquant.models.families.base import Family

__all__ = ["FAMILIES", "detect"]

FAMILIES: dict[str, Family] = {
    "deepseek": DEEPSEEK,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe": GLM4_MOE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}


def detect(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The model that a config.json describes.

    Raises:
        ConfigError: for an unknown family, a missing key, or a behaviour that is not implemented.
    """
    cfg = ConfigReader(config, where)
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        close = get_close_matches(str(name), FAMILIES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"model_type is {name!r}, which is not a known family",
            where=where,
            remedy=f"known families: {', '.join(sorted(FAMILIES))}{hint}",
        )
    cfg.choice("hidden_act", ("silu",))
    layers = family.layers(cfg)
    for layer in layers:
        if isinstance(layer.mlp, MoESpec) and layer.mlp.top_k > layer.mlp.num_experts:
            raise ConfigError(
                f"num_experts_per_tok {layer.mlp.top_k} exceeds the {layer.mlp.num_experts} experts",
                where=where,
                remedy="correct num_experts_per_tok, or the number of experts",
            )
    return ModelSpec(
        family=str(name),
        architecture=family.architecture,
        vocab_size=cfg.size("vocab_size"),
        hidden_size=cfg.size("hidden_size"),
        layers=layers,
        rms_norm_eps=cfg.number("rms_norm_eps"),
        rope=cfg.rope(family.rope_theta),
        max_positions=cfg.size("max_position_embeddings"),
        tie_embeddings=cfg.flag("tie_word_embeddings", default=False),
        dtype=cfg.dtype(),
        renames=family.renames,
        prediction_layers=cfg.count("num_nextn_predict_layers", cfg.count("num_mtp_layers", family.prediction_layers)),
    )
