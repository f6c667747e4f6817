"""Tokenising a long text in a process of its own.

The library takes about 150 bytes for each byte of text, and leaves them behind in pieces: peak memory of the whole run
was that of its first step, and the tensors that came after it lay scattered and were a fifth slower.
"""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor

from alphaquant.errors import CalibrationError

__all__ = ["LONG_TEXT", "encode_apart"]

LONG_TEXT = 1 << 20
"""Characters from which on a process of its own pays."""

_PROGRAM = """
import array, sys, tokenizers
size = int(sys.argv[1])
tokenizer = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read(size).decode())
(encoding,) = tokenizer.encode_batch_fast([sys.stdin.buffer.read().decode()])
sys.stdout.buffer.write(array.array("q", encoding.ids).tobytes())
"""


def encode_apart(tokenizer_json: str, text: str) -> Tensor:
    """Token ids of a text, int64 `[M]`, with the special tokens that the post-processor adds.

    Raises:
        CalibrationError: the process failed.
    """
    definition = tokenizer_json.encode()
    command = [sys.executable, "-I", "-c", _PROGRAM, str(len(definition))]
    done = subprocess.run(command, input=definition + text.encode(), capture_output=True, check=False)  # noqa: S603
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise CalibrationError(
            f"the text cannot be tokenised: {reason[-1]}", remedy="give a shorter text, or a file of token ids"
        )
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.int64)
