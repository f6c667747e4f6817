"""transformers computes the dense export's logits from what we write, experts in one format and the rest in another."""

from __future__ import annotations

import sys

import pytest

from alphaquant.pipeline import export_checkpoint
from alphaquant.verification import compare, random_prompts
from pipeline import tiny

from . import models

PROMPTS = random_prompts(tiny.VOCAB - 1, count=2)
EXPERTS = ("int2", "int3", "int4", "int6", "int8", "mxfp4", "mxfp6")
REST = {
    "int2": "int8",
    "int3": "int4",
    "int4": "mxfp6",
    "int6": "int3",
    "int8": "mxfp4",
    "mxfp4": "int6",
    "mxfp6": "int2",
}


def entry(name):
    return {"wq": name, "group_size": 32}


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("transformers")
    pairs = {}

    def add(name, family, plan):
        model = root / f"{family}-model"
        if not model.exists():
            models.write(model, family)
        tiny.quantize(model, root / name, plan, None, layout="compressed-tensors")
        export_checkpoint(root / name, root / f"{name}-dense", "dense")
        pairs[name] = (root / f"{name}-dense", root / name)

    for name in EXPERTS:
        add(name, "olmoe", {"default": entry(REST[name]), "overrides": [{"pattern": "*.experts.*", **entry(name)}]})
    for family in ("mixtral", "qwen2_moe", "qwen3_moe", "llama"):
        add(family, family, {"default": entry("int4")})
    add("llama, zero points", "llama", {"default": {**entry("int3"), "symmetric": False}})
    return dict(zip(pairs, compare("transformers", sys.executable, list(pairs.values()), PROMPTS), strict=True))


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_and_the_rest_in_two_formats(found, name):
    assert (found[name].same_tokens, found[name].logits < 1e-3) == (1.0, True), found[name]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "llama", "llama, zero points"])
def test_every_family_of_its_own(found, family):
    assert (found[family].same_tokens, found[family].logits < 1e-3) == (1.0, True), found[family]
