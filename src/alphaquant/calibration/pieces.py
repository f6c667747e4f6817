"""Token ids of a long text piece by piece: on all cores, and in memory for a few pieces at a time.

Run as a program by `apart`, of which it needs to know nothing: the size of a tokenizer's definition in its argument,
definition and text on its input, ids as 64-bit integers on its output.
"""

from __future__ import annotations

import re
import sys
from array import array
from itertools import islice

from tokenizers import Tokenizer

__all__ = ["encode"]

_PIECE = 1 << 17  # characters, at least
_AT_ONCE = 64  # pieces
_CONTEXT = 256  # characters on either side of a border that tell whether it is one
_TRIES = 64  # borders that are looked at before a text is left whole
_BORDER = re.compile(r"(?<=\S)(?=\s\S)")


def encode(tokenizer: Tokenizer, text: str) -> array[int]:
    """The ids that the tokenizer gives for the whole text, with its special tokens."""
    pieces = _split(tokenizer, text)
    ids = array("q", tokenizer.encode_batch_fast(pieces[:1])[0].ids)
    if len(pieces) == 1:
        return ids
    plain = array("q", _ids(tokenizer, pieces[0]))
    before = next((k for k in range(len(ids) - len(plain) + 1) if ids[k : k + len(plain)] == plain), None)
    if before is None:
        return array("q", tokenizer.encode_batch_fast([text])[0].ids)
    ids, last = ids[: before + len(plain)], ids[before + len(plain) :]
    for start in range(1, len(pieces), _AT_ONCE):
        for encoding in tokenizer.encode_batch_fast(pieces[start : start + _AT_ONCE], add_special_tokens=False):
            ids.extend(encoding.ids)
    return ids + last


def _split(tokenizer: Tokenizer, text: str) -> list[str]:
    """Pieces between which the tokenizer sees a border; the whole text where there is none for long."""
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        candidates = (match.start() for match in islice(_BORDER.finditer(text, start + _PIECE), _TRIES))
        border = next((at for at in candidates if _is_border(tokenizer, text, at)), None)
        if border is None:
            return [text]
        pieces.append(text[start:border])
        start = border
    return [*pieces, text[start:]]


def _is_border(tokenizer: Tokenizer, text: str, at: int) -> bool:
    """Whether what lies around it has the same ids in one piece as in two."""
    left, right = text[max(0, at - _CONTEXT) : at], text[at : at + _CONTEXT]
    return _ids(tokenizer, left + right) == _ids(tokenizer, left) + _ids(tokenizer, right)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _main() -> None:
    tokenizer = Tokenizer.from_str(sys.stdin.buffer.read(int(sys.argv[1])).decode())
    sys.stdout.buffer.write(encode(tokenizer, sys.stdin.buffer.read().decode()).tobytes())


if __name__ == "__main__":
    _main()
