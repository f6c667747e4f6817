"""One scale for 128 rows of 128 inputs: against plain loops over the blocks, whole ones and cut ones."""

from __future__ import annotations

import pytest
import torch

from alphaquant.formats import FORMATS, Scheme, dequantize, encode, pool_rows, quantize, round_scale, round_to_grid

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCHEME = Scheme(FORMATS["fp8_block"], 128)
ROWS = [1, 127, 128, 129, 300]


def blocks(rows: int, columns: int) -> list[tuple[slice, slice]]:
    return [
        (slice(row, min(row + 128, rows)), slice(column, column + 128))
        for row in range(0, rows, 128)
        for column in range(0, columns, 128)
    ]


def weights(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * torch.randn(*shape[:-1], 1, generator=generator).exp()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_is_rounded_with_one_scale_that_covers_it(rows: int, dtype: torch.dtype) -> None:
    scheme = Scheme(FORMATS["fp8_block"], 128, scale_dtype=dtype)
    w_EOI = weights(2, rows, 384)
    q = quantize(w_EOI, scheme)
    assert q.scale.shape == (2, rows, 3)
    for expert in range(2):
        for place in blocks(rows, 384):
            w, found = w_EOI[expert][place], q.scale[expert, place[0], place[1].start // 128]
            scale = (w.abs().max() / 448).to(dtype).float()
            assert (found == scale).all()
            values = round_to_grid((w / scale), FORMATS["fp8"])
            assert q.codes[expert][place].equal(encode(values, FORMATS["fp8"]))
            assert dequantize(q)[expert][place].equal(values * scale)
    assert round_scale(q.scale, scheme).equal(q.scale)


def test_a_block_of_zeros_has_scale_one_and_its_neighbours_their_own() -> None:
    w = weights(256, 256)
    w[128:, :128] = 0
    w[128:255, 128:] = 0
    q = quantize(w, SCHEME)
    assert (q.scale[128:, 0] == 1).all()
    assert (dequantize(q)[128:, :128] == 0).all()
    assert (q.scale[128:, 1] == q.scale[255, 1]).all()
    assert (dequantize(q)[255, 128:] != 0).any()


@pytest.mark.parametrize("rows", ROWS)
def test_pooling_is_over_the_rows_of_a_block(rows: int) -> None:
    x = weights(2, rows, 3).abs()
    added, largest = pool_rows(x, SCHEME), pool_rows(x, SCHEME, torch.amax)
    for start in range(0, rows, 128):
        part = slice(start, start + 128)
        torch.testing.assert_close(added[:, part], x[:, part].sum(1, keepdim=True).expand_as(x[:, part]))
        assert largest[:, part].equal(x[:, part].amax(1, keepdim=True).expand_as(x[:, part]))
    assert pool_rows(x, Scheme(FORMATS["fp8"], 128)).equal(x)
