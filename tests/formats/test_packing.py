"""The bit stream, against one big Python integer a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.errors import AlphaQuantError
from alphaquant.formats import FORMATS, encode, pack_int32, pack_rows, unpack_int32, unpack_rows


def stream(codes: list[int], bits: int, unit_bytes: int) -> bytes:
    """The row as one big integer, code i shifted by i * bits, written little-endian in whole units."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    units = -(-len(codes) * bits // (8 * unit_bytes))
    return number.to_bytes(units * unit_bytes, "little")


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.integers(1, 8))
    width = draw(st.integers(1, 41))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=width, max_size=width)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


@given(rows_of_codes())
def test_any_width_packs_as_one_big_integer_and_unpacks(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.uint8
    assert [bytes(row) for row in packed.tolist()] == [stream(row, bits, 1) for row in rows]
    assert unpack_rows(packed, bits, codes.shape[-1]).equal(codes)
    words = pack_int32(codes, bits)
    assert words.dtype == torch.int32
    assert [b"".join(w.to_bytes(4, "little", signed=True) for w in row) for row in words.tolist()] == [
        stream(row, bits, 4) for row in rows
    ]
    assert unpack_int32(words, bits, codes.shape[-1]).equal(codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_leading_dimensions_and_strides_pack_row_by_row(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (2, 3, 4, 24), dtype=torch.uint8, generator=generator)
    before = codes.clone()
    packed, words = pack_rows(codes, bits), pack_int32(codes, bits)
    assert packed.is_contiguous()
    assert packed.shape == (2, 3, 4, 3 * bits)
    assert packed[1, 2, 3].equal(pack_rows(codes[1, 2, 3], bits))
    assert words[1, 2, 3].equal(pack_int32(codes[1, 2, 3], bits))
    assert unpack_rows(packed, bits, 24).equal(codes)
    assert unpack_int32(words, bits, 24).equal(codes)
    strided = codes.transpose(-1, -2)
    assert pack_rows(strided, bits).equal(pack_rows(strided.contiguous(), bits))
    assert pack_int32(strided, bits).equal(pack_int32(strided.contiguous(), bits))
    every_other = packed[:, :, ::2]
    assert unpack_rows(every_other, bits, 24).equal(codes[:, :, ::2])
    assert codes.equal(before)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_results_share_no_memory_with_inputs(bits: int) -> None:
    codes = torch.ones(1, 8, dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    unpacked = unpack_rows(packed, bits, 8)
    words = pack_int32(codes, bits)
    unpacked_words = unpack_int32(words, bits, 8)
    codes.zero_()
    assert packed.any()
    assert words.any()
    packed.zero_()
    words.zero_()
    assert unpacked.all()
    assert unpacked_words.all()


def test_known_bytes() -> None:
    fp6 = encode(torch.tensor([0.0, 0.125, 7.5, -7.5]), FORMATS["fp6"])
    assert pack_rows(fp6, 6).tolist() == [64, 240, 253]
    fp4 = encode(torch.tensor([0.5, -6.0, 1.0]), FORMATS["fp4"])
    assert pack_rows(fp4, 4).tolist() == [0xF1, 0x02]  # the first value in the low nibble
    assert pack_int32(fp4, 4).tolist() == [0x2F1]
    int4 = encode(torch.tensor([-8.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0]), FORMATS["int4"])
    assert pack_int32(int4, 4).tolist() == [0xF88888F0 - 2**32]


@pytest.mark.parametrize("rows", [0, 2])
def test_empty_rows(rows: int) -> None:
    codes = torch.zeros(rows, 0, dtype=torch.uint8)
    for bits in (3, 8):
        assert pack_rows(codes, bits).shape == (rows, 0)
        assert pack_int32(codes, bits).shape == (rows, 0)
        assert unpack_rows(pack_rows(codes, bits), bits, 0).shape == (rows, 0)
        assert unpack_int32(pack_int32(codes, bits), bits, 0).shape == (rows, 0)


def test_misuse_is_refused() -> None:
    codes = torch.tensor([[1, 8]], dtype=torch.uint8)
    with pytest.raises(AlphaQuantError, match="code 8 does not fit 3 bits"):
        pack_rows(codes, 3)
    with pytest.raises(AlphaQuantError, match="9 bits"):
        pack_rows(codes, 9)
    with pytest.raises(AlphaQuantError, match="0 bits"):
        unpack_rows(codes, 0, 1)
    with pytest.raises(AlphaQuantError, match=r"expected torch\.uint8, got torch\.int32"):
        pack_rows(codes.int(), 4)
    with pytest.raises(AlphaQuantError, match=r"expected torch\.int32, got torch\.uint8"):
        unpack_int32(codes, 4, 2)
    with pytest.raises(AlphaQuantError, match="cannot hold 5 codes of 4 bits"):
        unpack_rows(codes, 4, 5)
    with pytest.raises(AlphaQuantError, match="cannot hold 8 codes of 4 bits"):
        unpack_int32(codes.int(), 4, 8)
