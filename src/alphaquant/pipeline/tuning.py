"""Tuning: codes and scales of a half-layer moved by gradient, all linears together, toward the original's stream.

What the quantized model's residual stream becomes by the half-layer is compared with what the original's has become,
so that what one linear loses the others make up for, and what earlier layers lost, too. AutoRound (Cheng et al. 2023,
arXiv 2309.05516) tunes rounding so, from the weights, by signs of gradients taken straight through the rounding. But
such a gradient is that of the code, not of the place between two codes: it pushes until the code flips, then back, and
all end near where they flip. Here a place moves toward where its weight would lie best if it alone were free, which a
code's gradient says where the curvature is known: by gradient over curvature from the code. It rests where no code
alone would be better elsewhere. GPTQ's codes, and where the Hessian has such places (`solver.leanings`), are the start.

Shapes: N samples, L positions, D hidden; E experts, O out, I in, G groups, S a group's columns.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.formats import QuantizedTensor, ScaleKind, dequantize, encode, pool_rows, quantize_values, round_scale
from alphaquant.pipeline.pace import fits
from alphaquant.pipeline.records import TuningRecord
from alphaquant.solver import grid_steps

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
_CODE_RATE, _SCALE_RATE = 0.15, 0.004  # at the first step: of the way to a place; of Adam, relative
_BETAS = (0.9, 0.95)
_MOST = 0.1  # of a step of the grid that a place moves at a time
_SHAKE = 0.25  # of a step, or what bf16 resolves of the largest value; in these batches weights are off by so much
_AT_ONCE = 1 << 16  # weights that are moved together on a CPU: they stay in its cache
_LEAST = 0.1  # of the mean curvature: that of rows and columns is held there


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

    def matrices(self, weight: Tensor) -> Tensor:
        """Its own `[E, O, I]` of a tensor shaped as the layer's."""
        return weight[None] if self.experts is None else weight[self.experts]

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


@dataclass(frozen=True, slots=True, eq=False)
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
    """

    half: Callable[[Tensor], Tensor]
    x_NLD: Stream
    target_NLD: Stream
    samples: Tensor
    where: str
    pace: Pace
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Samples of a step."""
        return max(1, BATCH_TOKENS // self.x_NLD.shape[1])

    def split(self) -> tuple[Tensor, Tensor]:
        """Samples to tune on, and those to judge by."""
        period = min(_HELD_OUT, len(self.samples))
        is_held = torch.arange(len(self.samples)) % period == period - 1
        return self.samples if period == 1 else self.samples[~is_held], self.samples[is_held]

    def divisors(self) -> Tensor:
        """What each token's squared error is divided by, `[N, L]`."""
        square_NL = torch.full(self.target_NLD.shape[:2], torch.nan)
        for some in self.samples.split(self.size):
            square_NL[some] = self.target_NLD[some].float().square().sum(-1).cpu()
        return square_NL.clamp_min(square_NL[self.samples].median().clamp_min(torch.finfo(torch.float32).tiny))

    def loss(self, some: Tensor, divisor_NL: Tensor) -> Tensor:
        """The mean over the tokens of some samples."""
        short_BLD = self.half(self.x_NLD[some]).float() - self.target_NLD[some].float()
        return (short_BLD.square().sum(-1) / divisor_NL[some].to(short_BLD.device)).mean()

    def mean(self, samples: Tensor, divisor_NL: Tensor) -> float:
        """The loss a token."""
        total = 0.0
        for batch in samples.split(self.size):
            found: list[float] = []

            def add(some: Tensor, found: list[float] = found) -> None:
                found.append(len(some) * float(self.loss(some, divisor_NL)))

            self._in_pieces(batch, add, found.clear)
            total += math.fsum(found)
        return total / len(samples)

    def descend(self, batch: Tensor, divisor_NL: Tensor, weights: Sequence[Tensor]) -> None:
        """Give the weights the gradient of a batch's mean loss."""

        def forget() -> None:
            for weight in weights:
                weight.grad = None

        @torch.enable_grad()
        def backward(some: Tensor) -> None:
            (self.loss(some, divisor_NL) * (len(some) / len(batch))).backward()

        forget()
        self._in_pieces(batch, backward, forget)

    def _in_pieces(self, some: Tensor, take: Callable[[Tensor], None], forget: Callable[[], None]) -> None:
        """All of some samples, a few at a time; from the first one again where memory runs out."""
        while not all(fits(take, piece) for piece in self.pace.cut([some])):
            forget()
            self.notes.append(self.pace.slower([some], self.where))


@torch.no_grad()
def tune(
    objective: Objective, weights: LayerWeights, tunables: Sequence[Tunable], steps: int, seed: int
) -> tuple[TuningRecord, dict[str, QuantizedTensor]]:
    """Tune what of a half-layer is quantized; it stays as it was where the loss of held-out samples does not fall.

    First the curvature of the loss is measured, that is the diagonal of its Hessian: the mean product of random signs
    and the gradient at weights shaken by these signs (Hutchinson 1989; Bekas, Kokiopoulou and Saad 2007), which is
    averaged over rows and over columns. Then each step moves every place a share of the way, the less the more batches
    differ about it, and scales of 16 bits by Adam (Kingma and Ba 2015); both rates fall linearly to nothing.

    Args:
        objective: what to tune to.
        weights: of the layer; those of the tunables change in place.
        tunables: its quantized linears.
        steps: how many.
        seed: draws the order of the samples.

    Returns:
        What it did, and codes and scales by the modules' names.
    """
    divisor_NL = objective.divisors()
    fitted, held = objective.split()
    before = objective.mean(held, divisor_NL)
    moving = [_Moving.of(tunable) for tunable in tunables]
    _descend(objective, weights, moving, fitted, divisor_NL, steps, seed)
    tuned = [one.ended() for one in moving]
    del moving
    for tunable, quantized in zip(tunables, tuned, strict=True):
        tunable.put(weights, dequantize(quantized))
    after = objective.mean(held, divisor_NL)
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
    moving: Sequence[_Moving],
    samples: Tensor,
    divisor_NL: Tensor,
    steps: int,
    seed: int,
) -> None:
    """Measure the curvature, and move places and scales; gradients are taken at their codes."""
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(samples, objective.size, PROBES + steps, seed)
    with _differentiable([weights[one.tunable.key] for one in moving]) as own:
        for batch in islice(batches, PROBES):
            for one in moving:
                one.tunable.put(weights, one.shaken(generator))
            objective.descend(batch, divisor_NL, own)
            for one in moving:
                one.learn(weights[one.tunable.key])
        for step, batch in enumerate(batches):
            falling = 1 - step / steps
            for one in moving:
                one.tunable.put(weights, one.weights())
            objective.descend(batch, divisor_NL, own)
            for one in moving:
                one.move(weights[one.tunable.key], falling)


@dataclass(slots=True, eq=False)
class _Factored:
    """The mean over batches of something of every weight, taken as its row's times its column's.

    Second moments are kept so by Adafactor (Shazeer and Stern 2018, arXiv 1804.04235).
    """

    row_EO1: Tensor
    column_E1I: Tensor
    batches: int = 0

    @classmethod
    def like(cls, x_EOI: Tensor) -> _Factored:
        """Nothing yet."""
        return cls(torch.zeros_like(x_EOI[..., :1]), torch.zeros_like(x_EOI[:, :1]))

    def add(self, x_EOI: Tensor, rows: slice) -> None:
        """Take some rows of a batch's; whoever does counts the batches."""
        self.row_EO1[:, rows] += x_EOI.mean(-1, keepdim=True)
        self.column_E1I += x_EOI.sum(-2, keepdim=True) / self.row_EO1.shape[1]

    def factors(self, least: float = 0.0) -> tuple[Tensor, Tensor]:
        """Two that multiply to it, `[E, O, 1]` and `[E, 1, I]`, held at a share of its mean; zeros if that is none."""
        mean_E11 = self.row_EO1.mean(-2, keepdim=True)
        row_EO1, column_E1I = (x.maximum(least * mean_E11) for x in (self.row_EO1, self.column_E1I))
        column_E1I = column_E1I / (mean_E11 * self.batches)
        return torch.where(mean_E11 > 0, row_EO1, 0.0), torch.where(mean_E11 > 0, column_E1I, 0.0)


@dataclass(slots=True, eq=False)
class _Moving:
    """A tunable under way.

    Attributes:
        tunable: as it was.
        place_EOGS: where its weights lie on the grid; codes are the nearest values.
        log_EOG: logarithms of what scales are multiplied by.
        moment_EOG: mean of their gradients, weighted by how late they are.
        square_EOG: of these gradients' squares.
        curvature: of the loss by each weight.
        noise: squares of how many steps of the grid a batch says that a weight should be off its code.
        sign_EOGS: those that weights are shaken by.
    """

    tunable: Tunable
    place_EOGS: Tensor
    log_EOG: Tensor
    moment_EOG: Tensor
    square_EOG: Tensor
    curvature: _Factored
    noise: _Factored
    sign_EOGS: Tensor

    @classmethod
    def of(cls, tunable: Tunable) -> _Moving:
        q = tunable.quantized
        place_EOI = dequantize(replace(q, scale=torch.ones_like(q.scale), global_scale=None)) + tunable.leaning_EOI
        place_EOGS = place_EOI.unflatten(-1, (q.scale.shape[-1], -1))
        curvature, noise = (_Factored.like(place_EOI) for _ in range(2))
        log_EOG, moment_EOG, square_EOG = (torch.zeros_like(q.scale) for _ in range(3))
        signs = q.codes.new_empty(0)
        return cls(tunable, place_EOGS, log_EOG, moment_EOG, square_EOG, curvature, noise, signs)

    @property
    def has_free_scales(self) -> bool:
        """Whether scales can take nearly any value."""
        return self.tunable.quantized.scheme.format.scale is ScaleKind.MODEL

    def shaken(self, generator: torch.Generator) -> Tensor:
        """The weights, each off by a little up or down at random."""
        bits = torch.randint(0, 2, self.place_EOGS.shape, generator=generator, dtype=torch.int8)
        self.sign_EOGS = bits.mul_(2).sub_(1).to(self.place_EOGS.device)
        return self.weights().add_((self._shake_EOG1 * self.sign_EOGS).flatten(-2))

    def learn(self, weight: Tensor) -> None:
        """Take what the gradient at shaken weights says of the curvature."""
        assert weight.grad is not None
        gradient_EOI, shake_EOG1 = self.tunable.matrices(weight.grad), self._shake_EOG1
        for rows in self._cuts():
            found_EOGS = self._grouped(gradient_EOI[:, rows]) * self.sign_EOGS[:, rows] / shake_EOG1[:, rows]
            self.curvature.add(found_EOGS.flatten(-2), rows)
        self.curvature.batches += 1
        self.sign_EOGS = self.sign_EOGS.new_empty(0)

    def move(self, weight: Tensor, falling: float) -> None:
        """Move each place some of the way to where it should be, and scales; `falling` from one to nothing.

        Some rows at a time, so that what is between two steps stays in a CPU's cache.
        """
        assert weight.grad is not None
        gradient_EOI = self.tunable.matrices(weight.grad)
        w_EOI = self.tunable.matrices(weight) if self.has_free_scales else None
        row_EO1, column_E1I = (_inverse(factor) for factor in self.curvature.factors(_LEAST))
        fmt, scale_EOG1 = self.tunable.quantized.scheme.format, self._scale_EOG1
        column_E1GS = self._grouped(column_E1I)
        away_EOGS, log_slope_EOG = torch.empty_like(self.place_EOGS), torch.empty_like(self.log_EOG)
        for rows in self._cuts():
            slope_EOGS = self._grouped(gradient_EOI[:, rows])
            if w_EOI is not None:
                # w = value * scale * exp(log), so its derivative is w itself
                log_slope_EOG[:, rows] = (slope_EOGS * self._grouped(w_EOI[:, rows])).sum(-1)
            away = torch.mul(slope_EOGS, row_EO1[:, rows, :, None] / scale_EOG1[:, rows], out=away_EOGS[:, rows])
            away.mul_(column_E1GS)
            off_EOGS = away / grid_steps(self._values(rows), fmt)
            self.noise.add(off_EOGS.square_().flatten(-2), rows)
        self.noise.batches += 1
        row_EO1, column_E1I = self.noise.factors()
        column_E1GS = self._grouped(column_E1I)
        for rows in self._cuts():
            value_EOGS = self._values(rows)
            most_EOGS = grid_steps(value_EOGS, fmt).mul_(_MOST)
            rate_EOGS = (row_EO1[:, rows, :, None] * column_E1GS).add_(1).reciprocal_().mul_(_CODE_RATE * falling)
            place_EOGS = self.place_EOGS[:, rows]
            way_EOGS = value_EOGS.sub_(away_EOGS[:, rows]).sub_(place_EOGS).mul_(rate_EOGS)
            place_EOGS += torch.minimum(torch.maximum(way_EOGS, -most_EOGS), most_EOGS)
        if self.has_free_scales:
            self._scale_by(pool_rows(log_slope_EOG, self.tunable.quantized.scheme), _SCALE_RATE * falling)

    def _scale_by(self, slope_EOG: Tensor, rate: float) -> None:
        """A step of Adam."""
        first, second = _BETAS
        batches = self.noise.batches
        self.moment_EOG.lerp_(slope_EOG, 1 - first)
        self.square_EOG.lerp_(slope_EOG.square(), 1 - second)
        mean_EOG, size_EOG = self.moment_EOG / (1 - first**batches), (self.square_EOG / (1 - second**batches)).sqrt_()
        self.log_EOG -= rate * mean_EOG.div_(size_EOG.clamp_min_(torch.finfo(torch.float32).tiny))

    def weights(self) -> Tensor:
        """What these places and scales stand for, `[E, O, I]`."""
        scale_EOG1, w_EOGS = self._scale_EOG1, torch.empty_like(self.place_EOGS)
        for rows in self._cuts():
            torch.mul(self._values(rows), scale_EOG1[:, rows], out=w_EOGS[:, rows])
        return w_EOGS.flatten(-2)

    def ended(self) -> QuantizedTensor:
        """The codes of these places, and the scales as they are stored."""
        q = self.tunable.quantized
        codes = encode(self._values(), q.scheme.format, self._zero_EOG1).flatten(-2)
        scale = round_scale(q.scale * self.log_EOG.exp(), q.scheme) if self.has_free_scales else q.scale
        return replace(q, codes=codes, scale=scale)

    def _cuts(self) -> list[slice]:
        """Some rows at a time; all of them on a GPU, where each call has its price."""
        out_features = self.log_EOG.shape[1]
        at_once = _AT_ONCE if self.place_EOGS.device.type == "cpu" else self.place_EOGS.numel()
        size = max(1, at_once * out_features // self.place_EOGS.numel())
        return [slice(start, min(start + size, out_features)) for start in range(0, out_features, size)]

    def _grouped(self, x_EOI: Tensor) -> Tensor:
        grouped: Tensor = x_EOI.float().unflatten(-1, (self.log_EOG.shape[-1], -1))
        return grouped

    @property
    def _scale_EOG1(self) -> Tensor:
        return (self.tunable.quantized.effective_scale() * self.log_EOG.exp())[..., None]

    @property
    def _shake_EOG1(self) -> Tensor:
        return self._scale_EOG1 * max(_SHAKE, self.tunable.quantized.scheme.format.max_value / 64)

    @property
    def _zero_EOG1(self) -> Tensor | None:
        zero = self.tunable.quantized.zero
        return None if zero is None else zero[..., None]

    def _values(self, rows: slice = slice(None)) -> Tensor:
        zero_EOG1 = self._zero_EOG1
        zero_EOG1 = None if zero_EOG1 is None else zero_EOG1[:, rows]
        one = torch.ones((), device=self.place_EOGS.device)
        return quantize_values(self.place_EOGS[:, rows], one, zero_EOG1, self.tunable.quantized.scheme.format)


def _inverse(x: Tensor) -> Tensor:
    """One over each; zero where it is none."""
    return torch.where(x > 0, 1 / x, 0.0)


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
