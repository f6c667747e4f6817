"""The walk of a quantization, shard after shard, wherever the weights lie and wherever the result goes.

Shapes: N sequences, L positions, D hidden.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alphaquant.compiled import leave_threads
from alphaquant.models import read_layer, read_outer
from alphaquant.pipeline.pace import out_of_memory
from alphaquant.pipeline.records import LayerRecord, require_finite
from alphaquant.pipeline.solving import QuantizedLayer
from alphaquant.pipeline.stream import chunks, embed, held_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from torch import Tensor

    from alphaquant.models import LayerWeights, TensorSource
    from alphaquant.pipeline.distributed import Stored
    from alphaquant.pipeline.layer import LayerQuantizer
    from alphaquant.pipeline.stream import HeldStream, Stream

__all__ = ["quantize_shards"]


def quantize_shards(
    quantizer: LayerQuantizer,
    source: TensorSource,
    ids_NL: Tensor | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    done: int = 0,
    streams: Mapping[str, Stored] | None = None,
    scratch: Path | None = None,
) -> Iterator[tuple[QuantizedLayer, dict[str, Stream]]]:
    """Quantize one layer after the other, and last what lies outside of them: embedding and head.

    Args:
        quantizer: of the model; it tells what happens and how long it took.
        source: the model's tensors.
        ids_NL: tokens to calibrate on; None rounds to nearest without any.
        device: where to compute.
        dtype: of weights and activations while they are worked on.
        done: layers that are quantized already.
        streams: what was given along with the last of them.
        scratch: where activations go if the quantizer's limits keep them out of memory; None: with temporary files.

    Yields:
        Codes and record of a shard, and by name all that the next layer takes from this one: it moves on in place.

    Raises:
        NumericsError: weights, activations, a Hessian or a loss are NaN or infinite.
    """
    spec, clock = quantizer.spec, quantizer.clock
    with clock("read"):
        outer = read_outer(source, spec, dtype, device)
    table_VD = outer["model.embed_tokens.weight"]
    embedding = quantizer.embedding(outer)
    behind: dict[str, Stream] = {}
    for name, stored in (streams or {}).items() if done else ():
        behind[name] = _read_in(stored, device, scratch, holds=quantizer.limits.holds_stream)
    if not done and ids_NL is not None:
        tables = {"quantized": outer["model.embed_tokens.weight"]}
        if quantizer.follows_original:
            tables["original"] = table_VD
        for name, table in tables.items():
            behind[name] = _embedded(ids_NL, table, scratch) if quantizer.limits.holds_stream else embed(ids_NL, table)

    def read(layer: int) -> LayerWeights:
        return read_layer(source, spec, layer, dtype, device)

    with closing(_ahead(read, range(done, spec.num_layers), reads_ahead=quantizer.limits.reads_ahead)) as layers:

        def quantize(layer: int) -> QuantizedLayer:
            quantizer.progress("read", layer, spec.num_layers)
            with clock("read"):
                weights = next(layers)
            with out_of_memory(f"layer {layer}"):
                return _checked(quantizer.layer(layer, weights, behind.get("quantized"), behind.get("original")))

        for layer in range(done, spec.num_layers):
            yield quantize(layer), behind  # no name here keeps weights or codes: they would lie beside the next layer's
    with out_of_memory("head"):
        head = quantizer.head(outer, behind.get("quantized"))
    record = LayerRecord(None, embedding.record.modules + head.record.modules)
    yield _checked(QuantizedLayer(embedding.quantized | head.quantized, record)), {}


def _ahead(
    read: Callable[[int], LayerWeights], layers: Iterable[int], *, reads_ahead: bool
) -> Generator[LayerWeights, None, None]:
    """What `read` gives for each layer; the next is read by a thread while one is worked on."""
    if not reads_ahead:
        yield from map(read, layers)
        return
    with ThreadPoolExecutor(1, initializer=leave_threads) as pool:
        coming: list[Future[LayerWeights]] = []
        for layer in layers:
            coming.append(pool.submit(read, layer))
            if len(coming) > 1:
                yield coming.pop(0).result()
        while coming:
            yield coming.pop().result()


def _read_in(stored_NLD: Stored, device: torch.device, scratch: Path | None, *, holds: bool) -> Stream:
    shape, dtype = stored_NLD.shape, stored_NLD.dtype
    x_NLD = _empty(shape, dtype, device, scratch) if holds else torch.empty(shape, dtype=dtype, device=device)
    for cut in chunks(*shape[:2]):
        x_NLD[cut] = stored_NLD[cut]
    return x_NLD


def _embedded(ids_NL: Tensor, table_VD: Tensor, scratch: Path | None) -> HeldStream:
    held = _empty((*ids_NL.shape, table_VD.shape[1]), table_VD.dtype, table_VD.device, scratch)
    for cut in chunks(*ids_NL.shape):
        held[cut] = embed(ids_NL[cut], table_VD)
    return held


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, scratch: Path | None) -> HeldStream:
    sequences, length, hidden = shape
    return held_stream((sequences, length, hidden), dtype, device, scratch or Path(tempfile.gettempdir()))


def _checked(result: QuantizedLayer) -> QuantizedLayer:
    require_finite(result.record)
    return result
