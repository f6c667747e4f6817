"""What happens inside a run, seen from outside: the stream and the weights of each layer, and every forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from alphaquant.pipeline import layer as layer_module
from alphaquant.pipeline import stream

if TYPE_CHECKING:
    import pytest
    from torch import Tensor

    from alphaquant.formats import QuantizedTensor
    from alphaquant.models import LayerWeights


class Pass(NamedTuple):
    """One half-layer on one chunk: which half, of which layer, with a tap or not, and its input `[B, L, D]`."""

    half: str
    layer: int
    is_tapped: bool
    x: Tensor


@dataclass
class Spy:
    """Everything seen of one run, by layer."""

    before: dict[int, Tensor] = field(default_factory=dict)
    after: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, LayerWeights] = field(default_factory=dict)
    quantized: dict[str, QuantizedTensor] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Spy:
        """Watch the runs that follow."""
        original = layer_module.LayerQuantizer.layer

        def layer(quantizer, index, weights, x_NLD, *others):
            if x_NLD is not None:
                self.before[index] = x_NLD.clone()
            result = original(quantizer, index, weights, x_NLD, *others)
            if x_NLD is not None:
                self.after[index] = x_NLD.clone()
            self.weights[index] = weights
            self.quantized |= result.quantized
            return result

        monkeypatch.setattr(layer_module.LayerQuantizer, "layer", layer)
        for name in ("attention_half", "mlp_half"):
            monkeypatch.setattr(stream, name, self._watch(name, getattr(stream, name)))
        return self

    def _watch(self, name, function):
        def half(x, weights, spec, layer, *args, tap=None, **kwargs):
            self.passes.append(Pass(name.removesuffix("_half"), layer, tap is not None, x.clone()))
            return function(x, weights, spec, layer, *args, tap=tap, **kwargs)

        return half
