"""Rotary embeddings and their length extensions against transformers, as tables and in whole dense models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from alphaquant.checkpoint import Checkpoint
from alphaquant.errors import ConfigError
from alphaquant.models import detect, load_decoder
from alphaquant.models.attention import KeyValueCache
from alphaquant.models.rope import rope_tables

from . import tiny

if TYPE_CHECKING:
    from pathlib import Path

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 300.0},
    "linear": {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 300.0},
    "llama3": tiny.MODELS["llama-llama3"][1]["rope_parameters"],
    "yarn": YARN,
    "yarn-betas": YARN | {"beta_fast": 3.0, "beta_slow": 0.25, "rope_theta": 20.0},
    "yarn-not-truncated": YARN | {"truncate": False, "beta_fast": 5.0},
    "yarn-scaled": YARN | {"attention_factor": 0.8},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4},
    "yarn-mscale-of-one": YARN | {"mscale": 0.7, "mscale_all_dim": 0},
    "yarn-without-original": {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"},
    "yarn-shorter": YARN | {"factor": 0.5},
}
each_rope = pytest.mark.parametrize("name", ROPES)


def config(name: str, family: str = "llama", **changes: Any) -> Any:
    import transformers  # noqa: PLC0415  (slow)

    cls = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}[family]
    sizes = tiny._SIZES | {"max_position_embeddings": 24, "head_dim": 16, "num_key_value_heads": 4}
    sizes |= {"rope_parameters": dict(ROPES[name])}
    if family != "qwen2":
        return getattr(transformers, cls)(**sizes | changes)
    return getattr(transformers, cls)(**{key: value for key, value in sizes.items() if key != "head_dim"} | changes)


@each_rope
@pytest.mark.parametrize("length", [5, 24, 60])
def test_tables_are_theirs(name: str, length: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415  (slow)

    theirs = config(name)
    spec = detect(theirs.to_dict())
    truth = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(length)[None])
    for found, expected in zip(rope_tables(spec.rope, 16, length), truth, strict=True):
        assert (found - expected[0]).abs().max() < 1e-5
    plain = rope_tables(detect(config("default").to_dict()).rope, 16, length)[0]
    same = name == "default" or (name == "dynamic" and length <= 24)
    assert rope_tables(spec.rope, 16, length)[0].allclose(plain) == same


@pytest.mark.parametrize("name", ["dynamic", "yarn", "yarn-mscale"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_dense_models_with_stretched_positions(tmp_path: Path, name: str, family: str) -> None:
    import transformers  # noqa: PLC0415  (slow)

    model = transformers.AutoModelForCausalLM.from_config(config(name, family, sliding_window=None)).eval()
    tiny.randomise(model.requires_grad_(requires_grad=False))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(tmp_path, safe_serialization=True)
    checkpoint, ids = Checkpoint.open(tmp_path), tiny.token_ids(2, 40)
    decoder = load_decoder(tiny.Source(checkpoint), detect(checkpoint.config))
    assert (decoder.logits(ids) - model(ids).logits).abs().max() < 1e-4
    without = detect(checkpoint.config | {"rope_parameters": {"rope_theta": 300.0}})
    assert (load_decoder(tiny.Source(checkpoint), without).logits(ids) - decoder.logits(ids)).abs().max() > 1e-2


def test_positions_go_on_where_a_cache_ends() -> None:
    rope = detect(config("yarn").to_dict()).rope
    whole = rope_tables(rope, 16, 9)
    for table, part in zip(whole, rope_tables(rope, 16, 4, start=5), strict=True):
        assert part.equal(table[5:])


def test_dynamic_frequencies_follow_the_length_so_far(tmp_path: Path) -> None:
    """Generation past the limit is theirs token by token: each new length has frequencies of its own."""
    import transformers  # noqa: PLC0415  (slow)

    model = transformers.LlamaForCausalLM(config("dynamic", max_position_embeddings=8)).eval()
    tiny.randomise(model)
    model.save_pretrained(tmp_path, safe_serialization=True)
    checkpoint, ids = Checkpoint.open(tmp_path), tiny.token_ids(1, 6)
    decoder = load_decoder(tiny.Source(checkpoint), detect(checkpoint.config))
    caches = [KeyValueCache() for _ in decoder.layers]
    cache = transformers.DynamicCache(config=model.config)
    for part in (ids, *tiny.token_ids(1, 10, seed=1).split(1, 1)):
        with torch.no_grad():
            truth = model(part, past_key_values=cache, use_cache=True).logits
        assert (decoder.logits(part, caches) - truth).abs().max() < 1e-4


def test_yarn_stretches_as_far_as_the_config_says() -> None:
    """Without a factor it is the ratio of both lengths; a length beside the section outranks one inside."""
    base = config("yarn").to_dict()
    section = {key: value for key, value in YARN.items() if key != "factor"}
    assert detect(base | {"rope_parameters": section}).rope.factor == 24 / 16
    outranked = detect(base | {"original_max_position_embeddings": 12}).rope
    assert outranked.original_max_positions == 12
    deepseek = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "factor": 40.0}
    rope = detect(base | {"rope_parameters": deepseek}).rope
    assert rope.attention_factor == 1.0
    assert rope.latent_gain == pytest.approx((0.1 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("factor", "4"),
        ("factor", 0),
        ("beta_fast", -1.0),
        ("truncate", 1),
        ("mscale", True),
        ("mscale_all_dim", -0.5),
        ("attention_factor", float("inf")),
        ("original_max_position_embeddings", 16.5),
        ("rope_theta", 1.0),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_a_wrong_value_of_an_extension_is_named(key: str, value: Any) -> None:
    broken = config("yarn").to_dict() | {"rope_parameters": YARN | {key: value}}
    with pytest.raises(ConfigError) as caught:
        detect(broken)
    assert key in str(caught.value)
    assert repr(value) in str(caught.value)
