"""Tuning: codes and scales of a half-layer moved by gradient, all linears together, toward the original's stream.

What the quantized model's residual stream becomes by the half-layer is compared with what the original's has become,
so that what one linear loses the others make up for, and what earlier layers lost, too. AutoRound (Cheng et al. 2023,
arXiv 2309.05516) tunes rounding so, from the weights, by signs of gradients taken straight through the rounding. Here
codes move as `solver.places` says. GPTQ's codes, and how far beside them the Hessian would have their weights
(`solver.leanings`), are the start.

Shapes: N samples, L positions, D hidden; E experts, O out, I in.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.formats import QuantizedTensor, dequantize
from alphaquant.pipeline.pace import fits
from alphaquant.pipeline.records import TuningRecord
from alphaquant.solver import Backend, Places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.models import LayerWeights
    from alphaquant.pipeline.pace import Pace
    from alphaquant.pipeline.stream import Stream

__all__ = ["BATCH_TOKENS", "PROBES", "Objective", "Tunable", "taken_apart", "tune"]

BATCH_TOKENS = 1024
"""Of a step."""
PROBES = 4
"""Batches that curvature is measured by, before the first step."""
_HELD_OUT = 8  # the last of so many samples is not tuned on, but judges
_LEANING = "leaning"


@dataclass(slots=True, eq=False)
class Tunable:
    """A linear's quantized matrices of one scheme, on the device of its weights.

    Attributes:
        key: of the weights in the layer.
        names: the modules' names, an expert each.
        experts: which of the stacked weights they are; None where these are one matrix.
        quantized: codes and scales `[E, O, I]`.
        leaning_EOI: where each weight would lie if it alone were free, in grid values from its code's.
    """

    key: str
    names: list[str]
    experts: list[int] | None
    quantized: QuantizedTensor
    leaning_EOI: Tensor

    @classmethod
    def of(
        cls,
        key: str,
        names: list[str],
        experts: list[int] | None,
        scheme: Scheme,
        parts: Mapping[str, Tensor],
        weights: LayerWeights,
    ) -> Tunable:
        """Put modules that were `taken_apart` together, on the device of the layer's weights."""

        def stacked(part: str) -> Tensor | None:
            found = [parts[f"{name} {part}"] for name in names if f"{name} {part}" in parts]
            return torch.stack(found).to(weights[key].device) if found else None

        codes, scale, leaning_EOI = (stacked(part) for part in ("codes", "scale", _LEANING))
        assert codes is not None
        assert scale is not None
        assert leaning_EOI is not None
        quantized = QuantizedTensor(codes, scale, stacked("zero"), stacked("global_scale"), scheme)
        return cls(key, names, experts, quantized, leaning_EOI)

    def modules(self) -> Iterator[tuple[str, QuantizedTensor]]:
        """Its modules one by one, on the CPU."""
        for place, name in enumerate(self.names):
            parts: dict[str, Any] = {part: tensor[place].cpu() for part, tensor in _tensors(self.quantized)}
            yield name, replace(self.quantized, **parts)

    def gradient(self, weights: LayerWeights) -> Tensor:
        """That of its matrices `[E, O, I]`."""
        gradient = weights[self.key].grad
        assert gradient is not None
        return gradient[None] if self.experts is None else gradient[self.experts]

    def put(self, weights: LayerWeights, w_EOI: Tensor) -> None:
        """Replace them in the layer."""
        if self.experts is None:
            weights[self.key].copy_(w_EOI[0])
        else:
            weights[self.key][self.experts] = w_EOI.to(weights[self.key].dtype)


def taken_apart(quantized: Mapping[str, QuantizedTensor], leanings: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of all modules that have a leaning, by name and part."""
    return {
        f"{name} {part}": tensor
        for name, leaning in leanings.items()
        for part, tensor in [(_LEANING, leaning), *_tensors(quantized[name])]
    }


def _tensors(q: QuantizedTensor) -> list[tuple[str, Tensor]]:
    parts = {"codes": q.codes, "scale": q.scale, "zero": q.zero, "global_scale": q.global_scale}
    return [(part, tensor) for part, tensor in parts.items() if tensor is not None]


@dataclass(slots=True, eq=False)
class Objective:
    """What a half-layer is tuned to: the original's stream behind it.

    The loss is the squared error of the stream relative to the target's square, token by token; a token of less than
    the median square counts by that. Without the former the few tokens of massive activations would decide; without
    the latter those of next to none.

    Attributes:
        half: the half-layer's function of the stream, in the weights as they are.
        x_NLD: the stream before it.
        target_NLD: the original's behind it.
        samples: numbers of those that count.
        where: the half-layer's name.
        pace: how many of them go at a time.
        notes: of memory that ran out.
        divisor_NL: what each token's squared error is divided by.
    """

    half: Callable[[Tensor], Tensor]
    x_NLD: Stream
    target_NLD: Stream
    samples: Tensor
    where: str
    pace: Pace
    notes: list[str] = field(default_factory=list)
    divisor_NL: Tensor = field(init=False)

    def __post_init__(self) -> None:
        square_NL = torch.full(self.target_NLD.shape[:2], torch.nan)
        for some in self.samples.split(self.size):
            square_NL[some] = self.target_NLD[some].float().square().sum(-1).cpu()
        least = square_NL[self.samples].median().clamp_min(torch.finfo(torch.float32).tiny)
        self.divisor_NL = square_NL.clamp_min(least)

    @property
    def size(self) -> int:
        """Samples of a step."""
        return max(1, BATCH_TOKENS // self.x_NLD.shape[1])

    def split(self) -> tuple[Tensor, Tensor]:
        """Samples to tune on, and those to judge by."""
        period = min(_HELD_OUT, len(self.samples))
        is_held = torch.arange(len(self.samples)) % period == period - 1
        return self.samples if period == 1 else self.samples[~is_held], self.samples[is_held]

    def loss(self, some: Tensor) -> Tensor:
        """The mean over the tokens of some samples."""
        short_BLD = self.half(self.x_NLD[some]).float() - self.target_NLD[some].float()
        return (short_BLD.square().sum(-1) / self.divisor_NL[some].to(short_BLD.device)).mean()

    def mean(self, samples: Tensor) -> float:
        """The loss a token."""
        total = 0.0
        for batch in samples.split(self.size):
            found: list[float] = []

            def add(some: Tensor, found: list[float] = found) -> None:
                found.append(len(some) * float(self.loss(some)))

            self._in_pieces(batch, add, found.clear)
            total += math.fsum(found)
        return total / len(samples)

    def descend(self, batch: Tensor, weights: Sequence[Tensor]) -> None:
        """Give the weights the gradient of a batch's mean loss."""

        def forget() -> None:
            for weight in weights:
                weight.grad = None

        @torch.enable_grad()
        def backward(some: Tensor) -> None:
            (self.loss(some) * (len(some) / len(batch))).backward()

        forget()
        self._in_pieces(batch, backward, forget)

    def _in_pieces(self, some: Tensor, take: Callable[[Tensor], None], forget: Callable[[], None]) -> None:
        """All of some samples, a few at a time; from the first one again where memory runs out."""
        while not all(fits(take, piece) for piece in self.pace.cut([some])):
            forget()
            self.notes.append(self.pace.slower([some], self.where))


@torch.no_grad()
def tune(
    objective: Objective,
    weights: LayerWeights,
    tunables: Sequence[Tunable],
    steps: int,
    seed: int,
    backend: Backend = Backend.AUTO,
) -> tuple[TuningRecord, dict[str, QuantizedTensor]]:
    """Tune what of a half-layer is quantized; it stays as it was where the loss of held-out samples does not fall.

    First the curvature of the loss is measured by batches at shaken weights; then each step moves the codes and scales,
    by rates that fall linearly to nothing.

    Args:
        objective: what to tune to.
        weights: of the layer; those of the tunables change in place.
        tunables: its quantized linears.
        steps: how many.
        seed: draws the order of the samples.
        backend: what moves them.

    Returns:
        What it did, and codes and scales by the modules' names.
    """
    fitted, held = objective.split()
    before = objective.mean(held)
    places = [Places.of(tunable.quantized, tunable.leaning_EOI, backend) for tunable in tunables]
    _descend(objective, weights, list(zip(tunables, places, strict=True)), fitted, steps, seed)
    tuned = [one.ended() for one in places]
    del places
    for tunable, quantized in zip(tunables, tuned, strict=True):
        tunable.put(weights, dequantize(quantized))
    after = objective.mean(held)
    kept = after < before
    num_moved = sum(int((t.quantized.codes != q.codes).sum()) for t, q in zip(tunables, tuned, strict=True))
    moved = num_moved / sum(tunable.quantized.codes.numel() for tunable in tunables)
    for tunable, quantized in zip(tunables, tuned, strict=True):
        if kept:
            tunable.quantized = quantized
        else:
            tunable.put(weights, dequantize(tunable.quantized))
    record = TuningRecord(objective.where, len(held) * objective.x_NLD.shape[1], before, after, moved, kept)
    return record, {name: q for tunable in tunables for name, q in tunable.modules()}


def _descend(
    objective: Objective,
    weights: LayerWeights,
    moving: Sequence[tuple[Tunable, Places]],
    samples: Tensor,
    steps: int,
    seed: int,
) -> None:
    """Measure the curvature, and move places and scales; gradients are taken at their codes."""
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(samples, objective.size, PROBES + steps, seed)
    with _differentiable([weights[tunable.key] for tunable, _ in moving]) as own:
        for batch in islice(batches, PROBES):
            for tunable, places in moving:
                tunable.put(weights, places.shaken(generator))
            objective.descend(batch, own)
            for tunable, places in moving:
                places.learn(tunable.gradient(weights))
        for step, batch in enumerate(batches):
            for tunable, places in moving:
                tunable.put(weights, places.weights())
            objective.descend(batch, own)
            for tunable, places in moving:
                places.move(tunable.gradient(weights), 1 - step / steps)


@contextmanager
def _differentiable(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients reach these weights, and nothing of them is left behind."""
    try:
        for weight in weights:
            weight.requires_grad_()
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad, weight.grad = False, None


def _batches(samples: Tensor, size: int, number: int, seed: int) -> Iterator[Tensor]:
    """So many batches, in a new order each time that all samples have had their turn."""
    generator = torch.Generator().manual_seed(seed)
    queue = samples[:0]
    for _ in range(number):
        if len(queue) < min(size, len(samples)):
            queue = torch.cat([queue, samples[torch.randperm(len(samples), generator=generator)]])
        yield queue[:size]
        queue = queue[size:]
