"""What a tap sees: every input once, routed rows with their own scores, and enough to rebuild the block's output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from alphaquant.models import (
    LayerWeights,
    MLPSpec,
    ModelSpec,
    MoESpec,
    Routing,
    Source,
    attention_half,
    mlp_half,
    rope_for,
)
from alphaquant.models.attention import rms_norm
from alphaquant.models.moe import feed_forward, route

from . import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, LENGTH = 3, 11
TOKENS = BATCH * LENGTH
each_model = pytest.mark.parametrize("name", tiny.MODELS)
each_moe = pytest.mark.parametrize("name", [name for name in tiny.MODELS if name.startswith("olmoe")])


@pytest.fixture(scope="session")
def get(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tiny.Tiny]:
    return tiny.zoo(tmp_path_factory.mktemp("tap"))


class Recorder:
    """A tap that keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: dict[Source, Tensor] = {}
        self.routing: dict[Source, Routing] = {}

    def __call__(self, source: Source, x: Tensor, routing: Routing | None = None) -> None:
        assert source not in self.seen, f"{source} is shown twice"
        self.seen[source] = x.clone()
        if routing is not None:
            self.routing[source] = routing


@dataclass
class Passed:
    """One layer's weights and streams, without and with taps."""

    spec: ModelSpec
    layer: int
    weights: LayerWeights
    x: Tensor
    middle: Tensor
    out: Tensor
    attention: Recorder
    mlp: Recorder

    @property
    def moe(self) -> MoESpec:
        spec = self.spec.layers[self.layer].mlp
        assert isinstance(spec, MoESpec)
        return spec

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))


def run(model: tiny.Tiny, layer: int = 1) -> Passed:
    decoder = model.ours()
    weights, spec = decoder.layers[layer], model.spec
    x = torch.randn(BATCH, LENGTH, spec.hidden_size, generator=torch.Generator().manual_seed(5))
    before, rope = x.clone(), rope_for(spec, LENGTH, "cpu")
    attention, mlp = Recorder(), Recorder()
    attention_half(x, weights, spec, layer, rope, tap=attention)
    middle = attention_half(x, weights, spec, layer, rope)
    mlp_half(middle, weights, spec, layer, tap=mlp)
    out = mlp_half(middle, weights, spec, layer)
    assert x.equal(before)
    return Passed(spec, layer, weights, x, middle, out, attention, mlp)


@each_model
def test_each_input_is_shown_once_in_its_shape(get: Callable[[str], tiny.Tiny], name: str) -> None:
    model = get(name)
    passed = run(model)
    attention = passed.spec.layers[1].attention
    width = attention.num_heads * attention.head_dim
    hidden = passed.spec.hidden_size
    assert {source: tuple(x.shape) for source, x in passed.attention.seen.items()} == {
        Source.ATTENTION_IN: (BATCH, LENGTH, hidden),
        Source.ATTENTION_OUT: (BATCH, LENGTH, width),
    }
    assert not passed.attention.routing
    mlp = passed.spec.layers[1].mlp
    shapes = {source: tuple(x.shape) for source, x in passed.mlp.seen.items()}
    if isinstance(mlp, MLPSpec):
        assert shapes == {Source.MLP_IN: (TOKENS, hidden), Source.MLP_HIDDEN: (TOKENS, mlp.intermediate_size)}
        assert not passed.mlp.routing
        return
    rows = TOKENS * mlp.top_k
    assert shapes == {
        Source.MLP_IN: (TOKENS, hidden),
        Source.EXPERT_IN: (rows, hidden),
        Source.EXPERT_HIDDEN: (rows, mlp.intermediate_size),
    }
    assert passed.mlp.routing.keys() == {Source.EXPERT_IN, Source.EXPERT_HIDDEN}


@each_model
def test_every_linear_has_an_input_that_is_shown(get: Callable[[str], tiny.Tiny], name: str) -> None:
    passed = run(get(name))
    shown = passed.attention.seen | passed.mlp.seen
    for parameter in passed.spec.parameters(1):
        is_linear = len(parameter.shape) == 2
        assert (parameter.source is not None) == is_linear
        if parameter.source is not None:
            assert shown[parameter.source].shape[-1] == parameter.shape[1], parameter.role


@each_model
def test_attention_is_rebuilt_from_its_taps(get: Callable[[str], tiny.Tiny], name: str) -> None:
    passed = run(get(name))
    seen = passed.attention.seen
    normed = rms_norm(passed.x, passed.weights["input_layernorm.weight"], passed.spec.rms_norm_eps)
    assert seen[Source.ATTENTION_IN].equal(normed)
    out = passed.x + passed.linear(seen[Source.ATTENTION_OUT], "self_attn.o_proj")
    torch.testing.assert_close(out, passed.middle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if not name.startswith("olmoe")])
def test_a_dense_block_is_rebuilt_from_its_taps(get: Callable[[str], tiny.Tiny], name: str) -> None:
    passed = run(get(name))
    seen = passed.mlp.seen
    normed = rms_norm(passed.middle, passed.weights["post_attention_layernorm.weight"], passed.spec.rms_norm_eps)
    assert seen[Source.MLP_IN].equal(normed.flatten(0, 1))
    hidden = F.silu(passed.linear(seen[Source.MLP_IN], "mlp.gate_proj")) * passed.linear(
        seen[Source.MLP_IN], "mlp.up_proj"
    )
    torch.testing.assert_close(seen[Source.MLP_HIDDEN], hidden, rtol=1e-5, atol=1e-6)
    out = passed.linear(seen[Source.MLP_HIDDEN], "mlp.down_proj").view_as(passed.middle)
    torch.testing.assert_close(passed.middle + out, passed.out, rtol=1e-5, atol=1e-5)


def naive_rows(topk_ids_TK: Tensor, score_TK: Tensor, num_experts: int) -> list[tuple[int, int, float]]:
    """(expert, token, score) of every routed row: experts in order, each with its tokens in order."""
    return [
        (expert, token, float(score_TK[token, k]))
        for expert in range(num_experts)
        for token in range(topk_ids_TK.shape[0])
        for k in range(topk_ids_TK.shape[1])
        if int(topk_ids_TK[token, k]) == expert
    ]


@each_moe
def test_routed_rows_counts_and_scores_are_the_experts_own(get: Callable[[str], tiny.Tiny], name: str) -> None:
    passed = run(get(name))
    moe, seen = passed.moe, passed.mlp.seen
    x = seen[Source.MLP_IN]
    # from the definition, beside the library: softmax over all, the k largest
    probs = (x @ passed.weights["mlp.gate.weight"].T).softmax(-1)
    score, ids = probs.sort(-1, descending=True)
    score, ids = score[:, : moe.top_k], ids[:, : moe.top_k]
    if moe.normalize_top_k:
        score = score / score.sum(-1, keepdim=True)
    rows = naive_rows(ids, score, moe.num_experts)
    assert len(rows) == TOKENS * moe.top_k
    expected = torch.tensor([row[2] for row in rows])
    assert expected.diff().abs().max() > 0.01 or moe.normalize_top_k
    for source in (Source.EXPERT_IN, Source.EXPERT_HIDDEN):
        routing = passed.mlp.routing[source]
        assert routing.counts_E.tolist() == [sum(row[0] == e for row in rows) for e in range(moe.num_experts)]
        assert int(routing.counts_E.sum()) == TOKENS * moe.top_k
        assert routing.score_R.dtype == torch.float32
        torch.testing.assert_close(routing.score_R, expected, rtol=1e-5, atol=1e-6)
    assert seen[Source.EXPERT_IN].equal(x[[row[1] for row in rows]])


@each_moe
def test_a_routed_block_is_rebuilt_from_its_taps(get: Callable[[str], tiny.Tiny], name: str) -> None:
    passed = run(get(name))
    moe, seen = passed.moe, passed.mlp.seen
    choice = route(seen[Source.MLP_IN], passed.weights, moe)
    rows = naive_rows(choice.topk_ids_TK, choice.score_TK, moe.num_experts)
    out = torch.zeros(TOKENS, passed.spec.hidden_size)
    for r, (expert, token, _) in enumerate(rows):
        gate, up, down = (passed.weights[f"mlp.experts.{part}_proj.weight"][expert] for part in ("gate", "up", "down"))
        x = seen[Source.EXPERT_IN][r]
        hidden = F.silu(gate @ x) * (up @ x)
        torch.testing.assert_close(seen[Source.EXPERT_HIDDEN][r], hidden, rtol=1e-4, atol=1e-5)
        out[token] += passed.mlp.routing[Source.EXPERT_HIDDEN].score_R[r] * (down @ seen[Source.EXPERT_HIDDEN][r])
    torch.testing.assert_close(passed.middle + out.view_as(passed.middle), passed.out, rtol=1e-4, atol=1e-4)


def test_an_expert_that_nobody_chose_has_no_rows(get: Callable[[str], tiny.Tiny]) -> None:
    model = get("olmoe")
    moe = model.spec.layers[0].mlp
    assert isinstance(moe, MoESpec)
    weights = dict(model.ours().layers[0])
    router = weights["mlp.gate.weight"].clone()
    x = torch.rand(1, 9, 32, generator=torch.Generator().manual_seed(0)) + 0.1
    router[[1, 4]] = -50.0
    weights["mlp.gate.weight"] = router
    recorder = Recorder()
    feed_forward(x, weights, moe, recorder)
    counts = recorder.routing[Source.EXPERT_IN].counts_E
    assert counts.shape == (6,)
    assert counts[[1, 4]].tolist() == [0, 0]
    assert int(counts.sum()) == 18
    changed = dict(weights)
    for part in ("gate", "up", "down"):
        changed[f"mlp.experts.{part}_proj.weight"] = weights[f"mlp.experts.{part}_proj.weight"].clone()
        changed[f"mlp.experts.{part}_proj.weight"][[1, 4]] = torch.nan
    assert feed_forward(x, changed, moe).equal(feed_forward(x, weights, moe))


def test_one_token_goes_through(get: Callable[[str], tiny.Tiny]) -> None:
    model = get("olmoe")
    decoder = model.ours()
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    recorder = Recorder()
    mlp_half(x, decoder.layers[0], model.spec, 0, tap=recorder)
    assert recorder.seen[Source.EXPERT_IN].shape == (2, 32)
    assert recorder.routing[Source.EXPERT_IN].counts_E.sum() == 2


@pytest.mark.parametrize("shared_gate", [True, False])
def test_shared_experts_are_added_and_shown(shared_gate: bool) -> None:  # noqa: FBT001
    hidden, inner, shared_inner, experts = 16, 12, 20, 4
    spec = MoESpec(experts, 2, inner, normalize_top_k=True, shared=MLPSpec(shared_inner), shared_gate=shared_gate)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    weights = {
        "mlp.gate.weight": noise(experts, hidden),
        "mlp.experts.gate_proj.weight": noise(experts, inner, hidden),
        "mlp.experts.up_proj.weight": noise(experts, inner, hidden),
        "mlp.experts.down_proj.weight": noise(experts, hidden, inner),
        "mlp.shared_expert.gate_proj.weight": noise(shared_inner, hidden),
        "mlp.shared_expert.up_proj.weight": noise(shared_inner, hidden),
        "mlp.shared_expert.down_proj.weight": noise(hidden, shared_inner),
    }
    if shared_gate:
        weights["mlp.shared_expert_gate.weight"] = noise(1, hidden)
    x = torch.randn(2, 5, hidden, generator=generator)
    recorder = Recorder()
    feed_forward(x, weights, spec, recorder)
    seen = recorder.seen
    tokens = x.flatten(0, 1)
    assert seen.keys() == {
        Source.MLP_IN,
        Source.EXPERT_IN,
        Source.EXPERT_HIDDEN,
        Source.SHARED_IN,
        Source.SHARED_HIDDEN,
    }
    assert seen[Source.SHARED_IN].equal(tokens)
    gate, up, down = (weights[f"mlp.shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down"))
    inside = F.silu(tokens @ gate.T) * (tokens @ up.T)
    torch.testing.assert_close(seen[Source.SHARED_HIDDEN], inside)
    shared = inside @ down.T
    if shared_gate:
        score = torch.sigmoid(tokens @ weights["mlp.shared_expert_gate.weight"].T)
        shared = shared * score
        for source in (Source.SHARED_IN, Source.SHARED_HIDDEN):
            routing = recorder.routing[source]
            assert routing.counts_E.tolist() == [len(tokens)]
            torch.testing.assert_close(routing.score_R, score[:, 0])
    else:
        assert Source.SHARED_IN not in recorder.routing
        assert Source.SHARED_HIDDEN not in recorder.routing
    routed = feed_forward(x, weights, replace(spec, shared=None, shared_gate=False))
    torch.testing.assert_close(feed_forward(x, weights, spec), routed + shared.view_as(x), rtol=1e-5, atol=1e-6)
