"""How figures and names are written: sizes, times, percents, and what markdown would take for its own."""

from __future__ import annotations

import re
from datetime import timezone
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["FILTERS", "count", "duration", "human_bytes", "markdown_code", "markdown_text", "percent", "short"]


def human_bytes(size: float) -> str:
    """`1536` → `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def percent(share: float) -> str:
    """Percent to about three digits, without the sign."""
    value = 100 * share
    if value == 0:
        return "0"
    if value < 0.01:
        return f"{value:.2g}"
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f}"


def count(number: int, noun: str) -> str:
    """`1 module`, `2 modules`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def short(number: float) -> str:
    """`3932160` → `3.93 M`."""
    for unit in ("", " K", " M", " B"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def duration(seconds: float) -> str:
    """`849.2` → `14 min 09 s`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _when(time: datetime) -> str:
    return f"{time.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def markdown_code(text: str) -> str:
    """A code span that also holds in a table's cell."""
    text = " ".join(str(text).split()).replace("|", "\\|")
    if not text:
        return ""
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def markdown_text(text: str) -> str:
    """Free text with markdown's and HTML's own characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|&#~])", r"\\\1", " ".join(str(text).split()))


def _words(name: str) -> str:
    return name.replace("_", " ")


FILTERS = {
    "bytes": human_bytes,
    "duration": duration,
    "when": _when,
    "code": markdown_code,
    "plain": markdown_text,
    "short": short,
    "setting": _setting,
    "words": _words,
    "percent": percent,
}
