"""Reading a layer's weights from a checkpoint, experts stacked `[E, O, I]` straight from disk."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from alphaquant.errors import CheckpointError, NumericsError
from alphaquant.models.decoder import Decoder
from alphaquant.models.linear import LayerWeights, as_served

if TYPE_CHECKING:
    from collections.abc import Mapping

    from alphaquant.checkpoint import TensorInfo
    from alphaquant.formats import Scheme
    from alphaquant.models.spec import ModelSpec, Parameter

__all__ = ["TensorSource", "check_tensors", "load_decoder", "logical", "read_layer", "read_outer", "unfused"]

# buffers that old checkpoints carry and that follow from the config
_KNOWN_BUFFERS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")

# projections that share a fused tensor, in its order
_FUSED = {
    "gate_proj": ("gate_proj", "up_proj"),
    "up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


class TensorSource(Protocol):
    """Anything that yields a checkpoint's tensors by name: plain, or de-quantizing as it reads."""

    def names(self) -> tuple[str, ...]:
        """All tensor names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and stored bytes of one tensor."""

    def read(self, name: str) -> Tensor:
        """One tensor in its own dtype; not to be written to, since it may share the source's memory."""

    def read_into(self, name: str, out: Tensor) -> None:
        """Read one tensor into `out`, cast to its dtype."""


def logical(source: TensorSource, spec: ModelSpec) -> TensorSource:
    """The checkpoint as the family writes it, checked: what every step of a pipeline reads.

    Experts may be stored one by one or fused; what is read has the family's names and one tensor for each expert.

    Raises:
        CheckpointError: names the missing, unread or misshapen tensors.
    """
    source = unfused(source, spec)
    check_tensors(source, spec)
    return source


class _Part(NamedTuple):
    """Where a logical tensor lies: in which stored one, and as which rows of which expert of it."""

    whole: str
    expert: int | None = None
    rows: slice = slice(None)


class _Unfused:
    """A source under the family's names, over one that fuses experts; see `unfused`.

    Experts that follow one another are cut from one reading of the fused tensor, which is kept until another is read.
    """

    def __init__(self, source: TensorSource, parts: Mapping[str, _Part], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._source, self._parts, self._shapes = source, parts, shapes
        self._kept: tuple[str, Tensor] | None = None

    def names(self) -> tuple[str, ...]:
        fused = {part.whole for part in self._parts.values()}
        return tuple(sorted({*self._source.names(), *self._parts} - fused))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._source.shape(name)

    def info(self, name: str) -> TensorInfo:
        if name not in self._parts:
            return self._source.info(name)
        whole, shape = self._source.info(self._parts[name].whole), self._shapes[name]
        return replace(whole, name=name, shape=shape, num_bytes=whole.num_bytes * prod(shape) // prod(whole.shape))

    def read(self, name: str) -> Tensor:
        part = self._parts.get(name) or _Part(name)
        if part.expert is None:
            return self._source.read(part.whole)
        kept = self._kept  # another thread may replace it
        if kept is None or kept[0] != part.whole:
            kept = self._kept = None  # before the next is made, so that two never lie in memory
            kept = self._kept = (part.whole, self._source.read(part.whole))
        return kept[1][part.expert, part.rows]

    def read_into(self, name: str, out: Tensor) -> None:
        part = self._parts.get(name) or _Part(name)
        if part.expert is None:
            self._source.read_into(part.whole, out)
        else:
            out.copy_(self.read(name))


def unfused(source: TensorSource, spec: ModelSpec) -> TensorSource:
    """The source under the family's names; itself where it has them already.

    Transformers 5 keeps the experts of a layer in `mlp.experts.gate_up_proj` `[E, 2F, D]`, gate first, and
    `mlp.experts.down_proj` `[E, D, F]`, without a leaf, and everything beside them under canonical names.

    Raises:
        CheckpointError: names a fused tensor of another shape.
    """
    found, parts, shapes = set(source.names()), dict[str, _Part](), dict[str, tuple[int, ...]]()
    for layer in range(spec.num_layers):
        for parameter in spec.parameters(layer):
            names = spec.tensor_names(layer, parameter)
            if found.issuperset(names):
                continue
            alias = f"model.layers.{layer}.{parameter.role}"
            if parameter.num_experts is None:
                if f"{alias}.{parameter.leaf}" in found:
                    parts[names[0]] = _Part(f"{alias}.{parameter.leaf}")
                    shapes[names[0]] = source.shape(f"{alias}.{parameter.leaf}")
                continue
            module, projection = alias.replace(".*", "").rsplit(".", 1)
            order = _FUSED[projection]
            whole = f"{module}.{'_'.join(name.removesuffix('_proj') for name in order)}_proj"
            if whole not in found:
                continue
            out_features, in_features = parameter.shape
            _check_fused(source, whole, (parameter.num_experts, len(order) * out_features, in_features))
            start = order.index(projection) * out_features
            rows = slice(start, start + out_features)
            parts |= {name: _Part(whole, expert, rows) for expert, name in enumerate(names)}
            shapes |= dict.fromkeys(names, parameter.shape)
    return _Unfused(source, parts, shapes) if parts else source


def _check_fused(source: TensorSource, name: str, expected: tuple[int, ...]) -> None:
    shape = source.shape(name)
    if shape != expected:
        raise CheckpointError(
            f"{name} has shape {list(shape)}; config.json implies {list(expected)}: experts, outputs, inputs",
            remedy="check that config.json belongs to these weights, and that they are not transposed",
        )


def check_tensors(source: TensorSource, spec: ModelSpec) -> None:
    """Every tensor that the model needs is there in its shape, and none is left that nobody reads.

    Raises:
        CheckpointError: names the missing, unread or misshapen tensors.
    """
    found, expected = set(source.names()), spec.expected_tensors()
    if spec.tie_embeddings:
        found.discard("lm_head.weight")
    unread = sorted(n for n in found - expected if not n.endswith(_KNOWN_BUFFERS) and not spec.is_carried(n))
    missing = sorted(expected - found)
    if missing:
        close = get_close_matches(missing[0], unread, 1)
        raise CheckpointError(
            f"{len(missing)} tensors of the model are not in the checkpoint: {_some(missing)}",
            where=f"family {spec.family}",
            remedy=f"did you mean {close[0]}? the names must be those of the family"
            if close
            else "fetch the missing shards, or check that config.json belongs to these weights",
        )
    if unread:
        raise CheckpointError(
            f"the checkpoint holds {len(unread)} tensors that the model has no place for: {_some(unread)}",
            where=f"family {spec.family}",
            remedy="check that config.json belongs to these weights",
        )
    for layer in range(spec.num_layers):
        for parameter in spec.parameters(layer):
            for name in spec.tensor_names(layer, parameter):
                _check_shape(source, name, parameter)
    for parameter in spec.outer_parameters():
        _check_shape(source, f"{parameter.role}.{parameter.leaf}", parameter)


def _check_shape(source: TensorSource, name: str, parameter: Parameter) -> None:
    shape = source.shape(name)
    if shape != parameter.shape:
        raise CheckpointError(
            f"{name} has shape {list(shape)}; config.json implies {list(parameter.shape)}",
            remedy="check that config.json belongs to these weights",
        )


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" … and {len(names) - limit} more" if len(names) > limit else "")


def read_layer(
    source: TensorSource, spec: ModelSpec, layer: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LayerWeights:
    """All weights of one layer, by `Parameter.key`.

    Raises:
        NumericsError: names a tensor that holds NaN or infinity.
    """
    weights: LayerWeights = {}
    for parameter in spec.parameters(layer):
        names = spec.tensor_names(layer, parameter)
        if parameter.num_experts is None:
            weights[parameter.key] = _read(source, names[0], parameter.shape, parameter.dtype or dtype).to(device)
            continue
        stacked = torch.empty(parameter.num_experts, *parameter.shape, dtype=dtype)
        for out, name in zip(stacked.unbind(), names, strict=True):
            source.read_into(name, out)
        if not _finite(stacked):
            bad = next(name for out, name in zip(stacked.unbind(), names, strict=True) if not _finite(out))
            raise _not_finite(bad)
        weights[parameter.key] = stacked.to(device)
    return weights


def read_outer(
    source: TensorSource, spec: ModelSpec, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LayerWeights:
    """Embedding, final norm and head (absent where tied), by tensor name."""
    return {
        f"{p.role}.{p.leaf}": _read(source, f"{p.role}.{p.leaf}", p.shape, dtype).to(device)
        for p in spec.outer_parameters()
    }


def load_decoder(
    source: TensorSource,
    spec: ModelSpec,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    schemes: Mapping[str, Scheme | None] | None = None,
) -> Decoder:
    """The whole model in memory; `source` as for `logical`, and inputs rounded as the modules' `schemes` say."""
    dtype = spec.dtype if dtype is None else dtype
    source = logical(source, spec)
    layers = [
        as_served(read_layer(source, spec, index, dtype, device), spec, index, schemes or {})
        for index in range(spec.num_layers)
    ]
    return Decoder(spec, read_outer(source, spec, dtype, device), layers)


def _read(source: TensorSource, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    source.read_into(name, out)
    if not _finite(out):
        raise _not_finite(name)
    return out


def _finite(x: Tensor) -> bool:
    # a sum is one pass without a temporary; only where it overflows is each element looked at
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())


def _not_finite(name: str) -> NumericsError:
    return NumericsError(
        "the weights hold NaN or infinity",
        where=name,
        remedy="fetch the checkpoint anew; or, with --dtype fp16, give bf16 or fp32",
    )
