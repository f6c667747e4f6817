"""Engines at the command: a plan that they would not take stops before anything is computed."""

from __future__ import annotations

import json

import pytest

MIXED = {
    "default": {"wq": "int4", "group_size": 32},
    "overrides": [{"pattern": "model.layers.0.mlp.experts.3.*", "wq": "int8"}],
}


@pytest.fixture
def mixed(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(MIXED))
    return path


def test_plan_lists_every_violation(alphaquant, works, olmoe, mixed):
    result = alphaquant("plan", olmoe, "--config", mixed, "--engine", "vllm")
    assert result.code == 2
    for words in ("model.layers.0.mlp.experts.0.gate_proj and 23 more", "rule ", "remedy ", "--legalize"):
        assert words in result.out
    facts = json.loads(alphaquant("plan", olmoe, "--config", mixed, "--engine", "vllm", "--json").out)
    assert [v["modules"] for v in facts["violations"]] == [24]
    assert "vllm takes this plan" in works("plan", olmoe, "--scheme", "int4:g32", "--engine", "vllm").out
    assert "any takes this plan" in works("plan", olmoe, "--config", mixed, "--engine", "any", "--legalize").out


def test_quantize_refuses_a_violation(fails, olmoe, mixed, tmp_path):
    out = tmp_path / "out"
    fails(
        "quantize", olmoe, "--config", mixed, "--engine", "vllm", "--method", "rtn", "-o", out,
        says=("vllm would not take this plan", "experts.0.gate_proj and 23 more", "--legalize"),
    )  # fmt: skip


def test_legalize_raises_and_says_so(works, olmoe, mixed, tmp_path):
    out = tmp_path / "out"
    result = works("quantize", olmoe, "--config", mixed, "--engine", "vllm", "--legalize", "--method", "rtn", "-o", out)
    assert "21 of 24 raised to int8 g32" in result.err
    table = json.loads((out / "alphaquant/modules.json").read_text())["modules"]
    assert {m["format"] for name, m in table.items() if ".layers.0.mlp.experts." in name} == {"int8"}
    assert {m["format"] for name, m in table.items() if ".layers.1." in name} == {"int4"}
    plan = json.loads((out / "alphaquant/plan.json").read_text())
    assert "vllm gives all experts" in plan["overrides"][-1]["comment"]


def test_auto_takes_the_layout_that_the_engine_reads(works, olmoe, tmp_path):
    """fp8 experts go into compressed-tensors, but vLLM computes them from humming only."""
    scheme = ("--scheme", "fp8:channel", "--method", "rtn")
    works("quantize", olmoe, *scheme, "-o", tmp_path / "a")
    works("quantize", olmoe, *scheme, "--engine", "vllm", "-o", tmp_path / "b")
    layouts = [json.loads((tmp_path / name / "alphaquant/modules.json").read_text())["layout"] for name in "ab"]
    assert layouts == ["compressed-tensors", "humming"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tp", "2"), ("--tp", "--engine")),
        (("--legalize",), ("--legalize", "--engine")),
        (("--engine", "vllm", "--gpu", "hopper"), ("'hopper'", "9.0")),
    ],
)
def test_options_that_make_no_sense(fails, olmoe, options, says):
    fails("plan", olmoe, "--scheme", "int4:g32", *options, says=says)
