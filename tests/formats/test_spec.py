"""Formats and schemes: names, sizes, and what is refused."""

from __future__ import annotations

import pytest
import torch

import alphaquant.formats as formats_module
from alphaquant.errors import PlanError
from alphaquant.formats import FORMATS, UNQUANTIZED, Activation, ElementKind, Inputs, ScaleKind, Scheme, parse_format


def scheme(name: str, group: int, **options: object) -> Scheme:
    return Scheme(FORMATS[name], group, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "bits"),
    [
        (scheme("mxfp4", 32), 4 + 8 / 32),
        (scheme("mxfp4", 64), 4 + 8 / 64),
        (scheme("mxfp6", 32), 6.25),
        (scheme("mxfp6_e3m2", 32), 6.25),
        (scheme("mxfp8", 32), 8.25),
        (scheme("mxfp8", -1), 8 + 8 / 256),
        (scheme("nvfp4", 16), 4.5 + 32 / (64 * 256)),
        (scheme("int4", 128), 4.125),
        (scheme("int4", 128, scale_dtype=torch.float32), 4.25),
        (scheme("int4", 128, symmetric=False), 4.125 + 4 / 128),
        (scheme("int3", 64, symmetric=False), 3 + 19 / 64),
        (scheme("int2", -1, symmetric=False), 2 + 18 / 256),
        (scheme("int8", -1), 8 + 16 / 256),
        (scheme("fp6", 128, scale_dtype=torch.float16), 6.125),
        (scheme("fp8", -1, scale_dtype=torch.float32), 8 + 32 / 256),
        (scheme("fp8_block", 128), 8 + 2 * 16 / (64 * 256)),  # of one block and half as many rows
    ],
)
def test_bits_per_weight_counts_scales_and_zero_points(made: Scheme, bits: float) -> None:
    assert made.bits_per_weight(64, 256) == bits


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (scheme("int4", 128), "int4 g128"),
        (scheme("int4", 128, symmetric=False), "int4 g128 asym"),
        (scheme("mxfp4", 32), "mxfp4 g32"),
        (scheme("fp8", -1), "fp8 channel"),
        (scheme("fp8_block", 128, activation=Activation.FP8), "fp8_block g128 ×fp8"),
    ],
)
def test_a_scheme_reads_as_people_write_it(made: Scheme, text: str) -> None:
    assert str(made) == text


def test_num_groups() -> None:
    assert scheme("int4", 128).num_groups(1024) == 8
    assert scheme("int4", -1).num_groups(1000) == 1
    assert scheme("mxfp8", 64).num_groups(128) == 2


def test_a_group_that_does_not_divide_names_sizes_that_do() -> None:
    with pytest.raises(PlanError, match="128 of int4 does not divide 10944") as caught:
        scheme("int4", 128).num_groups(10944)  # DeepSeek-MoE-16B's dense layer: 171 * 64
    assert "8, 16, 32, 64)" in str(caught.value)
    with pytest.raises(PlanError, match="another format"):
        scheme("nvfp4", 16).num_groups(40)
    with pytest.raises(PlanError, match="another format"):
        scheme("fp8_block", 128).num_groups(192)
    with pytest.raises(PlanError, match="no power of two"):
        scheme("int4", 32).bits_per_weight(4, 45)


@pytest.mark.parametrize("group", [0, -2])
def test_impossible_group_sizes_are_refused(group: int) -> None:
    with pytest.raises(PlanError, match=f"group size {group} "):
        scheme("int4", group)


@pytest.mark.parametrize("group", [8, 32, 256, -1])
@pytest.mark.parametrize(("name", "own"), [("nvfp4", 16), ("fp8_block", 128)])
def test_some_formats_take_their_own_group_only(name: str, own: int, group: int) -> None:
    with pytest.raises(PlanError, match=rf"(?s)group size {group} of {name} .*groups of {own} only"):
        scheme(name, group)


def test_inputs_are_rounded_in_groups_before_weights_in_blocks_alone() -> None:
    assert scheme("fp8_block", 128, activation=Activation.FP8).inputs == Inputs(Activation.FP8, 128)
    assert scheme("fp8_block", 128).inputs == scheme("int4", 128).inputs == Inputs()
    assert scheme("fp8", 128, activation=Activation.FP8).inputs == Inputs(Activation.FP8, -1)
    with pytest.raises(PlanError, match="int8 activations do not go with fp8_block"):
        scheme("fp8_block", 128, activation=Activation.INT8)


def test_only_integers_are_asymmetric() -> None:
    with pytest.raises(PlanError, match="fp6 cannot be asymmetric"):
        scheme("fp6", 32, symmetric=False)


def test_unknown_scale_dtype_is_refused() -> None:
    with pytest.raises(PlanError, match=r"torch\.int8"):
        scheme("int4", 32, scale_dtype=torch.int8)


def test_parse_format() -> None:
    assert parse_format("mxfp4") is FORMATS["mxfp4"]
    for name in UNQUANTIZED:
        assert parse_format(name) is None
    with pytest.raises(PlanError, match="unknown format 'MXFP44'") as caught:
        parse_format("MXFP44")
    assert "did you mean 'mxfp4'?" in str(caught.value)
    with pytest.raises(PlanError, match="known formats: int2") as caught:
        parse_format("zzzzzz")
    assert "did you mean" not in str(caught.value)


def test_the_catalogue() -> None:
    assert list(FORMATS) == [f.name for f in FORMATS.values()]
    assert set(FORMATS) == {
        *("int2", "int3", "int4", "int6", "int8", "fp4", "fp6", "fp6_e3m2", "fp8", "fp8_e5m2"),
        *("mxfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2", "nvfp4", "fp8_block"),
    }
    own_groups = {"nvfp4": 16, "fp8_block": 128}
    for name, fmt in FORMATS.items():
        floats = fmt.kind is ElementKind.FLOAT
        assert fmt.bits == (1 + fmt.exponent_bits + fmt.mantissa_bits if floats else int(name[3:]))
        assert fmt.native_group == (32 if name.startswith("mx") else own_groups.get(name))
        assert fmt.block_rows == (128 if name == "fp8_block" else 1)
        assert (fmt.scale is ScaleKind.E8M0) == name.startswith("mx")
        assert (fmt.scale is ScaleKind.E4M3) == (name == "nvfp4")
    assert FORMATS["fp6"].mantissa_bits == 3  # E2M3 unless it says otherwise


def test_public_names_are_sorted_and_exist() -> None:
    names = formats_module.__all__
    assert names == sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert all(hasattr(formats_module, name) for name in names)
