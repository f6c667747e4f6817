"""What each engine takes: which modules it loads as one, and which schemes it computes, by layout."""

from __future__ import annotations

from alphaquant.engines.directory import Serve, engine_notes, nameless_scheme, serve
from alphaquant.engines.parts import FUSED
from alphaquant.engines.profile import Legalized, Profile, TieGroup, Violation
from alphaquant.engines.rules import PROFILES, profile_of

__all__ = [
    "FUSED",
    "PROFILES",
    "Legalized",
    "Profile",
    "Serve",
    "TieGroup",
    "Violation",
    "engine_notes",
    "nameless_scheme",
    "profile_of",
    "serve",
]
