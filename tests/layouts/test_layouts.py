import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.errors import CheckpointError, PlanError
from alphaquant.formats import ScaleKind, dequantize, quantize
from alphaquant.layouts import LAYOUTS, DenseLayout, choose_layout, dense
from alphaquant.layouts.stored import exponent_scale, scale_exponent

from .samples import DTYPES, POWERS, all_schemes, assert_same, random_quantized, scheme

BLOCKS = [s for s in all_schemes((128,)) if s.format.block_rows > 1]
CODED = ("compressed-tensors", "humming", "gptq", "gptq_v2")


def round_trip(layout, q, module="model.layers.0.mlp.up_proj"):
    shape = tuple(q.codes.shape)
    stored = layout.tensors(module, q)
    assert set(stored) == set(layout.tensor_names(module, q.scheme))
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in stored.values())
    assert_same(layout.read(module, stored.__getitem__, q.scheme, shape), q)
    return stored


@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize("scheme", all_schemes(dtypes=DTYPES), ids=lambda s: f"{s}-{s.scale_dtype}")
def test_every_scheme_round_trips(layout, scheme):
    layout = LAYOUTS[layout]
    if layout.unsupported(scheme, (64, 384)) is None:
        round_trip(layout, random_quantized(scheme, 64, 384))
    else:
        # which takes every scheme of this shape whose rows have scales of their own
        assert layout.name != "humming" or scheme.format.block_rows > 1


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("scheme", BLOCKS, ids=str)
def test_blocks_keep_one_scale_for_all_their_rows(scheme, rows):
    q = random_quantized(scheme, rows, 256)
    stored = round_trip(LAYOUTS["compressed-tensors"], q)
    scale = stored["model.layers.0.mlp.up_proj.weight_scale"]
    assert scale.shape == (-(-rows // 128), 2)
    assert all(scale[row // 128].float().equal(q.scale[row]) for row in range(rows))
    with pytest.raises(PlanError, match="fp8_block is written in compressed-tensors"):
        LAYOUTS["humming"].tensors("m", q)
    assert "do not divide 192 inputs" in LAYOUTS["compressed-tensors"].unsupported(scheme, (rows, 192))


@settings(max_examples=80)
@given(
    st.sampled_from(CODED),
    st.sampled_from(all_schemes((-1, 1, 3, 16, 32))),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 2**32),
)
def test_every_shape_round_trips(layout, scheme, out_features, multiple, seed):
    in_features = multiple * (scheme.group_size if scheme.group_size > 0 else 7)
    layout, shape = LAYOUTS[layout], (out_features, in_features)
    q = random_quantized(scheme, *shape, seed)
    if layout.unsupported(scheme, shape) is None:
        round_trip(layout, q)
    else:
        with pytest.raises(PlanError, match="cannot hold"):
            layout.tensors("m", q)


@pytest.mark.parametrize("layout", CODED)
@pytest.mark.parametrize("scheme", all_schemes((-1, 32, 128)), ids=str)
def test_size_on_disk_is_what_the_scheme_says(layout, scheme):
    layout, shape = LAYOUTS[layout], (256, 512)
    if layout.unsupported(scheme, shape) is None:
        stored = layout.tensors("m", random_quantized(scheme, *shape))
        num_bytes = sum(t.nbytes for name, t in stored.items() if not name.endswith(("shape", "g_idx")))
        if scheme.symmetric:  # whose zero points GPTQ stores all the same
            num_bytes -= stored["m.qzeros"].nbytes if "m.qzeros" in stored else 0
        promised = scheme.bits_per_weight(*shape) * shape[0] * shape[1] / 8
        assert num_bytes == pytest.approx(promised, rel=0.01)


def test_tensors_need_not_be_contiguous_and_are_not_shared():
    q = random_quantized(scheme("int8"), 64, 64)
    sliced = type(q)(q.codes.T.contiguous().T, q.scale.T.contiguous().T, None, None, q.scheme)
    for layout in map(LAYOUTS.get, CODED):
        stored = layout.tensors("m", sliced)
        assert_same(layout.read("m", stored.__getitem__, q.scheme, (64, 64)), q)


def test_power_of_two_scales_are_exact_over_their_whole_range():
    exponents = torch.arange(255).to(torch.uint8)
    assert torch.equal(scale_exponent(POWERS), exponents)
    assert torch.equal(exponent_scale(exponents), POWERS)
    assert exponent_scale(torch.tensor([255], dtype=torch.uint8)).isinf().all()  # E8M0's NaN


@pytest.mark.parametrize("layout", ["compressed-tensors", "humming"])
@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp4", "fp8"])
def test_a_tensor_of_another_kind_is_refused(layout, name):
    layout = LAYOUTS[layout]
    chosen = scheme(name, -1 if name == "fp8" else None, symmetric=name != "int4")
    stored = layout.tensors("m", random_quantized(chosen, 64, 64))
    for key, tensor in stored.items():
        for wrong in (tensor.unsqueeze(0), tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.int32)):
            with pytest.raises(CheckpointError, match="implies") as caught:
                layout.read("m", {**stored, key: wrong}.__getitem__, chosen, (64, 64))
            assert caught.value.where == key
            assert caught.value.remedy


def test_a_matrix_of_another_shape_is_refused():
    layout, chosen = LAYOUTS["compressed-tensors"], scheme("int4", -1)
    stored = layout.tensors("m", random_quantized(chosen, 8, 63))  # 63 and 64 codes take the same words
    with pytest.raises(CheckpointError, match=r"\[8, 63\].*\[8, 64\]"):
        layout.read("m", stored.__getitem__, chosen, (8, 64))


# --- Which layout can hold what -------------------------------------------------------------------------------------

HELD_BY_COMPRESSED_TENSORS = {
    **{f"int{b} {g}{a}": True for b in (2, 3, 4, 6, 8) for g in ("channel", "g32") for a in ("", " asym")},
    **dict.fromkeys(("fp8 channel", "nvfp4 g16", "mxfp4 g32", "mxfp6 g32", "mxfp8 g32"), True),
    **dict.fromkeys(("int8 channel ×int8", "fp8 channel ×fp8", "fp8_block g128", "fp8_block g128 ×fp8"), True),
}


@pytest.mark.parametrize("scheme", [*all_schemes((-1, 16, 32)), *BLOCKS], ids=str)
def test_what_compressed_tensors_holds(scheme):
    reason = LAYOUTS["compressed-tensors"].unsupported(scheme, (64, 128))
    if scheme.format.kind.value == "int" and scheme.group_size == 16:
        assert reason is None
        return
    assert (reason is None) == HELD_BY_COMPRESSED_TENSORS.get(str(scheme), False)
    assert reason is None or scheme.format.name in reason or "rounds inputs" in reason


def test_humming_needs_whole_words():
    humming = LAYOUTS["humming"]
    assert humming.unsupported(scheme("int3", 16), (7, 32)) is None
    assert "48 inputs of 3 bits" in humming.unsupported(scheme("int3", 16), (7, 48))
    assert "7 outputs of 3 bits" in humming.unsupported(scheme("int3", 16, symmetric=False), (7, 32))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_groups_must_divide(layout):
    assert "do not divide 96" in layout.unsupported(scheme("int4", 64), (64, 96))
    with pytest.raises(PlanError) as caught:
        layout.tensors("m", type(q := random_quantized(scheme("int4", 32), 64, 96))(
            q.codes, q.scale, None, None, scheme("int4", 64)
        ))  # fmt: skip
    assert caught.value.where == "m"


def test_compressed_tensors_is_chosen_where_it_can():
    shapes = {"a": (64, 64), "b": (64, 64), "c": (64, 65)}
    assert choose_layout({"a": scheme("int4"), "b": scheme("nvfp4"), "d": None}, shapes).name == "compressed-tensors"
    assert choose_layout({"a": scheme("int4"), "b": scheme("fp6")}, shapes).name == "humming"
    assert choose_layout({"c": scheme("int4", -1)}, shapes).name == "compressed-tensors"
    with pytest.raises(PlanError, match=r"compressed-tensors not a .*fp6.*humming not c") as caught:
        choose_layout({"a": scheme("fp6"), "c": scheme("int4", -1)}, shapes)
    assert caught.value.remedy


# --- Humming's matrix scale, and the dense layout -------------------------------------------------------------------


@settings(max_examples=100)
@given(st.integers(0, 2**23 - 1), st.integers(-100, 100))
def test_any_global_scale_comes_back_and_loads_as_the_rounded_reciprocal(mantissa, exponent):
    humming, chosen = LAYOUTS["humming"], scheme("nvfp4")
    q = random_quantized(chosen, 1, 16)
    value = torch.tensor((1 + mantissa / 2**23) * 2.0**exponent, dtype=torch.float32)
    stored = round_trip(humming, type(q)(q.codes, q.scale, None, value, chosen))
    loaded = next(t for name, t in stored.items() if name.endswith("weight_scale_2")).float()
    assert torch.equal(loaded, value.reciprocal().reshape(1))  # what an engine copies into its float32 parameter


def test_float32_reciprocals_would_lose_global_scales():
    """Why the reciprocal is float64: two neighbours between sqrt(2) and 2 share their float32 reciprocal."""
    bits = torch.arange(0x3FF00000, 0x3FF00100, dtype=torch.int32)
    assert bits.view(torch.float32).reciprocal().unique().numel() < bits.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["int3", "mxfp6_e3m2", "nvfp4"])
@pytest.mark.parametrize("at_once", [32, 192, 1 << 20])
def test_dense_is_the_dequantized_weight(name, dtype, at_once, monkeypatch):
    monkeypatch.setattr(dense, "_AT_ONCE", at_once)
    q = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), scheme(name))
    stored = DenseLayout(dtype).tensors("m.up_proj", q)
    assert list(stored) == list(DenseLayout(dtype).tensor_names("m.up_proj", q.scheme)) == ["m.up_proj.weight"]
    assert stored["m.up_proj.weight"].dtype == dtype
    assert torch.equal(stored["m.up_proj.weight"], dequantize(q, dtype))


def test_dense_keeps_no_codes():
    with pytest.raises(CheckpointError, match="keeps no codes"):
        LAYOUTS["dense"].read("m", {}.__getitem__, scheme("int4"), (64, 64))
    assert LAYOUTS["dense"].quantization_config({"m": scheme("int4")}) is None


@pytest.mark.parametrize("layout", CODED)
def test_nothing_quantized_means_no_config(layout):
    assert LAYOUTS[layout].quantization_config({"a": None, "lm_head": None}) is None


def test_stored_scale_types():
    expected = {
        ("compressed-tensors", ScaleKind.E8M0): torch.uint8,
        ("humming", ScaleKind.E8M0): torch.float8_e8m0fnu,
        ("compressed-tensors", ScaleKind.E4M3): torch.float8_e4m3fn,
        ("humming", ScaleKind.E4M3): torch.float8_e4m3fn,
    }
    for (layout, kind), dtype in expected.items():
        name = "mxfp4" if kind is ScaleKind.E8M0 else "nvfp4"
        assert LAYOUTS[layout].tensors("m", random_quantized(scheme(name), 64, 64))["m.weight_scale"].dtype == dtype
    for layout in ("compressed-tensors", "humming"):
        for dtype in DTYPES:
            q = random_quantized(scheme("int4", dtype=dtype), 64, 64)
            assert LAYOUTS[layout].tensors("m", q)["m.weight_scale"].dtype == dtype


# --- GPTQ -----------------------------------------------------------------------------------------------------------


def test_what_gptq_holds():
    for chosen in all_schemes((-1, 16, 32)):
        is_integer = chosen.format.name in ("int2", "int3", "int4", "int8") and chosen.activation.value == "bf16"
        for version in ("gptq", "gptq_v2"):
            reason = LAYOUTS[version].unsupported(chosen, (64, 64))
            is_held = is_integer and (chosen.symmetric or version == "gptq_v2")
            assert (reason is None) == is_held, (str(chosen), version)
    v1, v2 = (LAYOUTS[version] for version in ("gptq", "gptq_v2"))
    assert "gptq_v2" in v1.unsupported(scheme("int4", symmetric=False), (64, 64))
    assert "48 inputs" in v1.unsupported(scheme("int3", 16), (64, 48))
    assert "36 outputs" in v2.unsupported(scheme("int4", 32), (36, 64))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "g_idx", "scales"])
def test_a_gptq_tensor_that_does_not_belong_is_refused(version, leaf):
    layout, chosen = LAYOUTS[version], scheme("int4", 32)
    stored = layout.tensors("m", random_quantized(chosen, 64, 64))
    wrong = stored[f"m.{leaf}"].flip(-1).clone() if leaf == "g_idx" else stored[f"m.{leaf}"] + 1
    if leaf in ("qweight", "scales"):
        wrong = wrong.double()
    with pytest.raises(CheckpointError) as caught:
        layout.read("m", {**stored, f"m.{leaf}": wrong}.__getitem__, chosen, (64, 64))
    assert caught.value.where == f"m.{leaf}"
    assert caught.value.remedy


def test_gptq_scales_are_half_where_nothing_is_lost():
    for exponent, dtype in ((-17, torch.float16), (-18, torch.bfloat16), (15, torch.float16), (16, torch.bfloat16)):
        q = random_quantized(scheme("int4", 32), 32, 32)
        scale = torch.full((32, 1), 1.9921875 * 2.0**exponent)  # eight significant bits
        q = type(q)(q.codes, scale, None, None, q.scheme)
        assert round_trip(LAYOUTS["gptq"], q)["model.layers.0.mlp.up_proj.scales"].dtype == dtype
