"""Errors that a user can act on: what is wrong, where, and the remedy."""

from __future__ import annotations

__all__ = [
    "AlphaQuantError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "NumericsError",
    "OutputError",
    "PlanError",
]


_MOST_CHARACTERS = 1000


class AlphaQuantError(Exception):
    """An error whose message names the value, the place and the remedy.

    Args:
        what: what is wrong, with the offending value.
        where: the file, module or tensor at fault.
        remedy: what to do about it.

    A run that is stopped by it sets `kept` to what it leaves, and how to go on.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = _short(what)
        self.where = where if where is None else _short(where)
        self.remedy = remedy if remedy is None else _short(remedy)
        self.kept: str | None = None
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """The message, one line for each part that is known."""
        parts = [self.what]
        if self.where is not None:
            parts.append(f"where: {self.where}")
        if self.remedy is not None:
            parts.append(f"remedy: {self.remedy}")
        if self.kept is not None:
            parts.append(f"kept: {self.kept}")
        return parts


def _short(text: str) -> str:
    """A text that fits a screen: it may quote a file that a stranger wrote."""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


class ConfigError(AlphaQuantError):
    """A model's config.json, or an option, says something that is not known or not possible."""


class CheckpointError(AlphaQuantError):
    """A checkpoint is missing, truncated, inconsistent or of a kind that is not read."""


class PlanError(AlphaQuantError):
    """A plan is malformed, or does not fit the model."""


class CalibrationError(AlphaQuantError):
    """The calibration or evaluation text cannot be had, or is too short."""


class NumericsError(AlphaQuantError):
    """NaN or infinity in weights, activations or a Hessian."""


class OutputError(AlphaQuantError):
    """The output directory cannot be written, or holds something else."""


class EngineError(AlphaQuantError):
    """An engine does not load a checkpoint, or computes something else than its weights say."""
