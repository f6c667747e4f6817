"""The walk of a quantization, shard after shard, wherever the weights lie and wherever the result goes.

Shapes: N sequences, L positions, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphaquant.models import read_layer, read_outer
from alphaquant.pipeline.layer import QuantizedLayer
from alphaquant.pipeline.records import LayerRecord, require_finite
from alphaquant.pipeline.stream import embed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Tensor

    from alphaquant.models import TensorSource
    from alphaquant.pipeline.layer import LayerQuantizer

__all__ = ["quantize_shards"]


def quantize_shards(
    quantizer: LayerQuantizer,
    source: TensorSource,
    ids_NL: Tensor | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    done: int = 0,
    streams: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[QuantizedLayer, dict[str, Tensor]]]:
    """Quantize one layer after the other, and last what lies outside of them: embedding and head.

    Args:
        quantizer: of the model; it tells what happens and how long it took.
        source: the model's tensors.
        ids_NL: tokens to calibrate on; None rounds to nearest without any.
        device: where to compute.
        dtype: of weights and activations while they are worked on.
        done: layers that are quantized already.
        streams: what was given along with the last of them.

    Yields:
        Codes and record of a shard, and by name all that the next layer takes from this one: it moves on in place.

    Raises:
        NumericsError: weights, activations, a Hessian or a loss are NaN or infinite.
    """
    spec, clock = quantizer.spec, quantizer.clock
    with clock("read"):
        outer = read_outer(source, spec, dtype, device)
    embedding = quantizer.embedding(outer)
    if done:
        behind = {name: stream.to(device) for name, stream in (streams or {}).items()}
    else:
        behind = {} if ids_NL is None else {"quantized": embed(ids_NL, outer["model.embed_tokens.weight"])}

    def quantize(layer: int) -> QuantizedLayer:
        quantizer.progress("read", layer, spec.num_layers)
        with clock("read"):
            weights = read_layer(source, spec, layer, dtype, device)
        return _checked(quantizer.layer(layer, weights, behind.get("quantized")))

    for layer in range(done, spec.num_layers):
        yield quantize(layer), behind  # no name here keeps weights or codes: they would lie beside the next layer's
    head = quantizer.head(outer, behind.get("quantized"))
    record = LayerRecord(None, embedding.record.modules + head.record.modules)
    yield _checked(QuantizedLayer(embedding.quantized | head.quantized, record)), {}


def _checked(result: QuantizedLayer) -> QuantizedLayer:
    require_finite(result.record)
    return result
