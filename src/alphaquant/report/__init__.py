"""Run records to something one would rather look at: HTML and markdown. Reads files only, needs no model."""

from __future__ import annotations

from alphaquant.report.render import QUALITY, write_comparison, write_report
from alphaquant.report.text import human_bytes, short

__all__ = ["QUALITY", "human_bytes", "short", "write_comparison", "write_report"]
