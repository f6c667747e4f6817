"""Holding an export against its run, and against the engine that is to serve it."""

from alphaquant.verification.engine import PROBES, Likeness, compare, random_prompts

__all__ = ["PROBES", "Likeness", "compare", "random_prompts"]
