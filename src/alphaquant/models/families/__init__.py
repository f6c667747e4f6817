"""The families: one short descriptor each, from config.json to what the decoder needs to know."""

from alphaquant.models.families.base import Family
from alphaquant.models.families.registry import FAMILIES, detect

__all__ = ["FAMILIES", "Family", "detect"]
