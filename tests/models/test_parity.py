"""The decoder against transformers, on tiny models of every family and variant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from alphaquant.checkpoint import Checkpoint
from alphaquant.models import MoESpec, attention_half, detect, load_decoder, mlp_half, rope_for
from alphaquant.models.attention import KeyValueCache
from alphaquant.models.moe import route

from . import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

each_model = pytest.mark.parametrize("name", tiny.MODELS)
each_moe = pytest.mark.parametrize("name", [name for name in tiny.MODELS if name.startswith("olmoe")])


@pytest.fixture(scope="session")
def get(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tiny.Tiny]:
    return tiny.zoo(tmp_path_factory.mktemp("parity"))


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max())


@each_model
def test_logits(get: Callable[[str], tiny.Tiny], name: str) -> None:
    model, ids = get(name), tiny.token_ids()
    found, truth = model.ours().logits(ids), model.theirs(ids).logits
    assert found.dtype == torch.float32
    assert truth.std() > 0.5  # else agreement says little
    assert error(found, truth) < 1e-4


@each_model
def test_every_weight_shows_in_the_logits(get: Callable[[str], tiny.Tiny], name: str) -> None:
    model, ids = get(name), tiny.token_ids()
    decoder = model.ours()
    truth = decoder.logits(ids)  # what test_logits compares would notice an error in any of them
    for weights in (decoder.outer, *decoder.layers):
        for key, weight in weights.items():
            saved = weight.clone()
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
            assert error(decoder.logits(ids), truth) > 1e-2, key
            weight.copy_(saved)
    assert decoder.logits(ids).equal(truth)


@each_model
def test_every_layer_by_itself(get: Callable[[str], tiny.Tiny], name: str) -> None:
    model, ids = get(name), tiny.token_ids()
    decoder = model.ours()
    hidden = model.theirs(ids, output_hidden_states=True).hidden_states
    rope = rope_for(model.spec, ids.shape[1], "cpu")
    for layer, weights in enumerate(decoder.layers[:-1]):
        x = attention_half(hidden[layer], weights, model.spec, layer, rope)
        assert error(mlp_half(x, weights, model.spec, layer), hidden[layer + 1]) < 1e-4


@each_model
@pytest.mark.parametrize("grad", [True, False])
def test_bf16_stays_near(get: Callable[[str], tiny.Tiny], name: str, grad: bool) -> None:  # noqa: FBT001
    model, ids = get(name), tiny.token_ids(2, 40)
    with torch.set_grad_enabled(grad):  # without gradients a CPU takes a path of its own
        found = model.ours(torch.bfloat16).logits(ids)
    assert found.dtype == torch.bfloat16
    exact = model.theirs(ids).logits
    theirs = type(model.theirs)(model.theirs.config)
    theirs.load_state_dict(model.theirs.state_dict())
    rounded = theirs.to(torch.bfloat16).eval()(ids).logits.detach()
    # some tokens may change an expert: look at the middle one
    ours_off, theirs_off = ((x.float() - exact).norm(dim=-1) / exact.norm(dim=-1) for x in (found, rounded))
    assert ours_off.median() < 0.05
    assert ours_off.median() < 1.5 * theirs_off.median()


@each_model
def test_many_tokens(get: Callable[[str], tiny.Tiny], name: str) -> None:
    # products take rows in blocks: more rows than one block holds
    model, ids = get(name), tiny.token_ids(8, 60)
    with torch.no_grad():
        assert error(model.ours().logits(ids), model.theirs(ids).logits) < 2e-4


@each_moe
def test_routing_is_theirs(get: Callable[[str], tiny.Tiny], name: str) -> None:
    model, ids = get(name), tiny.token_ids(4, 16)
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    hooks = [
        block.mlp.gate.register_forward_hook(
            lambda _, inputs, outputs, layer=layer: seen.__setitem__(layer, (inputs[0], outputs[1], outputs[2]))
        )
        for layer, block in enumerate(model.theirs.model.layers)
    ]
    model.theirs(ids)
    for hook in hooks:
        hook.remove()
    assert len(seen) == model.spec.num_layers
    for layer, (x, scores, experts) in seen.items():
        spec = model.spec.layers[layer].mlp
        assert isinstance(spec, MoESpec)
        router = model.checkpoint.read(f"model.layers.{layer}.mlp.gate.weight")
        choice = route(x.reshape(-1, x.shape[-1]), {"mlp.gate.weight": router}, spec)
        assert choice.topk_ids_TK.equal(experts)
        assert choice.score_TK.dtype == torch.float32
        assert error(choice.score_TK, scores) < 1e-6
        total = choice.score_TK.sum(-1)
        is_whole = spec.normalize_top_k or spec.top_k == spec.num_experts
        assert (total.allclose(torch.ones(())) if is_whole else total.max() < 0.9999) or spec.top_k == 1


def test_top_k_is_renormalised_only_where_the_model_says_so(get: Callable[[str], tiny.Tiny]) -> None:
    for name, expected in (("olmoe", False), ("olmoe-normalised-clipped", True)):
        spec = get(name).spec.layers[0].mlp
        assert isinstance(spec, MoESpec)
        assert spec.normalize_top_k is expected


@each_model
def test_chunks_through_a_cache_give_the_same_logits(get: Callable[[str], tiny.Tiny], name: str) -> None:
    model, ids = get(name), tiny.token_ids(2, 17)
    decoder = model.ours()
    truth = decoder.logits(ids)
    for lengths in ((17,), (5, 1, 1, 10), (1,) * 17, (12, 5)):
        caches = [KeyValueCache() for _ in decoder.layers]
        parts = [decoder.logits(part, caches) for part in ids.split(list(lengths), 1)]
        assert error(torch.cat(parts, 1), truth) < 1e-4
        assert [cache.length for cache in caches] == [17] * len(caches)


@each_model
def test_greedy_generation_is_theirs(get: Callable[[str], tiny.Tiny], name: str) -> None:
    model, ids = get(name), tiny.token_ids(3, 6)
    theirs = model.theirs
    theirs.generation_config.eos_token_id = None
    truth = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
    assert model.ours().generate(ids, 16).equal(truth)
    # stop where a row says so: the others go on, the row is filled
    eos = int(truth[0, 9])
    truth = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    found = model.ours().generate(ids, 16, eos_id=eos)
    assert found.equal(truth)
    assert (found[0, 9:] == eos).all()


def test_generation_stops_when_all_rows_are_done(get: Callable[[str], tiny.Tiny]) -> None:
    decoder, ids = get("llama").ours(), tiny.token_ids(1, 4)
    free = decoder.generate(ids, 12)
    eos = int(free[0, 6])
    stopped = decoder.generate(ids, 12, eos_id=eos)
    first = free[0, 4:].tolist().index(eos) + 4
    assert stopped.equal(free[:, : first + 1])
    assert decoder.generate(ids, 0).equal(ids)


def test_sampling_follows_its_generator_and_temperature(get: Callable[[str], tiny.Tiny]) -> None:
    decoder, ids = get("olmoe").ours(), tiny.token_ids(4, 5)

    def sample(seed: int, temperature: float) -> Tensor:
        return decoder.generate(ids, 8, temperature=temperature, generator=torch.Generator().manual_seed(seed))

    assert sample(0, 1.0).equal(sample(0, 1.0))
    assert not sample(0, 1.0).equal(sample(1, 1.0))
    assert sample(0, 1e-4).equal(decoder.generate(ids, 8))


def test_shards_change_nothing(get: Callable[[str], tiny.Tiny], tmp_path: Path) -> None:
    for name in ("olmoe", "llama-tied-linear"):
        tiny.save(tmp_path / name, name, max_shard_size="20KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
        checkpoint = Checkpoint.open(tmp_path / name)
        decoder = load_decoder(tiny.Source(checkpoint), detect(checkpoint.config))
        ids = tiny.token_ids()
        assert decoder.logits(ids).equal(get(name).ours().logits(ids))


def test_the_window_hides_what_lies_before_it(get: Callable[[str], tiny.Tiny]) -> None:
    model = get("mistral")
    assert model.spec.layers[0].attention.sliding_window == 5
    ids = tiny.token_ids(1, 14)
    other = ids.clone()
    other[0, 0] = 3 + (ids[0, 0] - 2) % 90
    decoder = model.ours()
    moved = (decoder.logits(ids) - decoder.logits(other)).abs().amax(-1)[0]
    # two layers of windows of five: position 8 is the last that can know of position 0
    assert (moved[:9] > 0).all()
    assert moved[9:].max() == 0


@each_model
def test_the_future_is_hidden(get: Callable[[str], tiny.Tiny], name: str) -> None:
    ids = tiny.token_ids(1, 10)
    other = ids.clone()
    other[0, 6:] = ids[0, 6:].flip(0)
    decoder = get(name).ours()
    first, second = decoder.logits(ids), decoder.logits(other)
    assert error(first[:, :6], second[:, :6]) < 1e-5
    assert error(first[:, 6:], second[:, 6:]) > 1e-2


@each_model
def test_rows_of_a_batch_do_not_mix(get: Callable[[str], tiny.Tiny], name: str) -> None:
    ids, decoder = tiny.token_ids(3, 9), get(name).ours()
    together = decoder.logits(ids)
    for row in range(3):
        assert error(decoder.logits(ids[row : row + 1]), together[row : row + 1]) < 1e-4
