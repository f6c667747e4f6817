"""Rotated models are the same functions: every family, and every kind of rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from alphaquant.errors import ConfigError
from alphaquant.models import (
    MoESpec,
    Rotation,
    RotationKind,
    detect,
    expert_choice,
    load_decoder,
    logical,
    rotated,
)
from alphaquant.models.rotate import Turn
from alphaquant.numerics import bf16_products

from . import tiny
from .families import DEEPSEEKS, MODELS, zoo

if TYPE_CHECKING:
    from collections.abc import Callable

    from alphaquant.models import Decoder

    from .families import Made

KINDS = [RotationKind.HADAMARD, RotationKind.BLOCK]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="session")
def get(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    return zoo(tmp_path_factory.mktemp("rotated"))


def turned(made: Made, kind: RotationKind, seed: int = 0) -> Decoder:
    model = made.tiny
    source, spec = rotated(logical(model.checkpoint, model.spec), model.spec, Rotation(kind, seed))
    return load_decoder(source, spec, torch.float32)


@torch.no_grad()
@each_kind
@pytest.mark.parametrize("name", [*MODELS, *DEEPSEEKS])
def test_logits_stay_and_weights_do_not(get: Callable[[str], Made], name: str, kind: RotationKind) -> None:
    made, ids = get(name), tiny.token_ids(vocab_size=128)
    plain, found = made.tiny.ours(), turned(made, kind)
    truth = plain.logits(ids)
    assert truth.std() > 0.5
    assert float((found.logits(ids) - truth).abs().max()) < 1e-4
    assert not found.spec.tie_embeddings
    for before, after, layer in zip(plain.layers, found.layers, plain.spec.layers, strict=True):
        same = {key for key in before if torch.equal(before[key], after[key])}
        # what neither reads nor writes the residual stream, and no value
        kept = ("q_norm.weight", "k_norm.weight", "a_layernorm.weight", "q_b_proj.weight", "bias")
        assert all(key.endswith(kept) for key in same), same
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            assert torch.equal(after[norm], torch.ones_like(after[norm]))
        if isinstance(layer.mlp, MoESpec):
            assert before["mlp.gate.weight"].shape == after["mlp.gate.weight"].shape


@torch.no_grad()
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "qwen2_moe"])
def test_routers_choose_the_same(get: Callable[[str], Made], name: str) -> None:
    made = get(name)
    plain, found = made.tiny.ours(), turned(made, RotationKind.HADAMARD)
    layer = next(i for i, one in enumerate(plain.spec.layers) if isinstance(one.mlp, MoESpec))
    x = torch.randn(4, 16, plain.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    turn = Turn(plain.spec.hidden_size, None, torch.Generator().manual_seed(0))
    here = expert_choice(x, plain.layers[layer], plain.spec, layer)
    there = expert_choice(turn(x.flatten(0, 1)).view(x.shape), found.layers[layer], found.spec, layer)
    assert torch.equal(here.topk_ids_TK, there.topk_ids_TK)


@pytest.mark.parametrize("size", [1, 2, 16, 24, 90, 576, 2880])
@pytest.mark.parametrize("skip", [0, 5])
def test_turns_are_orthogonal_and_spread(size: int, skip: int) -> None:
    turn = Turn(size, None, torch.Generator().manual_seed(1)).behind(skip)
    turned_II = turn(torch.eye(2 * (skip + size)))
    assert torch.allclose(turned_II @ turned_II.T, torch.eye(len(turned_II)), atol=1e-5)
    once, again = turned_II[: skip + size, : skip + size], turned_II[skip + size :, skip + size :]
    assert torch.equal(once, again), "alike for each part of a row"
    assert torch.equal(once[:skip, :skip], torch.eye(skip))
    if size & (size - 1) == 0:
        assert torch.allclose(once[skip:, skip:].abs(), torch.full((size, size), size**-0.5))
    assert torch.equal(once, Turn(size, None, torch.Generator().manual_seed(1)).behind(skip)(torch.eye(skip + size)))
    if size > 16:
        assert not torch.equal(
            once, Turn(size, None, torch.Generator().manual_seed(2)).behind(skip)(torch.eye(skip + size))
        )


def test_blocks_turn_by_themselves() -> None:
    turned_II = Turn(96, 32, torch.Generator().manual_seed(0))(torch.eye(96))
    same = torch.block_diag(*torch.ones(3, 32, 32)).bool()
    assert torch.equal(turned_II != 0, same)
    with pytest.raises(ConfigError, match="blocks of 32 do not divide 72 channels"):
        Turn(72, 32, torch.Generator())


def test_clipped_values_do_not_turn(get: Callable[[str], Made]) -> None:
    made = get("olmoe")
    spec = detect(made.tiny.checkpoint.config | {"clip_qkv": 0.1})
    source = logical(made.tiny.checkpoint, spec)
    plain = load_decoder(source, spec, torch.float32)
    found = load_decoder(*rotated(source, spec, Rotation(RotationKind.HADAMARD)), torch.float32)
    ids = tiny.token_ids(vocab_size=128)
    assert float((found.logits(ids) - plain.logits(ids)).abs().max()) < 1e-4


def test_layers_for_multi_token_prediction_are_refused(get: Callable[[str], Made]) -> None:
    made = get("deepseek_v3")
    spec = detect(made.tiny.checkpoint.config | {"num_nextn_predict_layers": 1})

    class WithLayer:
        def names(self) -> tuple[str, ...]:
            return (*made.tiny.checkpoint.names(), "model.layers.3.enorm.weight")

    with pytest.raises(ConfigError, match="multi-token prediction read the residual stream"):
        rotated(WithLayer(), spec, Rotation(RotationKind.HADAMARD))  # type: ignore[arg-type]


def test_turns_are_exact_where_products_are_bf16() -> None:
    """Another thread may compute so while a layer is read."""
    x, turn = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), Turn(64, None, torch.Generator())
    truth = turn(x)
    with bf16_products(x.bfloat16()):
        assert torch.equal(turn(x), truth)
