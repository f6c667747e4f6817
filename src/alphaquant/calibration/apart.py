"""Tokenising a long text in a process of its own.

The library takes about 150 bytes for each byte of text that it has in hand, and leaves them behind in pieces: the
tensors that came after it lay scattered and were a fifth slower.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from alphaquant.errors import CalibrationError

__all__ = ["LONG_TEXT", "encode_apart"]

LONG_TEXT = 1 << 20
"""Characters from which on a process of its own pays."""

_PROGRAM = Path(__file__).with_name("pieces.py")


def encode_apart(tokenizer_json: str, text: str) -> Tensor:
    """Token ids of a text, int64 `[M]`, with the special tokens that the post-processor adds.

    Raises:
        CalibrationError: the process failed.
    """
    definition = tokenizer_json.encode()
    command = [sys.executable, "-I", str(_PROGRAM), str(len(definition))]
    done = subprocess.run(command, input=definition + text.encode(), capture_output=True, check=False)  # noqa: S603
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise CalibrationError(
            f"the text cannot be tokenised: {reason[-1]}", remedy="give a shorter text, or a file of token ids"
        )
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.int64)
