"""The same model in rotated coordinates, at no cost when it is served: a `TensorSource` over another.

Gains of norms are folded into the linears behind them, which leaves ones; the residual stream `x` becomes `x R`: what
writes it gives `Rᵀ W`, what reads it has `W R`, embedding and head with them. Values of every head become `v S`, which
the output projection undoes. R and S are orthogonal, so no logit changes but by rounding (SliceGPT, Ashkboos et al.
2024; QuaRot, Ashkboos et al. 2024; per-head values as in SpinQuant, Liu et al. 2024).

Shapes: V vocabulary, D hidden, C channels of a head, O out, I in.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from alphaquant.errors import ConfigError
from alphaquant.models.spec import AttentionSpec, LatentSpec, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from alphaquant.checkpoint import TensorInfo
    from alphaquant.models.spec import ModelSpec
    from alphaquant.models.weights import TensorSource

__all__ = ["Rotation", "RotationKind", "Turn", "rotated"]

_BLOCK = 32  # of a block-diagonal rotation: that of MX formats, so that no block's outliers leave it
_FACTOR = 128  # Hadamard matrices are applied as products of such
_READ = {
    Source.ATTENTION_IN: "input_layernorm.weight",
    Source.MLP_IN: "post_attention_layernorm.weight",
    Source.EXPERT_IN: "post_attention_layernorm.weight",
    Source.SHARED_IN: "post_attention_layernorm.weight",
}
"""Sources that are the normed residual stream, and the norm."""
_WRITTEN = (Source.ATTENTION_OUT, Source.MLP_HIDDEN, Source.EXPERT_HIDDEN, Source.SHARED_HIDDEN)
"""Sources of the linears that add to the residual stream."""
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class RotationKind(Enum):
    """None; a randomised Hadamard matrix over all channels; or one for each block of 32, for MX formats."""

    NONE = "none"
    HADAMARD = "hadamard"
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation by its kind and the seed of its signs."""

    kind: RotationKind = RotationKind.NONE
    seed: int = 0

    def to_dict(self) -> dict[str, Any] | None:
        """As JSON; None where nothing is rotated."""
        return None if self.kind is RotationKind.NONE else {"kind": self.kind.value, "seed": self.seed}


class Turn:
    """An orthogonal matrix `[C, C]`: random signs, then a Kronecker product of small factors.

    A power of two takes Hadamard factors alone; what is left of another size takes a random orthogonal one. In longer
    rows each C channels turn alike; with `skip` so many stay as they are before each C.

    Args:
        size: C.
        block: size of blocks that turn by themselves; None for all of C.
        generator: of signs and of what is no power of two.

    Raises:
        ConfigError: blocks do not divide the size.
    """

    def __init__(self, size: int, block: int | None, generator: torch.Generator, skip: int = 0) -> None:
        whole = size if block is None else min(block, size)
        if size % whole:
            raise ConfigError(
                f"blocks of {whole} do not divide {size} channels", where="--rotate", remedy="give --rotate hadamard"
            )
        self._size, self.skip = size, skip
        self._sign_C = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
        power = whole & -whole
        self._factors: list[Tensor] = []
        if whole > power:
            odd = whole // power
            self._factors.append(torch.linalg.qr(torch.randn(odd, odd, generator=generator)).Q)
        while power > 1:
            self._factors.append(_hadamard(min(power, _FACTOR)))
            power //= len(self._factors[-1])

    def behind(self, skip: int) -> Turn:
        """The same matrix, for rows in which `skip` channels stay before each C."""
        turn = copy(self)
        turn.skip = skip
        return turn

    def __call__(self, x_NI: Tensor) -> Tensor:
        """`x R` of rows, fp32.

        Made in fp64: layers are read by a thread, while products of fp32 may be set to bf16 in the whole process.
        """
        still, x_MC = x_NI.double().reshape(-1, self.skip + self._size).split([self.skip, self._size], 1)
        out = (x_MC * self._sign_C).reshape(len(x_MC), -1, *map(len, self._factors))
        for place, factor in enumerate(self._factors, 2):
            out = (out.movedim(place, -1) @ factor.double()).movedim(-1, place)
        return torch.cat([still, out.reshape(x_MC.shape)], 1).reshape(x_NI.shape).float()


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


class _Change(NamedTuple):
    """What becomes of a tensor: a norm's gain folded into its inputs, its inputs turned, its outputs turned."""

    gain: str | None = None
    inputs: Turn | None = None
    outputs: Turn | None = None

    def __call__(self, w: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        w = w.float()
        if self.gain is not None:
            w = w * read(self.gain).float()
        if self.inputs is not None:
            w = self.inputs(w)
        if self.outputs is not None:
            return self.outputs(w[None])[0] if w.dim() == 1 else self.outputs(w.T).T
        return w


class _Rotated:
    """A source of which some tensors are changed as they are read, some are ones, and one may be another's copy."""

    def __init__(
        self, source: TensorSource, changes: Mapping[str, _Change], ones: set[str], copies: Mapping[str, str]
    ) -> None:
        self._source, self._changes, self._ones, self._copies = source, changes, ones, copies

    def names(self) -> tuple[str, ...]:
        return tuple(sorted({*self._source.names(), *self._copies}))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._copies.get(name, name))

    def info(self, name: str) -> TensorInfo:
        return replace(self._source.info(self._copies.get(name, name)), name=name)

    def read(self, name: str) -> Tensor:
        stored = self._source.read(self._copies.get(name, name))
        return self._changed(name, stored).to(stored.dtype)

    def read_into(self, name: str, out: Tensor) -> None:
        if name in self._ones or name in self._changes:
            out.copy_(self._changed(name, self._source.read(self._copies.get(name, name))))
        else:
            self._source.read_into(name, out)

    def _changed(self, name: str, stored: Tensor) -> Tensor:
        if name in self._ones:
            return torch.ones_like(stored)
        return self._changes[name](stored, self._source.read) if name in self._changes else stored


def rotated(source: TensorSource, spec: ModelSpec, rotation: Rotation) -> tuple[TensorSource, ModelSpec]:
    """A model's tensors in rotated coordinates, and what it is then: its head is never the embedding.

    Args:
        source: from `logical`.
        spec: the model.
        rotation: how; what it is made of depends on nothing but the spec, the kind and the seed.

    Raises:
        ConfigError: the model has no rotated form, or not this one.
    """
    if rotation.kind is RotationKind.NONE:
        return source, spec
    carried = next((name for name in source.names() if spec.is_carried(name)), None)
    if carried is not None:
        raise ConfigError(
            "layers for multi-token prediction read the residual stream, and are carried over as they are",
            where=carried,
            remedy="leave --rotate out",
        )
    block = _BLOCK if rotation.kind is RotationKind.BLOCK else None
    generator = torch.Generator().manual_seed(rotation.seed)
    stream = Turn(spec.hidden_size, block, generator)
    changes = {_EMBEDDING: _Change(inputs=stream), _HEAD: _Change(_NORM, stream)}
    ones = {_NORM}
    for layer in range(spec.num_layers):
        parameters = spec.parameters(layer)
        written = {p.role for p in parameters if p.source in _WRITTEN}
        ends = _value_turns(spec.layers[layer].attention, block, generator)
        for parameter in parameters:
            inputs, outputs = ends.get(parameter.role, (None, None))
            gain = _READ.get(parameter.source) if parameter.source is not None else None
            change = _Change(
                None if gain is None else f"model.layers.{layer}.{gain}",
                stream if gain is not None else inputs if parameter.leaf == "weight" else None,
                stream if parameter.role in written else outputs,
            )
            names = spec.tensor_names(layer, parameter)
            if parameter.key in _READ.values():
                ones.update(names)
            elif any(change):
                changes |= dict.fromkeys(names, change)
    copies = {_HEAD: _EMBEDDING} if spec.tie_embeddings else {}
    return _Rotated(source, changes, ones, copies), replace(spec, tie_embeddings=False)


def _value_turns(
    spec: AttentionSpec | LatentSpec, block: int | None, generator: torch.Generator
) -> dict[str, tuple[Turn | None, Turn | None]]:
    """By role how inputs and outputs turn with the values of each head; nothing where values are clipped."""
    size = spec.value_dim if isinstance(spec, LatentSpec) else spec.head_dim
    turn = Turn(size, block if block is not None and size % block == 0 else None, generator)
    if isinstance(spec, LatentSpec):
        return {"self_attn.kv_b_proj": (None, turn.behind(spec.nope_dim)), "self_attn.o_proj": (turn, None)}
    if spec.clip_qkv is not None:
        return {}
    return {"self_attn.v_proj": (None, turn), "self_attn.o_proj": (turn, None)}
