"""FP8 in blocks through a whole run: matrices that are no whole number of blocks tall, experts, rounded inputs."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.errors import OutputError
from alphaquant.formats import Activation, round_inputs
from alphaquant.layouts import QuantizedCheckpoint
from alphaquant.models import Source
from alphaquant.pipeline import export_checkpoint, load
from alphaquant.pipeline.collect import Collector, Reading
from alphaquant.solver import Recipe
from alphaquant.verification import Stored, check_stored

from . import tiny
from .spy import Spy
from .test_outputs import assert_same_codes, original, replaced

BLOCKS = {"wq": "fp8_block", "aq": "fp8"}
# keys and values have 64 rows, gate and up 192: half a block, and one and a half
SIZES = {"hidden_size": 128, "num_key_value_heads": 2}
PLANS = {
    "llama": (
        {"intermediate_size": 192},
        {"default": BLOCKS, "overrides": [{"pattern": "*.down_proj", "wq": "int4", "group_size": 64, "aq": "bf16"}]},
    ),
    "olmoe": (
        {"intermediate_size": 256},
        {"default": {"wq": "int4", "group_size": 64}, "overrides": [{"pattern": "*.experts.[0-4].*", **BLOCKS}]},
    ),
}


@pytest.fixture(scope="module", params=PLANS)
def run(request, text, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    sizes, plan = PLANS[request.param]
    model = tiny.write_model(root / "model", request.param, **SIZES, **sizes)
    with pytest.MonkeyPatch.context() as monkeypatch:
        spy = Spy().install(monkeypatch)
        tiny.quantize(model, root / "out", plan, text, layout="compressed-tensors")
    return model, root / "out", spy


def in_blocks(spy):
    return {name: q for name, q in spy.quantized.items() if q.scheme.format.name == "fp8_block"}


def test_each_matrix_begins_with_a_block_of_its_own(run, text, tmp_path):
    model, out, spy = run
    found = in_blocks(spy)
    assert found
    for name, q in found.items():
        for start in range(0, len(q.scale), 128):
            part = q.scale[start : start + 128]
            assert part.equal(part[:1].expand_as(part)), name
    stored = tiny.as_plan(json.loads((out / "alphaquant/plan.json").read_text()))
    left = [{"pattern": "*.gate_proj", "skip": True}]
    plan = stored.model_dump(exclude_none=True)
    both = []
    for name, overrides in (("all", []), ("some", left)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            both.append(Spy().install(monkeypatch))
            # a gate that is left rounds no inputs, which changes what `down` reads, and what `up` would make up for
            recipe = Recipe(equalize=False)
            tiny.quantize(
                model, tmp_path / name, {**plan, "overrides": [*plan["overrides"], *overrides]}, text, recipe=recipe
            )
    beside, alone = map(in_blocks, both)
    for name, q in alone.items():
        if name.startswith("model.layers.0.") and name.endswith("up_proj"):
            assert_same_codes(q, beside[name], name)  # whatever is solved beside it


def test_what_is_written_is_what_was_solved_and_converts_back(run, tmp_path):
    _, out, spy = run
    assert check_stored(out) == Stored((), "compressed-tensors", len(spy.quantized), 0)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    group = next(g for g in config["config_groups"].values() if g["weights"]["strategy"] == "block")
    assert (group["format"], group["weights"]["block_structure"]) == ("float-quantized", [128, 128])
    assert (group["input_activations"]["strategy"], group["input_activations"]["group_size"]) == ("group", 128)
    export_checkpoint(out, tmp_path / "again", "compressed-tensors")
    for path in (out, tmp_path / "again"):
        stored = QuantizedCheckpoint.open(path)
        for name, q in spy.quantized.items():
            assert_same_codes(stored.read_quantized(name), q, name)
    with pytest.raises(OutputError, match="cannot hold fp8_block"):
        export_checkpoint(out, tmp_path / "humming", "humming")


def test_what_is_loaded_rounds_each_group_of_a_token(run, monkeypatch):
    """A linear of blocks is the plain product of inputs that were rounded group by group."""
    model, out, spy = run
    loaded, ids = load(out).logits(tiny.token_ids()), tiny.token_ids()
    decoder = replaced(original(model), spy.quantized)
    unrounded, blocks, plain = decoder.logits(ids), set(), F.linear
    for layer, weights in enumerate(decoder.layers):
        for parameter in decoder.spec.parameters(layer):
            for expert, name in enumerate(decoder.spec.module_names(layer, parameter)):
                if name in in_blocks(spy):
                    weight = weights[parameter.key]
                    blocks.add((weight[expert] if parameter.num_experts else weight).data_ptr())

    def rounding(x, weight, bias=None):
        if weight.data_ptr() in blocks:
            x = x.unflatten(-1, (-1, 128))
            step = x.abs().amax(-1, keepdim=True) / 448
            x = ((x / step).nan_to_num().to(torch.float8_e4m3fn).float() * step).flatten(-2)
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", rounding)
    rounded = decoder.logits(ids)
    # a last bit of difference may tip an input over to the next step, and with it what follows of its sequence
    assert ((loaded - rounded).abs() > 1e-3).float().mean() < 0.02
    assert ((loaded - unrounded).abs() > 1e-3).float().mean() > 0.5


def test_hessians_are_of_inputs_rounded_in_groups(run):
    model, _, spy = run
    spec, scheme = original(model).spec, next(iter(in_blocks(spy).values())).scheme
    keys = [Reading(Source.ATTENTION_IN, inputs) for inputs in (scheme.inputs, scheme.inputs._replace(group_size=-1))]
    collector = Collector(spec.parameters(0), dict.fromkeys(keys, range(1)), 1.0)
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(3)) * torch.logspace(-1, 1, 128)
    collector(Source.ATTENTION_IN, x[None])
    rows = round_inputs(x, Activation.FP8, 128)[0]
    found = [collector.hessians[key].normalized([0])[0] for key in keys]
    torch.testing.assert_close(found[0], rows.T @ rows / 50, rtol=1e-4, atol=1e-5)
