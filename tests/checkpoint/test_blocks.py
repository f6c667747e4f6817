"""FP8 with scales for blocks: each weight against its own scale, and faults by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from alphaquant.checkpoint import BlockScaled, Checkpoint, unquantized
from alphaquant.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [4, 6]}
SHAPES = {"a.weight": (8, 12), "b.weight": (9, 13), "c.weight": (3, 5), "experts.gate_up_proj": (2, 10, 7)}


def tensors(scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {"norm.weight": torch.randn(5, generator=generator).bfloat16()}
    for name, shape in SHAPES.items():
        made[name] = torch.randn(shape, generator=generator).mul_(100).to(torch.float8_e4m3fn)
        blocks = (*shape[:-2], -(-shape[-2] // 4), -(-shape[-1] // 6))
        scale = torch.rand(blocks, generator=generator) + 0.1
        made[f"{name}_scale_inv"] = (scale if scale_dtype is torch.float32 else scale.log2().round().exp2()).to(
            scale_dtype
        )
    return made


def write(path: Path, made: dict[str, Tensor], quantization: Any = FP8, **config: Any) -> Checkpoint:
    path.mkdir()
    save_file(made, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization} | config))
    return Checkpoint.open(path)


def naive(weight: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty(weight.shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in weight.shape)).tolist():
        *leading, row, column = index
        at = (*leading, row // 4, column // 6)
        out[tuple(index)] = weight[tuple(index)].double() * scale[at].double()
    return out


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_each_weight_is_multiplied_with_the_scale_of_its_block(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    made = tensors(scale_dtype)
    source = unquantized(write(tmp_path / "model", made))
    assert isinstance(source, BlockScaled)
    assert source.names() == tuple(sorted(["norm.weight", *SHAPES]))
    assert "quantization_config" not in source.config
    for name, shape in SHAPES.items():
        truth = naive(made[name], made[f"{name}_scale_inv"].float())
        exact, rounded = torch.empty(shape), torch.empty(shape, dtype=torch.float16)
        source.read_into(name, exact)
        source.read_into(name, rounded)
        assert exact.double().allclose(truth, rtol=1e-6)
        assert rounded.equal(exact.half())
        assert source.read(name).equal(exact.bfloat16())
        info = source.info(name)
        assert (info.dtype, info.shape, info.num_bytes) == (torch.bfloat16, shape, 2 * exact.numel())
        assert source.shape(name) == shape
    assert source.read("norm.weight").equal(made["norm.weight"])
    assert source.info("norm.weight").num_bytes == 10
    into = torch.empty(5)
    source.read_into("norm.weight", into)
    assert into.equal(made["norm.weight"].float())
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        source.read_into("a.weight", torch.empty(12, 8))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_what_is_read_has_the_models_type(tmp_path: Path, key: str) -> None:
    for word, dtype in (("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        source = unquantized(write(tmp_path / word, tensors(), **{key: word}))
        assert source.read("b.weight").dtype is source.info("b.weight").dtype is dtype


def test_a_plain_checkpoint_is_itself(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "model", {"norm.weight": torch.ones(5)}, None)
    assert unquantized(checkpoint) is checkpoint


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ("quantized already", "'gptq'")),
        ({"quant_method": "compressed-tensors"}, ("quantized already", "'compressed-tensors'")),
        (FP8 | {"expert_dtype": "fp4"}, ("quantized already",)),
        ("fp4", ("quantized already", "'fp4'")),
        (FP8 | {"weight_block_size": None}, ("weight_block_size", "None")),
        (FP8 | {"weight_block_size": [128]}, ("weight_block_size", "[128]")),
        (FP8 | {"weight_block_size": [128, 0]}, ("weight_block_size", "[128, 0]")),
        (FP8 | {"weight_block_size": [True, 128]}, ("weight_block_size", "[True, 128]")),
        (FP8 | {"weight_block_size": "128"}, ("weight_block_size", "'128'")),
        (FP8 | {"weight_block_size": [128, 128]}, ("a.weight_scale_inv", "[2, 2]", "[1, 1]")),
    ],
)
def test_another_quantization_is_named(tmp_path: Path, quantization: Any, words: tuple[str, ...]) -> None:
    checkpoint = write(tmp_path / "model", tensors(), quantization)
    with pytest.raises(CheckpointError) as caught:
        unquantized(checkpoint)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.where
    assert caught.value.remedy


def test_fp8_without_scales_is_named(tmp_path: Path) -> None:
    made = tensors()
    del made["b.weight_scale_inv"]
    with pytest.raises(CheckpointError, match=r"b\.weight is FP8, .* no b\.weight_scale_inv"):
        unquantized(write(tmp_path / "none", made))
    vector = tensors() | {"b.weight": torch.ones(9).to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"b\.weight_scale_inv has shape \[3, 3\]"):
        unquantized(write(tmp_path / "vector", vector))
