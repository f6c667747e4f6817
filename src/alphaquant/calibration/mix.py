"""Several texts by share: `wikitext2:0.4,c4:0.4,FILE:0.2`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from alphaquant.calibration.texts import SOURCES, is_tokenised
from alphaquant.errors import CalibrationError

__all__ = ["Part", "apportion", "needs_tokenizer", "parse_mix"]

_REMEDY = "give each text a share, all of them summing to 1: wikitext2:0.4,c4:0.4,FILE:0.2"
_TOLERANCE = 1e-6


class Part(NamedTuple):
    """A text and its share of the windows."""

    source: str
    share: float


def parse_mix(source: str) -> list[Part]:
    """The texts of a source by share; a single text, or an existing file of any name, has all of it.

    Raises:
        CalibrationError: a share is missing, is no number above 0, or the shares do not sum to 1.
    """
    is_mix = "," in source or _is_number(source.rpartition(":")[2])
    if not is_mix or source in SOURCES or _is_file(source):
        return [Part(source, 1.0)]
    parts = [_part(piece.strip(), source) for piece in source.split(",")]
    total = math.fsum(part.share for part in parts)
    if abs(total - 1) > _TOLERANCE:
        raise CalibrationError(f"the shares sum to {total:g}, not to 1", where=source, remedy=_REMEDY)
    return parts


def needs_tokenizer(source: str) -> bool:
    """Whether any text of a source is not a file of token ids."""
    return not all(is_tokenised(part.source) for part in parse_mix(source))


def apportion(total: int, parts: list[Part]) -> list[int]:
    """Whole windows for each part, summing to `total`: by largest remainder, the earlier part first."""
    exact = [part.share * total for part in parts]
    counts = [math.floor(share + _TOLERANCE) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _part(piece: str, source: str) -> Part:
    name, _, share = piece.rpartition(":")
    if not name or not _is_number(share) or not 0 < float(share) <= 1:
        raise CalibrationError(f"{piece!r} is no text with a share between 0 and 1", where=source, remedy=_REMEDY)
    return Part(name, float(share))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_file(source: str) -> bool:
    try:
        return Path(source).expanduser().is_file()
    except (OSError, RuntimeError):  # too long for a path, or ~ of an unknown user
        return False
