"""Checkpoints of other tools: their bytes, made here by hand, come back as the weights that they stand for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import alphaquant
from alphaquant.errors import CheckpointError
from alphaquant.formats import pack_int32
from alphaquant.layouts import QuantizedCheckpoint, open_source
from pipeline import tiny

O, I, G = 64, 128, 32  # noqa: E741  (outputs, inputs, group)
RNG = torch.Generator().manual_seed(0)


def draw(high, *shape):
    return torch.randint(0, high, shape, generator=RNG)


def scales(*shape, dtype=torch.bfloat16):
    return torch.rand(shape, generator=RNG).add(0.5).to(dtype)


def write(directory, tensors, quantization):
    directory.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return directory


def compressed(fmt, weights, targets=("Linear",), **group):
    group = {"targets": list(targets), "weights": weights, "input_activations": None, **group}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": {"group_0": group}, "ignore": []}


def ints(bits, **more):
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": G} | more


def in_words(codes, bits):
    """As before version 0.18: whole codes in each word, from the lowest bits, the rest of the word empty."""
    a_word = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[-1] % a_word)).unflatten(-1, (-1, a_word))
    words = (padded << torch.arange(a_word) * bits).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


# --- compressed-tensors ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, olmoe):
    out = tmp_path_factory.mktemp("peers") / "out"
    tiny.quantize(olmoe, out, tiny.SERVED_PLAN, None, layout="compressed-tensors")
    return out


def test_ours_without_our_table_reads_the_same(run, tmp_path):
    """Seven formats by what config.json says alone."""
    ours = QuantizedCheckpoint.open(run)
    peer = shutil.copytree(run, tmp_path / "peer", ignore=shutil.ignore_patterns("alphaquant"))
    theirs = open_source(peer)
    assert theirs.names() == ours.names()
    for name in ours.names():
        assert (theirs.shape(name), theirs.info(name)) == (ours.shape(name), ours.info(name))
        assert torch.equal(theirs.read(name), ours.read(name)), name
    ids = tiny.token_ids()
    assert torch.equal(alphaquant.load(peer).logits(ids), alphaquant.load(run).logits(ids))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("pack", [pack_int32, in_words], ids=["stream", "words"])
def test_packed_integers_with_zero_points_and_groups_in_any_order(tmp_path, bits, pack):
    codes, zero, order = draw(1 << bits, O, I), draw(1 << bits, O, I // G), draw(I // G, I)
    scale = scales(O, I // G)
    tensors = {
        "m.weight_packed": pack(codes.byte(), bits),
        "m.weight_shape": torch.tensor([O, I]),
        "m.weight_scale": scale,
        "m.weight_zero_point": pack(zero.byte().T.contiguous(), bits).T,
        "m.weight_g_idx": order.int(),
        "m.bias": scales(O),
    }
    source = open_source(write(tmp_path / "c", tensors, compressed("pack-quantized", ints(bits, symmetric=False))))
    expected = (codes - zero[:, order]).float() * scale.float()[:, order]
    assert source.names() == ("m.bias", "m.weight")
    assert torch.equal(source.read("m.weight"), expected)
    out = torch.empty(O, I, dtype=torch.bfloat16)
    source.read_into("m.weight", out)
    assert torch.equal(out, expected.bfloat16())


INT4 = compressed("pack-quantized", ints(4))
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


@pytest.mark.parametrize(
    ("weights", "scale", "spread"),
    [
        (FP8 | {"strategy": "tensor"}, scales(1), lambda s: s.expand(O, I)),
        (FP8 | {"strategy": "channel"}, scales(O, 1), lambda s: s.expand(O, I)),
        (FP8 | {"strategy": "channel"}, scales(O), lambda s: s[:, None].expand(O, I)),
        (FP8 | {"strategy": "block", "block_structure": [48, 96]}, scales(2, 2),
         lambda s: s.repeat_interleave(48, 0)[:O].repeat_interleave(96, 1)[:, :I]),
        (FP8 | {"strategy": "group", "group_size": G}, scales(O, I // G), lambda s: s.repeat_interleave(G, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_plain_bytes_under_scales_of_every_extent(tmp_path, dtype, weights, scale, spread):
    values = (draw(200, O, I) - 100).float().to(dtype)
    tensors = {"m.weight": values, "m.weight_scale": scale}
    fmt = "int-quantized" if dtype == torch.int8 else "naive-quantized"
    source = open_source(write(tmp_path / "c", tensors, compressed(fmt, weights)))
    assert torch.equal(source.read("m.weight"), values.float() * spread(scale.float()))


@pytest.mark.parametrize(
    ("tensors", "quantization", "says"),
    [
        ({}, compressed("marlin-24", ints(4)), "the format 'marlin-24' is not read"),
        ({}, compressed("pack-quantized", ints(4), input_activations={"num_bits": 8}), "rounds the inputs"),
        ({}, compressed("pack-quantized", None), "its group has no weights"),
        ({}, {"quant_method": "compressed-tensors"}, "no config_groups"),
        ({}, {**compressed("pack-quantized", ints(4)), "config_groups": {}}, "no config group"),
        ({"m.weight_packed": torch.zeros(O, 3, dtype=torch.int32)}, INT4, "does not hold 64 x 128"),
        ({"m.weight_packed": torch.zeros(O, 16)}, INT4, "weight_packed is float32, not int32"),
        ({"m.weight_scale": scales(3, 4)}, INT4, "do not fit 64 x 128 weights"),
        ({}, compressed("pack-quantized", ints(9)), "have 9 bits"),
        ({}, compressed("pack-quantized", ints(4, symmetric=False)), "there is no weight_zero_point"),
        ({}, {"quant_method": "awq"}, "quantized already, by 'awq'"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path, tensors, quantization, says):
    stored = {
        "m.weight_packed": pack_int32(draw(16, O, I).byte(), 4),
        "m.weight_shape": torch.tensor([O, I]),
        "m.weight_scale": scales(O, I // G),
    }
    with pytest.raises(CheckpointError, match=says) as error:
        open_source(write(tmp_path / "c", stored | tensors, quantization)).read("m.weight")
    assert error.value.remedy


# --- GPTQ -----------------------------------------------------------------------------------------------------------


def gptq(bits, *, v2, act_order, **changed):
    """Tensors as AutoGPTQ packs them, and the weight [O, I] that they stand for."""
    codes_IO, zero_GO, scale_GO = (
        draw(1 << bits, I, O),
        draw(1 << bits, I // G, O),
        scales(I // G, O, dtype=torch.float16),
    )
    group_I = draw(I // G, I) if act_order else torch.arange(I) // G
    stored_zero = zero_GO if v2 else (zero_GO - 1) % (1 << bits)
    tensors = {
        "m.qweight": pack_int32(codes_IO.T.contiguous().byte(), bits).T,
        "m.qzeros": pack_int32(stored_zero.byte(), bits),
        "m.scales": scale_GO,
        "m.g_idx": group_I.int(),
    }
    return tensors | changed, ((codes_IO - zero_GO[group_I]).float() * scale_GO.float()[group_I]).T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(tmp_path, bits, v2, act_order):
    tensors, expected = gptq(bits, v2=v2, act_order=act_order)
    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": G,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    rules = {"-:other": {}, "+:^m$": {"bits": bits}}
    source = open_source(write(tmp_path / "c", tensors, quantization | {"dynamic": rules}))
    assert (source.names(), source.shape("m.weight")) == (("m.weight",), (O, I))
    assert torch.equal(source.read("m.weight"), expected)
    if not act_order:
        del tensors["m.g_idx"]
        assert torch.equal(
            open_source(write(tmp_path / "d", tensors, quantization | {"bits": bits})).read("m.weight"), expected
        )


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"m.g_idx": torch.full((I,), I // G, dtype=torch.int32)}, "g_idx does not give one of 4 groups"),
        ({"m.scales": scales(4, 3, dtype=torch.float16)}, "do not fit 64 outputs"),
        ({"m.qzeros": torch.zeros(4, 3, dtype=torch.int32)}, "does not hold 4 x 64 zero points"),
        ({"m.qweight": torch.zeros(16, O)}, "qweight is float32, not int32"),
    ],
)
def test_damaged_gptq_is_named(tmp_path, changed, says):
    tensors, _ = gptq(4, v2=False, act_order=False, **changed)
    with pytest.raises(CheckpointError, match=says):
        open_source(write(tmp_path / "c", tensors, {"quant_method": "gptq", "bits": 4})).read("m.weight")


def test_a_checkpoint_that_is_not_what_it_says(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor of it is quantized"):
        open_source(write(tmp_path / "c", {"m.weight": scales(O, I)}, {"quant_method": "gptq", "bits": 4}))


def test_a_gptq_model_computes(tmp_path, llama):
    """The same codes under GPTQ's names: the same logits."""
    tiny.quantize(llama, tmp_path / "out", "int4:g32", None)
    ours = QuantizedCheckpoint.open(tmp_path / "out")
    peer = tmp_path / "peer"
    shutil.copytree(llama, peer)
    tensors = load_file(peer / "model.safetensors")
    for module in ours.modules:
        q = ours.read_quantized(module)
        del tensors[f"{module}.weight"]
        tensors[f"{module}.qweight"] = pack_int32(q.codes, 4).T.contiguous()
        tensors[f"{module}.qzeros"] = pack_int32(torch.full(q.scale.T.shape, 7, dtype=torch.uint8), 4)
        tensors[f"{module}.scales"] = q.scale.T.contiguous()
    save_file(tensors, peer / "model.safetensors")
    config = json.loads((peer / "config.json").read_text())
    (peer / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    ids = tiny.token_ids()
    assert torch.equal(alphaquant.load(peer).logits(ids), alphaquant.load(tmp_path / "out").logits(ids))
