"""Run records to something one would rather look at: HTML and markdown. Reads files only, needs no model."""

from __future__ import annotations

from alphaquant.report.frontier import write_frontier
from alphaquant.report.render import write_comparison, write_report
from alphaquant.wording import duration, human_bytes, short

__all__ = ["duration", "human_bytes", "short", "write_comparison", "write_frontier", "write_report"]
