"""Stock vLLM on a CPU loads what we write, and says the same as on the dense export of the same codes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import alphaquant
from alphaquant.pipeline import export_checkpoint
from alphaquant.verification import random_prompts
from alphaquant.verification.engine import ask, likenesses
from pipeline import tiny

from . import models

PROMPTS = random_prompts(tiny.VOCAB - 1)


@pytest.fixture(scope="session")
def answer(tmp_path_factory, vllm):
    """Everything in one process of the engine: its start is most of the time."""
    root = tmp_path_factory.mktemp("vllm")
    pairs = {}

    def add(name, family):
        model = models.write(root / f"{name}-model", family)
        tiny.quantize(model, root / name, "int4:g64", None, layout="compressed-tensors")
        export_checkpoint(root / name, root / f"{name}-dense", "dense")
        pairs[name] = (root / f"{name}-dense", root / name)

    for family in models.FAMILIES:
        add(family, family)
    add("spoilt", "olmoe")
    spoil(pairs["spoilt"][1])
    found = ask("vllm", vllm, list(pairs.values()), PROMPTS, trust_remote_code=True)
    return pairs, found


def spoil(directory):
    """Give each expert of the first layer the scales of its neighbour: what a wrong name would do."""
    path = min(directory.glob("*.safetensors"))
    tensors = load_file(path)
    names = [f"model.layers.0.mlp.experts.{expert}.down_proj.weight_scale" for expert in range(8)]
    for name, other in zip(names, [tensors[name] for name in names[1:] + names[:1]], strict=True):
        tensors[name] = other.flip(0).contiguous()
    save_file(tensors, path, {"format": "pt"})


def likeness(answer, name):
    pairs, found = answer
    return dict(zip(pairs, likenesses(found), strict=True))[name]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_is_served_from_four_bits(answer, family):
    found = likeness(answer, family)
    if family in models.DENSE:
        assert (found.same_tokens, found.largest_difference) == (1.0, 0.0)
    else:  # vLLM's kernel for 4-bit experts on CPUs rounds what they read to 8 bits
        assert (found.same_tokens >= 0.75, found.agreement > 0.9, found.mean_difference < 0.06) == (True, True, True)


def test_wrong_scales_would_be_seen(answer):
    found = likeness(answer, "spoilt")
    assert found.same_tokens < 0.5
    assert found.mean_difference > 0.2


@pytest.mark.parametrize("family", models.FAMILIES)
def test_our_decoder_says_what_vllm_says(answer, family):
    """vLLM as a witness of our definitions; the only one of the first DeepSeek-MoE that others wrote."""
    pairs, found = answer
    theirs = found["pairs"][list(pairs).index(family)][0]
    model = alphaquant.load(pairs[family][0], dtype="fp32")
    apart = []
    for prompt, tokens, scores in zip(PROMPTS, theirs["tokens"], theirs["scores"], strict=True):
        ids = torch.tensor([prompt + tokens])
        logprobs = model.logits(ids)[0, :-1].float().log_softmax(-1)
        apart.append((logprobs.gather(1, ids[0, 1:, None])[:, 0] - torch.tensor(scores)).abs())
    assert float(torch.cat(apart).mean()) < 0.05  # they compute in bf16, we in fp32
    assert json.loads((pairs[family][0] / "config.json").read_text())["architectures"]
