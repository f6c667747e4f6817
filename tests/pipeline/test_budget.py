"""What a run will take of memory, foretold; and sizes as people write them."""

from __future__ import annotations

import pytest
import torch

from alphaquant.errors import ConfigError
from alphaquant.models import detect
from alphaquant.pipeline import budget
from alphaquant.pipeline.budget import free_memory, parse_bytes, plan_memory
from alphaquant.pipeline.duration import foretell_seconds
from alphaquant.pipeline.stream import resident_memory
from alphaquant.plan import Plan
from alphaquant.solver import Recipe
from models.families import MODELS, config_of

GIB = 1 << 30
# the published shape of OLMoE-1B-7B
OLMOE = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}


def planned(max_bytes: int | None, tokens: tuple[int, int] | None = (128, 2048), wq: str = "int4"):
    spec = detect(OLMOE)
    schemes = Plan.from_dict({"default": {"wq": wq, "group_size": 128}}).resolve(list(spec.modules())).schemes
    return plan_memory(spec, schemes, tokens, torch.bfloat16, torch.device("cpu"), max_bytes)


@pytest.fixture(autouse=True)
def small_process(monkeypatch):
    """What this process takes already depends on the tests before."""
    monkeypatch.setattr(budget, "resident_memory", lambda: GIB // 4)


def test_ample_memory_takes_one_pass_for_each_half_layer():
    plan = planned(1 << 45)
    assert (plan.passes, plan.limits.holds_stream) == (32, False)
    # 64 Hessians of 2048 inputs and 64 of 1024 are alive together, and the router's
    assert plan.parts["Hessians"] >= 4 * 64 * (2048**2 + 1024**2)
    assert plan.parts["activations between layers"] == 128 * 2048 * 2048 * 2
    assert plan.parts["embedding and head"] == pytest.approx(2 * 2 * 50304 * 2048, rel=1e-3)


def test_less_memory_means_more_passes_and_at_last_activations_on_disk():
    plans = [planned(size * GIB // 4) for size in range(14, 40)]
    for size, plan in zip(range(14, 40), plans, strict=True):
        assert plan.peak_bytes <= size * GIB // 4
    passes = [plan.passes for plan in plans]
    assert passes == sorted(passes, reverse=True)
    assert passes[0] > passes[-1] == 32
    assert len(plans[0].notes()) == 2
    assert not plans[-1].notes()
    assert plans[0].limits.holds_stream
    assert not plans[-1].limits.holds_stream


def test_what_is_left_alone_takes_neither_hessians_nor_codes():
    plan = planned(1 << 45, wq="none")
    assert plan.parts["Hessians"] < 1 << 20
    assert plan.parts["codes of a layer"] == 0
    blind = planned(1 << 45, tokens=None)
    assert "Hessians" not in blind.parts
    assert "activations between layers" not in blind.parts


def test_too_little_is_an_error_that_says_how_much_is_needed():
    with pytest.raises(ConfigError, match="--max-memory") as caught:
        planned(GIB)
    needed = caught.value.what.split(" takes ")[1].split(" at the least")[0]
    assert planned(parse_bytes(needed, "x") + (1 << 24)).passes > 32


def test_without_a_limit_the_run_is_tried_whatever_is_free(monkeypatch):
    monkeypatch.setattr(budget, "free_memory", lambda: GIB)
    assert planned(None).peak_bytes > 2 * GIB
    monkeypatch.setattr(budget, "free_memory", lambda: 1 << 40)
    assert planned(None).passes == 32


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 * GIB), ("512 MiB", GIB // 2), ("16GB", 16 * 10**9), ("4e9", 4 * 10**9), ("1.5g", 1_500_000_000)],
)
def test_sizes(text, size):
    assert parse_bytes(text, "--max-memory") == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "4 gallons", "1e400", "4GiBs"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="--max-memory"):
        parse_bytes(text, "--max-memory")


def test_this_machine_has_memory():
    assert 0 < resident_memory() < free_memory() + resident_memory()


@pytest.mark.parametrize("family", [*MODELS, "deepseek"])
def test_every_family_can_be_foretold(family):
    """Biases, latent attention, shared experts and dense layers are counted like the rest."""
    spec = detect(config_of(family))
    schemes = Plan.from_dict({"default": {"wq": "int4", "group_size": 8}}).resolve(list(spec.modules())).schemes
    plan = plan_memory(spec, schemes, (4, 16), torch.bfloat16, torch.device("cpu"))
    seconds = foretell_seconds(spec, schemes, (4, 16), torch.bfloat16, torch.device("cpu"), Recipe())
    assert plan.passes == plan.least_passes == 2 * spec.num_layers
    assert min(plan.parts.values()) > 0
    assert min(seconds.values()) > 0


def test_other_streams_are_counted():
    spec = detect(config_of("olmoe"))
    schemes = Plan.from_dict({"default": {"wq": "int4", "group_size": 8}}).resolve(list(spec.modules())).schemes
    cpu = torch.device("cpu")
    repair, target = Recipe(repair_router=True), Recipe(asymmetric_target=0.5)
    one, two, three = (
        plan_memory(spec, schemes, (4, 16), torch.bfloat16, cpu, recipe=recipe) for recipe in (Recipe(), repair, target)
    )
    assert two.parts["activations between layers"] == 2 * one.parts["activations between layers"]
    assert three.parts["activations between layers"] == 3 * one.parts["activations between layers"]
    assert three.limits.hessian_bytes == one.limits.hessian_bytes
    assert three.parts["Hessians"] == pytest.approx(2 * one.parts["Hessians"], abs=1)
    assert foretell_seconds(spec, schemes, (4, 16), torch.bfloat16, cpu, repair)["repair"] > 0
