"""Stock vLLM on a CPU loads what we write, and says the same as on the dense export of the same codes."""

from __future__ import annotations

import pytest

from alphaquant.pipeline import export_checkpoint
from alphaquant.verification import compare, random_prompts
from pipeline import tiny

from . import models

GROUPED = "int4:g64"


@pytest.fixture(scope="session")
def served(tmp_path_factory, vllm):
    """Every family in W4A16, in one process of the engine."""
    root = tmp_path_factory.mktemp("vllm")
    pairs = {}
    for family in models.FAMILIES:
        model = models.write(root / family, family)
        out = root / f"{family}-w4a16"
        tiny.quantize(model, out, GROUPED, None)
        twin = root / f"{family}-dense"
        export_checkpoint(out, twin, "dense")
        pairs[family] = (twin, out)
    prompts = random_prompts(tiny.VOCAB - 1)
    found = compare("vllm", vllm, list(pairs.values()), prompts, trust_remote_code=True)
    return dict(zip(pairs, found, strict=True))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_is_served_from_four_bits(served, family):
    found = served[family]
    print(family, found)
    assert found.same_tokens == 1.0
    assert found.mean_difference < 0.02
