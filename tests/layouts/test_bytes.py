"""The stored bytes of small matrices, worked out by hand."""

import torch

from alphaquant.formats import QuantizedTensor, encode
from alphaquant.layouts import LAYOUTS

from .samples import scheme

ONE = torch.ones(1, 1)


def stored(layout, q):
    return {name.removeprefix("m."): tensor for name, tensor in LAYOUTS[layout].tensors("m", q).items()}


def test_integers():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]], dtype=torch.uint8)
    q = QuantizedTensor(codes, ONE, None, None, scheme("int4", -1))
    word = torch.tensor([[0xF7654321 - (1 << 32)]], dtype=torch.int32)
    packed = stored("compressed-tensors", q)
    assert packed.keys() == {"weight_packed", "weight_scale", "weight_shape"}
    assert torch.equal(packed["weight_packed"], word)
    assert torch.equal(packed["weight_shape"], torch.tensor([1, 8]))
    assert torch.equal(packed["weight_scale"], ONE.bfloat16())
    assert torch.equal(stored("humming", q)["weight"], word)


def test_zero_points_lie_along_the_outputs():
    zero = torch.arange(16, dtype=torch.uint8).reshape(8, 2)  # group 0: 0, 2 .. 14; group 1: 1, 3 .. 15
    q = QuantizedTensor(
        torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 2), zero, None, scheme("int4", 32, symmetric=False)
    )
    expected = torch.tensor([[0xECA86420 - (1 << 32), 0xFDB97531 - (1 << 32)]], dtype=torch.int32)
    assert torch.equal(stored("compressed-tensors", q)["weight_zero_point"], expected)
    assert torch.equal(stored("humming", q)["zero_point"], expected)


def test_integers_of_rounded_inputs_are_plain_bytes():
    codes = torch.tensor([[0, 1, 127, 128, 129, 255, 128, 128]], dtype=torch.uint8)
    chosen = scheme("int8", -1, inputs="int8")
    plain = stored("compressed-tensors", QuantizedTensor(codes, ONE, None, None, chosen))
    assert plain.keys() == {"weight", "weight_scale"}
    assert plain["weight"].dtype == torch.int8
    assert plain["weight"].tolist() == [[-128, -127, -1, 0, 1, 127, 0, 0]]


def test_floats():
    values = torch.tensor([[0, 0.125, 7.5, -7.5] * 8])
    chosen = scheme("mxfp6")
    q = QuantizedTensor(encode(values, chosen.format), ONE / 4, None, None, chosen)
    packed = stored("compressed-tensors", q)
    assert packed["weight_packed"][0, :3].tolist() == [64, 240, 253]
    assert packed["weight_scale"].tolist() == [[125]]
    assert stored("humming", q)["weight_scale"].view(torch.uint8).tolist() == [[125]]
    assert stored("humming", q)["weight"].view(torch.uint8)[0, :3].tolist() == [64, 240, 253]


def test_nvfp4_keeps_both_scales():
    values = torch.tensor([[0.5, -6.0] * 8])
    chosen = scheme("nvfp4")
    q = QuantizedTensor(encode(values, chosen.format), ONE * 1.125, None, torch.tensor(4.0), chosen)
    packed = stored("compressed-tensors", q)
    assert packed["weight_packed"].tolist() == [[0xF1] * 8]
    assert packed["weight_scale"].float().tolist() == [[1.125]]
    assert packed["weight_global_scale"].tolist() == [4.0]
    assert stored("humming", q)["weight_scale_2"].tolist() == [0.25]


def test_fp8_is_torchs_own():
    values = torch.tensor([[448.0, -0.001953125, 1.0, 0.0]])
    for name in ("fp8", "fp8_e5m2"):
        chosen = scheme(name, -1)
        q = QuantizedTensor(encode(values, chosen.format), ONE, None, None, chosen)
        dtype = torch.float8_e4m3fn if name == "fp8" else torch.float8_e5m2
        assert torch.equal(stored("humming", q)["weight"].view(dtype).float(), values)
    assert torch.equal(stored("compressed-tensors", q := QuantizedTensor(
        encode(values, scheme("fp8", -1).format), ONE, None, None, scheme("fp8", -1)
    ))["weight"].float(), values)  # fmt: skip
    assert q.codes.dtype == torch.uint8
