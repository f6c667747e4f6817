"""Holding an export against its run, and against the engine that is to serve it."""

from alphaquant.verification.engine import PROBES, Likeness, compare, compare_with_dense, random_prompts
from alphaquant.verification.stored import Difference, Stored, check_stored

__all__ = [
    "PROBES",
    "Difference",
    "Likeness",
    "Stored",
    "check_stored",
    "compare",
    "compare_with_dense",
    "random_prompts",
]
