"""Typed reading of config.json: every getter names the key and what it expected."""

from __future__ import annotations

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
        self._where = where

    def _get(self, key: str, default: Any) -> Any:
        value = self._config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"config.json lacks {key!r}", where=self._where, remedy=f"add {key!r} to config.json")
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{key} is {value!r}; expected {expected}", where=self._where)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._config.get(key) is not None

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_SIZE:
            raise self._wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def choice(self, key: str, known: tuple[str, ...], default: str | None = None) -> str:
        """One of the known strings."""
        value = self._get(key, default)
        if value not in known:
            raise self._wrong(key, value, f"one of {', '.join(known)} (no other is implemented for this family)")
        return str(value)

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None where the key is absent or null."""
        return self.number(key) if self.has(key) else None

    def nullable_size(self, key: str, *, absent: int) -> int | None:
        """A positive integer; None where the key is null, `absent` where it is not there."""
        if key not in self._config:
            return absent
        return self.size(key) if self.has(key) else None

    def dtype(self) -> torch.dtype:
        """The dtype that the checkpoint declares; float32 where it says nothing."""
        key = "dtype" if self.has("dtype") else "torch_dtype"
        return _DTYPES[self.choice(key, tuple(_DTYPES), "float32")]

    def rope(self) -> RopeSpec:
        """Rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
        section = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if not isinstance(section, dict):
            raise self._wrong("rope_parameters", section, "an object")
        top_level_theta = self._config.get("rope_theta")
        rope = ConfigReader({"rope_theta": top_level_theta, **section}, f"{self._where}, rope")
        kind_key = "rope_type" if rope.has("rope_type") else "type"
        kind = RopeKind(rope.choice(kind_key, tuple(k.value for k in RopeKind), RopeKind.DEFAULT.value))
        theta = rope.number("rope_theta", 10000.0)
        if kind is RopeKind.DEFAULT:
            return RopeSpec(theta)
        if kind is RopeKind.LINEAR:
            return RopeSpec(theta, kind, rope.number("factor"))
        return RopeSpec(
            theta,
            kind,
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.size("original_max_position_embeddings"),
        )
