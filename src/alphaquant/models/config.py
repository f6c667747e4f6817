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
        self.where = where

    def _get(self, key: str, default: Any) -> Any:
        value = self._config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"config.json lacks {key!r}", where=self.where, remedy=f"add {key!r} to config.json")
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> ConfigError:
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
                raise self._wrong(key, self._config[key], f"the same as {or_key}, {self._config[or_key]!r}")
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_SIZE:
            raise self._wrong(key, value, "a positive integer")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """An integer from zero on."""
        value = self._get(key, default)
        if not _is_count(value):
            raise self._wrong(key, value, "an integer from 0 on")
        return int(value)

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of integers from zero on; empty where the key is absent or null."""
        value = self._config.get(key)
        if value is not None and not (isinstance(value, list) and all(map(_is_count, value))):
            raise self._wrong(key, value, "a list of integers from 0 on")
        return tuple(value or ())

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

    def choices(self, key: str, known: tuple[str, ...], length: int) -> tuple[str, ...] | None:
        """A list of so many of the known strings; None where the key is absent or null."""
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            raise self._wrong(key, value, f"a list of {length}, one for each layer")
        for item in value:
            if item not in known:
                raise self._wrong(key, item, f"of {', '.join(known)} (no other is implemented for this family)")
        return tuple(value)

    def never(self, *keys: str) -> None:
        """Keys of what is not implemented: absent, null or false."""
        for key in keys:
            value = self._config.get(key)
            if value is not None and value is not False:
                raise self._wrong(key, value, "none, or false (it is not implemented for this family)")

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
        section = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if not isinstance(section, dict):
            raise self._wrong("rope_parameters", section, "an object")
        top_level_theta = self._config.get("rope_theta")
        rope = ConfigReader({"rope_theta": top_level_theta, **section}, f"{self.where}, rope")
        kind_key = "rope_type" if rope.has("rope_type") else "type"
        kind = RopeKind(rope.choice(kind_key, tuple(k.value for k in RopeKind), RopeKind.DEFAULT.value))
        theta = rope.number("rope_theta", default_theta)
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


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_SIZE
