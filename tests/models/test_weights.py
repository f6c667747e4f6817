"""Reading weights: stacked as on disk, and damage is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from alphaquant.errors import AlphaQuantError, CheckpointError, NumericsError
from alphaquant.models import check_tensors, head_weight, load_decoder, read_layer, read_outer

from . import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

each_model = pytest.mark.parametrize("name", tiny.MODELS)
EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"


@pytest.fixture(scope="session")
def get(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tiny.Tiny]:
    return tiny.zoo(tmp_path_factory.mktemp("weights"))


def error_of(model: tiny.Tiny, changes: dict[str, Tensor | None]) -> AlphaQuantError:
    source = tiny.Source(model.checkpoint, changes)
    with pytest.raises(CheckpointError) as info:
        check_tensors(source, model.spec)
    with pytest.raises(CheckpointError):
        load_decoder(source, model.spec)
    return info.value


@each_model
def test_a_whole_checkpoint_passes(get: Callable[[str], tiny.Tiny], name: str) -> None:
    check_tensors(get(name).source, get(name).spec)


def test_a_missing_tensor_is_named(get: Callable[[str], tiny.Tiny]) -> None:
    for name in (EXPERT, "model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_norm.weight"):
        error = error_of(get("olmoe"), {name: None})
        assert name in str(error)
        assert "1 tensors" in str(error)
        assert "olmoe" in (error.where or "")
    error = error_of(get("llama-grouped-biased"), {"model.layers.0.mlp.up_proj.bias": None})
    assert "model.layers.0.mlp.up_proj.bias" in str(error)


def test_many_missing_tensors_are_counted_and_some_named(get: Callable[[str], tiny.Tiny]) -> None:
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(6)]
    error = error_of(get("olmoe"), dict.fromkeys(names))
    assert "6 tensors" in str(error)
    assert names[0] in str(error)
    assert "2 more" in str(error)


def test_a_misnamed_tensor_is_suggested(get: Callable[[str], tiny.Tiny]) -> None:
    other = EXPERT.replace("up_proj", "up_projection")
    error = error_of(get("olmoe"), {EXPERT: None, other: torch.zeros(24, 32)})
    assert EXPERT in str(error)
    assert f"did you mean {other}?" in (error.remedy or "")


def test_a_tensor_without_a_place_is_named(get: Callable[[str], tiny.Tiny]) -> None:
    for name, extra in (
        ("olmoe", "model.layers.1.mlp.shared_expert.up_proj.weight"),
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("mistral", "model.layers.2.input_layernorm.weight"),
    ):
        error = error_of(get(name), {extra: torch.zeros(32)})
        assert extra in str(error)
        assert "1 tensors" in str(error)
        assert "config.json" in (error.remedy or "")


def test_a_tied_models_head_and_old_buffers_may_lie_in_the_file(get: Callable[[str], tiny.Tiny]) -> None:
    model = get("llama-tied-linear")
    extra = {
        "lm_head.weight": torch.zeros(96, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    source = tiny.Source(model.checkpoint, extra)
    check_tensors(source, model.spec)
    ids = tiny.token_ids()
    assert load_decoder(source, model.spec).logits(ids).equal(model.ours().logits(ids))
    # an untied model reads its own head
    model = get("llama")
    zeros = tiny.Source(model.checkpoint, {"lm_head.weight": torch.zeros(96, 32)})
    assert load_decoder(zeros, model.spec).logits(ids).abs().max() == 0


def test_a_wrong_shape_is_named_with_both_shapes(get: Callable[[str], tiny.Tiny]) -> None:
    for name, shape, right in (
        (EXPERT, (32, 24), "[24, 32]"),
        ("model.layers.0.mlp.gate.weight", (7, 32), "[6, 32]"),
        ("model.embed_tokens.weight", (97, 32), "[96, 32]"),
        ("model.norm.weight", (32, 1), "[32]"),
        ("lm_head.weight", (96, 31), "[96, 32]"),
    ):
        error = error_of(get("olmoe"), {name: torch.zeros(shape)})
        assert name in str(error)
        assert str(list(shape)) in str(error)
        assert right in str(error)
        assert error.remedy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_no_number_is_named(get: Callable[[str], tiny.Tiny], value: float, dtype: torch.dtype) -> None:
    model = get("olmoe")
    for name in (EXPERT, "model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        bad = model.checkpoint.read(name)
        bad.view(-1)[-1] = value
        with pytest.raises(NumericsError) as info:
            load_decoder(tiny.Source(model.checkpoint, {name: bad}), model.spec, dtype)
        assert info.value.where == name


def test_infinities_that_cancel_are_found_and_large_numbers_pass(get: Callable[[str], tiny.Tiny]) -> None:
    model = get("olmoe")
    bad = model.checkpoint.read(EXPERT)
    bad[0, 0], bad[0, 1] = float("inf"), -float("inf")
    with pytest.raises(NumericsError):
        read_layer(tiny.Source(model.checkpoint, {EXPERT: bad}), model.spec, 1, torch.float32)
    bad[0, 0], bad[0, 1] = 3e38, 3e38  # their sum is infinite, they are not
    layer = read_layer(tiny.Source(model.checkpoint, {EXPERT: bad}), model.spec, 1, torch.float32)
    assert layer["mlp.experts.up_proj.weight"][4].equal(bad)


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_hold_what_is_on_disk(get: Callable[[str], tiny.Tiny], name: str, dtype: torch.dtype) -> None:
    model = get(name)
    for layer in range(model.spec.num_layers):
        weights = read_layer(model.source, model.spec, layer, dtype)
        parameters = model.spec.parameters(layer)
        assert list(weights) == [parameter.key for parameter in parameters]
        for parameter in parameters:
            found = weights[parameter.key]
            assert found.dtype == dtype
            stored = [model.checkpoint.read(each).to(dtype) for each in model.spec.tensor_names(layer, parameter)]
            if parameter.num_experts is None:
                assert found.equal(stored[0])
            else:
                assert found.shape == (parameter.num_experts, *parameter.shape)
                assert found.equal(torch.stack(stored))
    outer = read_outer(model.source, model.spec, dtype)
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    assert outer.keys() == (names if model.spec.tie_embeddings else names | {"lm_head.weight"})
    for key, tensor in outer.items():
        assert tensor.equal(model.checkpoint.read(key).to(dtype))
    head = "model.embed_tokens.weight" if model.spec.tie_embeddings else "lm_head.weight"
    assert head_weight(outer).equal(outer[head])


def test_the_dtype_of_the_config_is_the_default(get: Callable[[str], tiny.Tiny]) -> None:
    model = get("llama")
    assert model.ours().outer["model.norm.weight"].dtype == torch.float32
    assert model.ours(torch.float16).outer["model.norm.weight"].dtype == torch.float16
    assert model.ours().device == torch.device("cpu")
