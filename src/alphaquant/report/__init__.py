"""Run records to something one would rather look at: HTML and markdown. Reads files only, needs no model."""

from __future__ import annotations

from alphaquant.report.render import human_bytes, write_report

__all__ = ["human_bytes", "write_report"]
