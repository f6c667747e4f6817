"""Where text comes from: WikiText-2 and C4, the bundled text, and files, also pre-tokenised ones."""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from alphaquant.checkpoint import read_safetensors
from alphaquant.errors import CalibrationError, CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SOURCES", "Conversation", "Split", "is_tokenised", "load_rows", "load_text"]

Split = Literal["calibration", "evaluation"]

SOURCES = ("bundled", "c4", "wikitext2")
_ACCEPTED = (
    f"give one of {', '.join(SOURCES)}, or a file: text, .jsonl (`text` or chat `messages`), "
    "or token ids as .json or .safetensors"
)
_TOKENISED_SUFFIXES = (".json", ".safetensors")
_MAX_JSON_BYTES = 100_000_000  # parsed, it takes four times its size
_C4_DOCUMENTS = 10_000  # of the 356 317 in one file: some five million tokens, in seconds rather than minutes
_C4_FILES = {
    "calibration": ("train", "en/c4-train.00000-of-01024.json.gz"),
    "evaluation": ("validation", "en/c4-validation.00000-of-00008.json.gz"),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages that a tokenizer's chat template turns into text; ``place`` is their file and line."""

    messages: list[dict[str, Any]]
    place: str


def load_text(source: str, *, split: Split = "calibration") -> str | list[str | Conversation]:
    """The text of a source: one string, or documents that are tokenised apart (C4, .jsonl).

    A name in `SOURCES` wins over a file of that name: write ``./c4`` for the file.

    Raises:
        CalibrationError: the source is unknown, cannot be had, is malformed or holds no text.
    """
    if source == "wikitext2":
        text: str | list[str | Conversation] = _load_wikitext2(split)
    elif source == "c4":
        text = _load_c4(split)
    elif source == "bundled":
        text = _load_bundled(split)
    elif (path := _find_file(source)).suffix == ".jsonl":
        text = _load_jsonl(path)
    else:
        text = _read_text(path)
    if not (text.strip() if isinstance(text, str) else text):
        raise CalibrationError(f"{source!r} holds no text", where=source, remedy=_ACCEPTED)
    return text


def is_tokenised(source: str) -> bool:
    """Whether a source is a file of token ids (.json, .safetensors), which needs no tokenizer."""
    return source not in SOURCES and Path(source).suffix in _TOKENISED_SUFFIXES


def load_rows(source: str) -> list[Tensor]:
    """The rows of a pre-tokenised file, int64 [L] each.

    A .json file is a list of lists of integers; a .safetensors file holds one integer tensor ``input_ids`` [N, L].

    Raises:
        CalibrationError: the file is missing or holds something else.
    """
    path = _find_file(source)
    rows = _load_json_rows(path) if path.suffix == ".json" else _load_safetensors_rows(path)
    if not rows:
        raise CalibrationError("the file holds no rows of token ids", where=source, remedy=_ACCEPTED)
    return rows


def _find_file(source: str) -> Path:
    what = "is no known text and no file"
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            what = "is a directory"
    except (OSError, RuntimeError):  # too long for a path, or ~ of an unknown user
        pass
    close = difflib.get_close_matches(source.lower(), SOURCES, n=1)
    hint = f"did you mean {close[0]!r}? Else " if close else ""
    raise CalibrationError(f"{source!r} {what}", where=source, remedy=hint + _ACCEPTED)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> CalibrationError:
    return CalibrationError(
        f"{path.name} cannot be read as UTF-8 text: {error}", where=str(path), remedy="give a text file in UTF-8"
    )


def _load_jsonl(path: Path) -> list[str | Conversation]:
    documents: list[str | Conversation] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    documents.append(_parse_line(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    return [document for document in documents if not isinstance(document, str) or document.strip()]


def _parse_line(line: str, place: str) -> str | Conversation:
    remedy = 'each line is {"text": "..."} or {"messages": [{"role": "...", "content": "..."}, ...]}'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"the line is not valid JSON: {error}", where=place, remedy=remedy) from error
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        text: str = value["text"]
        return text
    messages = value.get("messages") if isinstance(value, dict) else None
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return Conversation(messages, place)
    raise CalibrationError("the line holds neither a text nor chat messages", where=place, remedy=remedy)


def _is_message(value: Any) -> bool:
    # A message that only calls tools has no content.
    return (
        isinstance(value, dict) and isinstance(value.get("role"), str) and bool({"content", "tool_calls"} & set(value))
    )


def _load_json_rows(path: Path) -> list[Tensor]:
    remedy = "the file is a JSON list of lists of token ids: [[1, 2, 3], [4, 5, 6]]"
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise CalibrationError(
            f"{path.name} has more than {_MAX_JSON_BYTES} bytes",
            where=str(path),
            remedy="save one integer tensor `input_ids` of shape [rows, length] as .safetensors",
        )
    try:
        rows = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path.name} is not valid JSON: {error}", where=str(path), remedy=remedy) from error
    if not isinstance(rows, list):
        raise CalibrationError(f"{path.name} is no list of lists of integers", where=str(path), remedy=remedy)
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not all(type(item) is int and abs(item) < 1 << 63 for item in row):
            raise CalibrationError(f"row {number} is no list of integers", where=str(path), remedy=remedy)
    return [torch.tensor(row, dtype=torch.int64) for row in rows]


def _load_safetensors_rows(path: Path) -> list[Tensor]:
    try:
        tensors = read_safetensors(path)
    except CheckpointError as error:
        raise CalibrationError(error.what, where=error.where, remedy=error.remedy) from error
    ids = tensors.get("input_ids")
    if len(tensors) != 1 or ids is None or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        held = ", ".join(
            f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            for name, tensor in tensors.items()
        )
        raise CalibrationError(
            f"{path.name} is no file of token ids: it holds {held or 'nothing'}"[:500],
            where=str(path),
            remedy="save one integer tensor `input_ids` of shape [rows, length]",
        )
    return list(ids.to(torch.int64))


def _load_bundled(split: Split) -> str:
    resource = importlib.resources.files("alphaquant") / "data" / f"{split}.txt"
    try:
        return resource.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(
            f"the bundled text cannot be read: {error}", where=str(resource), remedy="install alphaquant again"
        ) from error


def _load_wikitext2(split: Split) -> str:
    rows = _load_dataset(
        "wikitext2",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        split="train" if split == "calibration" else "test",
        purpose=split,
    )
    return "\n\n".join(rows)


def _load_c4(split: Split) -> list[str | Conversation]:
    name, file = _C4_FILES[split]
    rows = _load_dataset("c4", "allenai/c4", data_files={name: file}, split=f"{name}[:{_C4_DOCUMENTS}]", purpose=split)
    return [row for row in rows if row.strip()]


def _load_dataset(source: str, *args: Any, purpose: Split, **kwargs: Any) -> list[str]:
    """The column ``text`` of a dataset; offline, gated or not installed, there is one remedy and no silent switch."""
    offline = f"use {'--calib bundled' if purpose == 'calibration' else 'the source bundled'}, or give a FILE of text"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise CalibrationError(
            f"{source!r} needs the package `datasets`, which cannot be imported: {error}",
            where=source,
            remedy=f"pip install 'alphaquant-moe[hf]'; or {offline}",
        ) from error
    try:
        return [str(text) for text in datasets.load_dataset(*args, **kwargs)["text"]]
    except Exception as error:
        raise CalibrationError(
            f"{source!r} cannot be downloaded: {type(error).__name__}: {error}",
            where=str(args[0]),
            remedy=f"check the network; or {offline}",
        ) from error
