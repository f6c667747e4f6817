"""What lies on the disk is what the formats promise: bits a weight times weights, headers and all."""

from __future__ import annotations

import json

import pytest

from alphaquant.checkpoint import Checkpoint
from alphaquant.models import detect
from alphaquant.pipeline import export_checkpoint
from alphaquant.solver import Effort, Method, Recipe

from . import tiny

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
ATTENTION, UP, DOWN = "*.self_attn.*", "*.up_proj", "*.down_proj"
PLANS = {
    "compressed-tensors": ("int3:g64", {ATTENTION: "nvfp4", UP: "mxfp6", DOWN: "int4:g32:asym"}),
    "humming": ("fp6:g64", {ATTENTION: "mxfp8_e5m2", UP: "int2:g128:asym", DOWN: "fp4:g32"}),
    "gptq_v2": ("int4:g64:asym", {ATTENTION: "int8:g128:asym", UP: "int3:g32:asym", DOWN: "int2:g64:asym"}),
    "dense": ("int4:g64", {}),
}


@pytest.mark.parametrize("layout", PLANS)
def test_shards_take_the_bits_that_the_plan_promises(tmp_path, layout):
    default, others = PLANS[layout]
    plan = tiny.as_plan(default).model_dump(exclude_none=True) | {
        "overrides": [
            {"pattern": pattern, **tiny.as_plan(scheme).default.settings()} for pattern, scheme in others.items()
        ]
    }
    model = tiny.write_model(tmp_path / "model", "llama", dtype="bfloat16", **WIDE)
    recipe = Recipe(method=Method.RTN, effort=Effort.FAST)
    written = "compressed-tensors" if layout == "dense" else layout
    sizes = tiny.quantize(model, tmp_path / "out", plan, None, layout=written, recipe=recipe).report["sizes"]
    bits, out = sizes["bits_per_weight"], tmp_path / "out"
    if layout == "dense":
        bits, out = 16, tmp_path / "dense"
        export_checkpoint(tmp_path / "out", out, "dense")
    original = Checkpoint.open(model)
    total = sum(original.info(name).num_bytes for name in original.names())
    promised = total - 2 * sizes["quantized_weights"] + bits * sizes["quantized_weights"] / 8
    if layout == "gptq_v2":  # which also names the group of every input
        modules = [module for module in detect(original.config).modules() if module.quantizable_by_default]
        promised += sum(4 * module.in_features for module in modules)
    on_disk = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert on_disk == pytest.approx(promised, rel=0.01)
    assert sizes["quantized_weights"] * 2 > 0.9 * total  # what is left as it is does not hide the others
    told = json.loads((out / "alphaquant" / "report.json").read_text())["sizes"]
    assert told["after_bytes"] == on_disk
