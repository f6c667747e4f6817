"""Codes that move: where weights lie between the values of the grid, drawn along by gradients at their codes.

A gradient taken straight through the rounding is that of the code, not of the place between two codes: it pushes until
the code flips, then back, and all end near where they flip. Here a place moves toward where its weight would lie best
if it alone were free, which a code's gradient says where the curvature is known: by gradient over curvature from the
code. It rests where no code alone would be better elsewhere.

Shapes: E experts, O out, I in, G groups, S a group's columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from alphaquant.formats import QuantizedTensor, ScaleKind, dequantize, encode, pool_rows, quantize_values, round_scale
from alphaquant.solver.backend import Backend, kernels_for
from alphaquant.solver.refine import grid_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from alphaquant.formats import Format

__all__ = ["Factors", "Ground", "Places"]

_CODE_RATE, _SCALE_RATE = 0.15, 0.004  # at the first step: of the way to a place; of Adam, relative
_BETAS = (0.9, 0.95)
_MOST = 0.1  # of a step of the grid that a place moves at a time
_SHAKE = 0.25  # of a step, or what bf16 resolves of the largest value; in these batches weights are off by so much
_AT_ONCE = 1 << 16  # weights that are moved together on a CPU: they stay in its cache
_LEAST = 0.1  # of the mean curvature: that of rows and columns is held there


class Ground(NamedTuple):
    """Where weights lie, for what works on each of them.

    Attributes:
        place_EOI: in grid values.
        scale_EOG: what a grid value stands for.
        zero_EOG: zero points, as floats.
        fmt: number format.
    """

    place_EOI: Tensor
    scale_EOG: Tensor
    zero_EOG: Tensor | None
    fmt: Format

    def values(self, rows: slice = slice(None)) -> Tensor:
        """The nearest grid values `[E, O, G, S]`."""
        zero_EOG1 = None if self.zero_EOG is None else self.zero_EOG[:, rows, :, None]
        one = torch.ones((), device=self.place_EOI.device)
        return quantize_values(self.grouped(self.place_EOI[:, rows]), one, zero_EOG1, self.fmt)

    def grouped(self, x_EOI: Tensor) -> Tensor:
        """Columns by their groups."""
        grouped: Tensor = x_EOI.unflatten(-1, (self.scale_EOG.shape[-1], -1))
        return grouped

    def cuts(self) -> Iterator[slice]:
        """Some rows at a time; all of them on a GPU, where each call has its price."""
        out_features = self.scale_EOG.shape[1]
        at_once = _AT_ONCE if self.place_EOI.device.type == "cpu" else self.place_EOI.numel()
        size = max(1, at_once * out_features // self.place_EOI.numel())
        return (slice(start, min(start + size, out_features)) for start in range(0, out_features, size))


class Factors(NamedTuple):
    """Something of every weight, as its row's times its column's."""

    row_EO1: Tensor
    column_E1I: Tensor


@dataclass(slots=True, eq=False)
class _Mean:
    """The mean over batches of something of every weight, taken as its row's times its column's.

    Second moments are kept so by Adafactor (Shazeer and Stern 2018, arXiv 1804.04235).
    """

    row_EO1: Tensor
    column_E1I: Tensor
    batches: int = 0

    @classmethod
    def like(cls, x_EOI: Tensor) -> _Mean:
        """Nothing yet."""
        return cls(torch.zeros_like(x_EOI[..., :1]), torch.zeros_like(x_EOI[:, :1]))

    def add(self, row_EO: Tensor, column_EI: Tensor) -> None:
        """Take a batch's sums over columns and over rows."""
        self.row_EO1 += row_EO[..., None] / self.column_E1I.shape[-1]
        self.column_E1I += column_EI[:, None] / self.row_EO1.shape[1]
        self.batches += 1

    def factors(self, least: float = 0.0) -> Factors:
        """Two that multiply to it, held at a share of its mean; zeros if that is none."""
        mean_E11 = self.row_EO1.mean(-2, keepdim=True)
        row_EO1, column_E1I = (x.maximum(least * mean_E11) for x in (self.row_EO1, self.column_E1I))
        column_E1I = column_E1I / (mean_E11 * self.batches)
        return Factors(torch.where(mean_E11 > 0, row_EO1, 0.0), torch.where(mean_E11 > 0, column_E1I, 0.0))


@dataclass(slots=True, eq=False)
class Places:
    """Codes and scales of some matrices under way.

    Attributes:
        quantized: what they were.
        place_EOI: where the weights lie on the grid; codes are the nearest values.
        log_EOG: logarithms of what scales are multiplied by.
        moment_EOG: mean of their gradients, weighted by how late they are.
        square_EOG: of these gradients' squares.
        curvature: of the loss by each weight.
        noise: squares of how many steps of the grid a batch says that a weight should be off its code.
        sign_EOI: those that weights are shaken by.
        backend: what moves them.
    """

    quantized: QuantizedTensor
    place_EOI: Tensor
    log_EOG: Tensor
    moment_EOG: Tensor
    square_EOG: Tensor
    curvature: _Mean
    noise: _Mean
    sign_EOI: Tensor
    backend: Backend

    @classmethod
    def of(cls, quantized: QuantizedTensor, leaning_EOI: Tensor, backend: Backend = Backend.AUTO) -> Places:
        """Where codes lie, and how far beside them their weights would lie best (`leanings`)."""
        q = quantized
        one = replace(q, scale=torch.ones_like(q.scale), global_scale=None)
        place_EOI = (dequantize(one) + leaning_EOI).contiguous()
        curvature, noise = (_Mean.like(place_EOI) for _ in range(2))
        log_EOG, moment_EOG, square_EOG = (torch.zeros_like(q.scale) for _ in range(3))
        signs = q.codes.new_empty(0)
        return cls(q, place_EOI, log_EOG, moment_EOG, square_EOG, curvature, noise, signs, backend)

    def shaken(self, generator: torch.Generator) -> Tensor:
        """The weights, each off by a little up or down at random."""
        bits = torch.randint(0, 2, self.place_EOI.shape, generator=generator, dtype=torch.int8)
        self.sign_EOI = bits.mul_(2).sub_(1).to(self.place_EOI.device)
        w_EOI, ground = self.weights(), self._ground
        ground.grouped(w_EOI).add_(ground.grouped(self.sign_EOI) * self._shake_EOG[..., None])
        return w_EOI

    def learn(self, gradient_EOI: Tensor) -> None:
        """Take what the gradient at shaken weights says of the curvature.

        That is the diagonal of the loss' Hessian: the mean product of random signs and the gradient at weights shaken
        by these signs (Hutchinson 1989; Bekas, Kokiopoulou and Saad 2007), averaged over rows and over columns.
        """
        found_EOI = gradient_EOI.float() * self.sign_EOI
        self._ground.grouped(found_EOI).div_(self._shake_EOG[..., None])
        self.curvature.add(found_EOI.sum(-1), found_EOI.sum(-2))
        self.sign_EOI = self.sign_EOI.new_empty(0)

    def move(self, gradient_EOI: Tensor, falling: float) -> None:
        """Move each place some of the way to where it should be, and scales; `falling` from one to nothing.

        The way is the shorter the more batches differ about it. Scales of 16 bits move by Adam (Kingma and Ba 2015).
        """
        gradient_EOI, ground = gradient_EOI.float().contiguous(), self._ground
        kernels = kernels_for(gradient_EOI, self.backend)
        weigh: Callable[..., tuple[Tensor, Tensor, Tensor]] = getattr(kernels, "weigh_places", _weigh)
        draw: Callable[..., None] = getattr(kernels, "draw_places", _draw)
        inverse = Factors(*map(_inverse, self.curvature.factors(_LEAST)))
        row_EO, column_EI, slope_EOG = weigh(ground, gradient_EOI, inverse)
        self.noise.add(row_EO, column_EI)
        draw(ground, gradient_EOI, inverse, self.noise.factors(), _CODE_RATE * falling, _MOST)
        if self._has_free_scales:
            self._scale_by(pool_rows(slope_EOG, self.quantized.scheme), _SCALE_RATE * falling)

    def weights(self) -> Tensor:
        """What these places and scales stand for, `[E, O, I]`."""
        kernels = kernels_for(self.place_EOI, self.backend)
        weights: Callable[[Ground], Tensor] = getattr(kernels, "weights_of_places", _weights)
        return weights(self._ground)

    def ended(self) -> QuantizedTensor:
        """The codes of these places, and the scales as they are stored."""
        q = self.quantized
        zero_EOG1 = None if q.zero is None else q.zero[..., None]
        codes = encode(self._ground.values(), q.scheme.format, zero_EOG1).flatten(-2)
        scale = round_scale(q.scale * self.log_EOG.exp(), q.scheme) if self._has_free_scales else q.scale
        return replace(q, codes=codes, scale=scale)

    @property
    def _has_free_scales(self) -> bool:
        """Whether scales can take nearly any value."""
        return self.quantized.scheme.format.scale is ScaleKind.MODEL

    def _scale_by(self, slope_EOG: Tensor, rate: float) -> None:
        """A step of Adam."""
        first, second = _BETAS
        batches = self.noise.batches
        self.moment_EOG.lerp_(slope_EOG, 1 - first)
        self.square_EOG.lerp_(slope_EOG.square(), 1 - second)
        mean_EOG, size_EOG = self.moment_EOG / (1 - first**batches), (self.square_EOG / (1 - second**batches)).sqrt_()
        self.log_EOG -= rate * mean_EOG.div_(size_EOG.clamp_min_(torch.finfo(torch.float32).tiny))

    @property
    def _ground(self) -> Ground:
        q = self.quantized
        scale_EOG = (q.effective_scale() * self.log_EOG.exp()).contiguous()
        zero_EOG = None if q.zero is None else q.zero.float().contiguous()
        return Ground(self.place_EOI, scale_EOG, zero_EOG, q.scheme.format)

    @property
    def _shake_EOG(self) -> Tensor:
        return self._ground.scale_EOG * max(_SHAKE, self.quantized.scheme.format.max_value / 64)


def _inverse(x: Tensor) -> Tensor:
    """One over each; zero where it is none."""
    return torch.where(x > 0, 1 / x, 0.0)


def _weigh(ground: Ground, gradient_EOI: Tensor, inverse: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """What a batch says: how many steps of the grid each weight should be off its code, and how scales should change.

    Args:
        ground: where the weights lie.
        gradient_EOI: of the loss at their codes.
        inverse: of the curvature.

    Returns:
        Sums of squares of the former over columns `[E, O]` and over rows `[E, I]`; derivatives by logarithms of scales
        `[E, O, G]`.
    """
    row_EO = torch.empty_like(inverse.row_EO1[..., 0])
    column_EI, slope_EOG = torch.zeros_like(inverse.column_E1I[:, 0]), torch.empty_like(ground.scale_EOG)
    for rows in ground.cuts():
        value_EOGS = ground.values(rows)
        # w = value * scale * exp(log), so its derivative is w itself
        slope_EOGS = ground.grouped(gradient_EOI[:, rows]) * value_EOGS
        slope_EOG[:, rows] = slope_EOGS.sum(-1).mul_(ground.scale_EOG[:, rows])
        off_EOGS = _away(ground, gradient_EOI, inverse, rows).div_(grid_steps(value_EOGS, ground.fmt))
        square_EOI = off_EOGS.square_().flatten(-2)
        row_EO[:, rows] = square_EOI.sum(-1)
        column_EI += square_EOI.sum(-2)
    return row_EO, column_EI, slope_EOG


def _draw(ground: Ground, gradient_EOI: Tensor, inverse: Factors, noise: Factors, rate: float, most: float) -> None:
    """Move places by `most` steps of the grid at most; arguments as in `_weigh`, and the mean of what it returns."""
    for rows in ground.cuts():
        value_EOGS, place_EOGS = ground.values(rows), ground.grouped(ground.place_EOI[:, rows])
        most_EOGS = grid_steps(value_EOGS, ground.fmt).mul_(most)
        noise_EOI = noise.row_EO1[:, rows] * noise.column_E1I
        rate_EOGS = ground.grouped(noise_EOI.add_(1).reciprocal_().mul_(rate))
        way_EOGS = value_EOGS.sub_(_away(ground, gradient_EOI, inverse, rows)).sub_(place_EOGS).mul_(rate_EOGS)
        place_EOGS += torch.minimum(torch.maximum(way_EOGS, -most_EOGS), most_EOGS)


def _away(ground: Ground, gradient_EOI: Tensor, inverse: Factors, rows: slice) -> Tensor:
    """How far each weight of some rows should be from its code, negative, in grid values `[E, O, G, S]`."""
    row_EOG1 = inverse.row_EO1[:, rows, :, None] / ground.scale_EOG[:, rows, :, None]
    away_EOGS = ground.grouped(gradient_EOI[:, rows]) * row_EOG1
    return away_EOGS.mul_(ground.grouped(inverse.column_E1I))


def _weights(ground: Ground) -> Tensor:
    """What places stand for."""
    w_EOI = torch.empty_like(ground.place_EOI)
    for rows in ground.cuts():
        torch.mul(ground.values(rows), ground.scale_EOG[:, rows, :, None], out=ground.grouped(w_EOI[:, rows]))
    return w_EOI
