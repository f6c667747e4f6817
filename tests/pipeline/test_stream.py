"""The loop: each half-layer runs twice, on the stream of what is quantized before it; linears share Hessians."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.models import ModelSpec, attention_half, mlp_half, rope_for
from alphaquant.pipeline import collect, load, prepare, stream
from alphaquant.solver import HessianSum

from . import tiny
from .spy import Spy

SAMPLES, LENGTH = 10, 16
PLAN = {
    "default": {"wq": "int3", "group_size": 32},
    "overrides": [
        {"pattern": "*.self_attn.k_proj", "wq": "int8"},
        {"pattern": "model.embed_tokens", "wq": "int8"},
    ],
}


class Seen(NamedTuple):
    """A finished run, its spy, its model as served, and the model's spec."""

    spy: Spy
    served: list[dict[str, torch.Tensor]]
    outer: dict[str, torch.Tensor]
    spec: ModelSpec


@pytest.fixture(scope="module", params=["olmoe", "llama"])
def seen(request, tmp_path_factory, text):
    """A run in chunks of three sequences."""
    model, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("stream") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stream, "CHUNK_TOKENS", 3 * LENGTH)
        spy = Spy().install(monkeypatch)
        tiny.quantize(model, out, PLAN, text, num_samples=SAMPLES, seqlen=LENGTH)
    served = load(out)
    return Seen(spy, list(served.layers), served.outer, prepare(model, tiny.as_plan(PLAN)).spec)


def attended(seen: Seen, x_NLD: torch.Tensor, layer: int) -> torch.Tensor:
    rope = rope_for(seen.spec, LENGTH, "cpu")
    return attention_half(x_NLD, seen.served[layer], seen.spec, layer, rope)


def test_each_half_layer_runs_exactly_twice(seen):
    chunks = 4  # ten sequences by threes
    counts = Counter((p.half, p.layer, p.is_tapped) for p in seen.spy.passes)
    assert counts == {
        (half, layer, tapped): chunks for half in ("attention", "mlp") for layer in range(2) for tapped in (True, False)
    }
    assert {p.x.shape for p in seen.spy.passes} == {(3, LENGTH, 64), (1, LENGTH, 64)}


def test_attention_is_quantized_before_the_feed_forward_is_seen(seen):
    steps = [(p.layer, p.half, p.is_tapped) for p in seen.spy.passes]
    order = list(dict.fromkeys(steps))
    expected = [(layer, half, tap) for layer in range(2) for half in ("attention", "mlp") for tap in (True, False)]
    assert order == expected
    assert steps == [step for step in expected for _ in range(4)]


def test_the_stream_is_that_of_the_quantized_layers(seen):
    """Layer 0 reads the embedding, layer 1 what the served layer 0 makes of it."""
    x_NLD = seen.spy.before[0]
    assert x_NLD.shape == (SAMPLES, LENGTH, 64)
    embedding = seen.outer["model.embed_tokens.weight"]
    assert bool((x_NLD[:, :, None] == embedding).all(-1).any(-1).all())
    for layer in range(2):
        torch.testing.assert_close(seen.spy.before[layer], x_NLD, atol=1e-4, rtol=1e-4)
        x_NLD = mlp_half(attended(seen, x_NLD, layer), seen.served[layer], seen.spec, layer)
    torch.testing.assert_close(seen.spy.after[1], x_NLD, atol=1e-4, rtol=1e-4)


def test_the_feed_forward_is_calibrated_behind_quantized_attention(seen):
    for layer in range(2):
        tapped = torch.cat([p.x for p in seen.spy.passes if p[:3] == ("mlp", layer, True)])
        torch.testing.assert_close(tapped, attended(seen, seen.spy.before[layer], layer), atol=1e-4, rtol=1e-4)


def test_the_stream_is_not_that_of_the_original(seen, request):
    """What the tests above would see if weights were propagated before they are quantized."""
    family = seen.spec.family
    original = load(request.getfixturevalue(family))
    rope, x_NLD = rope_for(seen.spec, LENGTH, "cpu"), seen.spy.before[0]
    x_NLD = attention_half(x_NLD, original.layers[0], seen.spec, 0, rope)
    tapped = torch.cat([p.x for p in seen.spy.passes if p[:3] == ("mlp", 0, True)])
    assert (tapped - x_NLD).abs().max() > 1e-2
    assert (seen.spy.before[1] - mlp_half(x_NLD, original.layers[0], seen.spec, 0)).abs().max() > 1e-2


class CountedHessian(HessianSum):
    """A Hessian sum that says how many there are and what went into them."""

    made: list[CountedHessian] = []  # noqa: RUF012

    def __init__(self, num_experts, in_features, *args, **rest):
        super().__init__(num_experts, in_features, *args, **rest)
        self.rows = 0
        CountedHessian.made.append(self)

    def add(self, x_RI, counts=None, score_R=None, original_RI=None):
        self.rows += x_RI.shape[0]
        super().add(x_RI, counts, score_R, original_RI)


@pytest.mark.parametrize(
    ("family", "plan", "sources"),
    [
        # q, k and v share one of 64 inputs, o_proj has its own; gate and up share one for each expert
        ("olmoe", PLAN, [(1, 64, 1), (1, 64, 1), (8, 64, 2), (8, 64, 2)]),
        ("llama", PLAN, [(1, 64, 1), (1, 64, 1), (1, 64, 1), (1, 128, 1)]),
        # nothing is summed for what the plan leaves
        (
            "olmoe",
            {"default": {"wq": "none"}, "overrides": [{"pattern": "*.up_proj", "wq": "int4", "group_size": 32}]},
            [(8, 64, 2)],
        ),
        (
            "llama",
            {"default": {"wq": "none"}, "overrides": [{"pattern": "*.v_proj", "wq": "int4", "group_size": 32}]},
            [(1, 64, 1)],
        ),
    ],
)
def test_linears_that_share_an_input_share_a_hessian(request, tmp_path, monkeypatch, text, family, plan, sources):
    monkeypatch.setattr(collect, "HessianSum", CountedHessian)
    monkeypatch.setattr(CountedHessian, "made", [])
    monkeypatch.setattr(stream, "CHUNK_TOKENS", 3 * LENGTH)
    model = request.getfixturevalue(family)
    tiny.quantize(model, tmp_path / "out", plan, text, num_samples=SAMPLES, seqlen=LENGTH)
    tokens = SAMPLES * LENGTH
    found = [(h.sum_EII.shape[0], h.sum_EII.shape[1], h.rows / tokens) for h in CountedHessian.made]
    assert found == sources * 2


def test_no_forward_pass_for_each_linear(tmp_path, monkeypatch, text, llama):
    """A dense layer is at most seven products to propagate, and five to collect: q, k, v, gate and up."""
    calls = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: calls.append(w.shape) or linear(x, w, b))
    tiny.quantize(llama, tmp_path / "out", PLAN, text, num_samples=SAMPLES, seqlen=LENGTH)
    assert 0 < len(calls) <= 2 * (7 + 5)


def test_without_a_text_nothing_runs(olmoe, tmp_path, monkeypatch):
    spy = Spy().install(monkeypatch)
    tiny.quantize(olmoe, tmp_path / "out", PLAN, None)
    assert spy.passes == []
    assert spy.before == {}


def test_a_plan_that_leaves_the_feed_forward_runs_it_to_see_the_experts(olmoe, llama, tmp_path, monkeypatch, text):
    plan = {"default": {"wq": "int4", "group_size": 32}, "overrides": [{"pattern": "*.mlp.*", "skip": True}]}
    for model, expected in ((olmoe, True), (llama, False)):
        spy = Spy().install(monkeypatch)
        result = tiny.quantize(model, tmp_path / model.name, plan, text)
        assert any(p.is_tapped and p.half == "mlp" for p in spy.passes) is expected
        assert (result.records[0].routing is not None) is expected
        monkeypatch.undo()
