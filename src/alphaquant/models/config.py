"""Typed reading of config.json: every getter names the key and what it expected."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from alphaquant.errors import ConfigError
from alphaquant.models.spec import RopeKind, RopeSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ConfigReader"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MAX_SIZE = 1 << 31


class ConfigReader:
    """Typed access to one config.json; a wrong type or an unknown choice is a `ConfigError` that names the key."""

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self._config = config
        self.where = where

    def _get(self, key: str, default: Any) -> Any:
        value = self._config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"config.json lacks {key!r}", where=self.where, remedy=f"add {key!r} to config.json")
        return value

    def wrong(self, key: str, value: Any, expected: str) -> ConfigError:
        """The error for a value that is not what was expected."""
        remedy = f"check {key} in config.json; where it is right, alphaquant has no such model yet"
        return ConfigError(f"{key} is {value!r}; expected {expected}", where=self.where, remedy=remedy)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._config.get(key) is not None

    def size(self, key: str, default: int | None = None, *, or_key: str | None = None) -> int:
        """A positive integer; `or_key` is another spelling of the key.

        Raises:
            ConfigError: it is missing or something else, or the two spellings disagree.
        """
        if or_key is not None and self.has(or_key):
            if not self.has(key):
                return self.size(or_key)
            if self._config[key] != self._config[or_key]:
                raise self.wrong(key, self._config[key], f"the same as {or_key}, {self._config[or_key]!r}")
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_SIZE:
            raise self.wrong(key, value, "a positive integer")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """An integer from zero on."""
        value = self._get(key, default)
        if not _is_count(value):
            raise self.wrong(key, value, "an integer from 0 on")
        return int(value)

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of integers from zero on; empty where the key is absent or null."""
        value = self._config.get(key)
        if value is not None and not (isinstance(value, list) and all(map(_is_count, value))):
            raise self.wrong(key, value, "a list of integers from 0 on")
        return tuple(value or ())

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def number_or_zero(self, key: str) -> float:
        """A finite number from zero on; zero where the key is absent or null."""
        value = self._get(key, 0)
        return 0.0 if value == 0 and not isinstance(value, bool) else self.number(key)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def choice(self, key: str, known: tuple[str, ...], default: str | None = None) -> str:
        """One of the known strings."""
        value = self._get(key, default)
        if value not in known:
            raise self.wrong(key, value, f"one of {', '.join(known)} (no other is implemented for this family)")
        return str(value)

    def choices(self, key: str, known: tuple[str, ...], length: int) -> tuple[str, ...] | None:
        """A list of so many of the known strings; None where the key is absent or null."""
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            raise self.wrong(key, value, f"a list of {length}, one for each layer")
        for item in value:
            if item not in known:
                raise self.wrong(key, item, f"of {', '.join(known)} (no other is implemented for this family)")
        return tuple(value)

    def never(self, *keys: str) -> None:
        """Keys of what is not implemented: absent, null or false."""
        for key in keys:
            value = self._config.get(key)
            if value is not None and value is not False:
                raise self.wrong(key, value, "none, or false (it is not implemented for this family)")

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None where the key is absent or null."""
        return self.number(key) if self.has(key) else None

    def nullable_size(self, key: str, *, absent: int | None) -> int | None:
        """A positive integer; None where the key is null, `absent` where it is not there."""
        if key not in self._config:
            return absent
        return self.size(key) if self.has(key) else None

    def dtype(self) -> torch.dtype:
        """The dtype that the checkpoint declares; float32 where it says nothing."""
        key = "dtype" if self.has("dtype") else "torch_dtype"
        return _DTYPES[self.choice(key, tuple(_DTYPES), "float32")]

    def rope(self, default_theta: float = 10000.0) -> RopeSpec:
        """Rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
        rope = self._rope_section()
        kind_key = "rope_type" if rope.has("rope_type") else "type"
        kind = RopeKind(rope.choice(kind_key, tuple(k.value for k in RopeKind), RopeKind.DEFAULT.value))
        theta = rope.number("rope_theta", default_theta)
        if kind is RopeKind.DEFAULT:
            return RopeSpec(theta)
        if kind is RopeKind.YARN:
            return self._yarn(rope, theta)
        factor = rope.number("factor")
        gain = _mscale(factor, rope.number_or_zero("mscale_all_dim")) ** 2
        spec = RopeSpec(theta, kind, factor, latent_gain=gain)
        if kind is RopeKind.DYNAMIC:
            return replace(spec, original_max_positions=self.size("max_position_embeddings"))
        if kind is RopeKind.LLAMA3:
            return replace(
                spec,
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_positions=rope.size("original_max_position_embeddings"),
            )
        return spec

    def _yarn(self, rope: ConfigReader, theta: float) -> RopeSpec:
        if theta <= 1:
            raise rope.wrong("rope_theta", theta, "more than 1")
        longest = self.size("max_position_embeddings")
        key = "original_max_position_embeddings"
        original = self.size(key) if self.has(key) else rope.size(key, longest)  # as transformers ranks them
        factor = rope.number("factor", longest / original)
        of_rope, of_all = rope.number_or_zero("mscale"), rope.number_or_zero("mscale_all_dim")
        told = _mscale(factor, of_rope) / _mscale(factor, of_all) if of_rope and of_all else _mscale(factor, 1.0)
        return RopeSpec(
            theta,
            RopeKind.YARN,
            factor,
            original_max_positions=original,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            truncate=rope.flag("truncate", default=True),
            attention_factor=rope.number("attention_factor", told),
            latent_gain=_mscale(factor, of_all) ** 2,
        )

    def rotary_share(self, default: float | None = None) -> float:
        """How much of a head turns with the position; without a default only all of it is implemented."""
        rope, key = self._rope_section(), "partial_rotary_factor"
        share = rope.number(key, default or 1.0)
        if share > 1 or (default is None and share != 1):
            raise rope.wrong(key, share, "1 (no other is implemented for this family)" if default is None else "0 to 1")
        return share

    def _rope_section(self) -> ConfigReader:
        section = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if not isinstance(section, dict):
            raise self.wrong("rope_parameters", section, "an object")
        at_top = {key: self._config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
        return ConfigReader(at_top | section, f"{self.where}, rope")


def _mscale(factor: float, weight: float) -> float:
    """YaRN's growth of attention with length, equation 22."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_SIZE
