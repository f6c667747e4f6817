"""Calibration and evaluation text, and the token windows drawn from it."""

from __future__ import annotations

from alphaquant.calibration.batches import loader_tokens
from alphaquant.calibration.mix import needs_tokenizer
from alphaquant.calibration.texts import SOURCES, Conversation, Split, is_tokenised, load_rows, load_text
from alphaquant.calibration.tokens import (
    TokenBatch,
    Tokenizer,
    calibration_tokens,
    evaluation_windows,
    load_tokenizer,
    token_digest,
)

__all__ = [
    "SOURCES",
    "Conversation",
    "Split",
    "TokenBatch",
    "Tokenizer",
    "calibration_tokens",
    "evaluation_windows",
    "is_tokenised",
    "load_rows",
    "load_text",
    "load_tokenizer",
    "loader_tokens",
    "needs_tokenizer",
    "token_digest",
]
