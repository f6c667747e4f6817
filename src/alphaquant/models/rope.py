"""Rotary position embedding: cosines and sines for the positions of a sequence, and its length extensions.

Shapes: L positions, C turned channels of a head; frequencies have C / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alphaquant.models.spec import RopeKind, RopeSpec

__all__ = ["rope_tables"]


def rope_tables(
    spec: RopeSpec, rotary_dim: int, length: int, device: torch.device | str = "cpu", start: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[L, C]` in fp32 for positions `start … start + length`, half-split layout.

    Source: Su et al. 2021 (RoFormer).
    """
    positions_L = torch.arange(start, start + length, device=device)
    frequency = _frequencies(spec, rotary_dim, start + length).to(device)
    angles = positions_L.float()[:, None] * frequency[None]
    angles = torch.cat([angles, angles], -1)
    return angles.cos() * spec.attention_factor, angles.sin() * spec.attention_factor


def _frequencies(spec: RopeSpec, rotary_dim: int, reach: int) -> Tensor:
    """Angle a position for each pair of channels; `reach` is the length of the sequence so far."""
    exponents = torch.arange(0, rotary_dim, 2).float() / rotary_dim
    theta = spec.theta
    if spec.kind is RopeKind.DYNAMIC:
        stretch = max(1.0, reach / spec.original_max_positions)
        theta *= (spec.factor * stretch - (spec.factor - 1)) ** (rotary_dim / max(rotary_dim - 2, 1))
    frequency = 1.0 / theta**exponents
    if spec.kind is RopeKind.LINEAR:
        return frequency / spec.factor
    if spec.kind is RopeKind.LLAMA3:
        return _llama3(spec, frequency)
    return _yarn(spec, frequency) if spec.kind is RopeKind.YARN else frequency


def _llama3(spec: RopeSpec, frequency: Tensor) -> Tensor:
    """As published with Llama 3.1: short waves stay, long ones are stretched, those between change over."""
    turns = spec.original_max_positions * frequency / (2 * math.pi)
    stay = ((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
    return (1 - stay) * frequency / spec.factor + stay * frequency


def _yarn(spec: RopeSpec, frequency: Tensor) -> Tensor:
    """Peng et al. 2023, section 3.2: channels between `beta_fast` and `beta_slow` turns change over linearly."""
    pairs = len(frequency)

    def pair_with(turns: float) -> float:
        wavelength = spec.original_max_positions / (turns * 2 * math.pi)
        return pairs * math.log(wavelength) / math.log(spec.theta)

    low, high = pair_with(spec.beta_fast), pair_with(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    stretched = ((torch.arange(pairs).float() - low) / ((high - low) or 0.001)).clamp(0, 1)
    return frequency / spec.factor * stretched + frequency * (1 - stretched)
