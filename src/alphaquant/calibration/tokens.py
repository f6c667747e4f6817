"""From text to windows of token ids, by the protocol of GPTQ: random windows of one long tokenised text.

Legend: N windows or rows, L tokens in a window (seqlen), M tokens in the whole text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
import torch

from alphaquant.calibration.apart import LONG_TEXT, encode_apart
from alphaquant.calibration.mix import apportion, parse_mix
from alphaquant.calibration.texts import Conversation, Split, is_tokenised, load_rows, load_text
from alphaquant.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from torch import Tensor

__all__ = [
    "TokenBatch",
    "Tokenizer",
    "calibration_tokens",
    "check_vocabulary",
    "evaluation_windows",
    "load_tokenizer",
    "token_digest",
]

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEMPLATE_REMEDY = "give text instead of chat messages, or add a chat_template.jinja to the model directory"
_MAX_BYTES = 100_000_000  # three times that of the largest tokenizer.json that is known
# Templates that print today's date must not make tokens, and a resumed run, depend on it.
_TODAY = datetime(2025, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Windows of token ids.

    Attributes:
        ids: int64 [N, L].
        source: the source as it was given.
        digest: sha256 (hex) of the shape and the ids.
        num_available: tokens in the whole source.
        warnings: what a user should know, such as fewer windows than asked for.
        coverage: what choosing windows by the experts they reach has done, where that was asked for.
    """

    ids: Tensor
    source: str
    digest: str
    num_available: int
    warnings: tuple[str, ...] = ()
    coverage: Mapping[str, Any] | None = None


class Tokenizer:
    """A model's tokenizer.json, and its chat template; made by `load_tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer, directory: Path) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._directory = directory

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the post-processor adds; never cut, never padded."""
        return self.encode_batch([text])[0]

    def encode_tensor(self, text: str) -> Tensor:
        """The same as int64 `[M]`; a long text is tokenised in a process of its own."""
        if len(text) < LONG_TEXT:
            return torch.tensor(self.encode(text), dtype=torch.int64)
        return encode_apart(self._backend.to_str(), text)

    def encode_batch(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text. Rendered chats hold their special tokens already."""
        # The fast call leaves out offsets, which are not read: the same ids in a third of the time.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of a conversation by the model's chat template, without a prompt for the next answer.

        The template runs in a sandbox. ``strftime_now`` is a fixed day, so that the text does not change overnight.

        Raises:
            CalibrationError: there is no template, or it does not take these messages.
        """
        template, path, special_tokens = self._template
        try:
            # The names that transformers defines: templates ask whether `tools` is none.
            return template.render(
                **special_tokens, messages=list(messages), tools=None, documents=None, add_generation_prompt=False
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise CalibrationError(
                f"the chat template does not take the messages: {type(error).__name__}: {error}",
                where=str(path),
                remedy="correct the messages, or give text instead",
            ) from error

    @functools.cached_property
    def _template(self) -> tuple[jinja2.Template, Path, dict[str, str]]:
        """The compiled chat template, its file, and the special tokens that it may print."""
        text, path, special_tokens = self._find_template()
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _TODAY.strftime
        try:
            return environment.from_string(text), path, special_tokens
        except (jinja2.TemplateError, RecursionError) as error:
            raise CalibrationError(
                f"the chat template is malformed: {error}", where=str(path), remedy=_TEMPLATE_REMEDY
            ) from error

    def _find_template(self) -> tuple[str, Path, dict[str, str]]:
        config_path = self._directory / "tokenizer_config.json"
        config = _read_config(config_path) if config_path.is_file() else {}
        special_tokens = {}
        for key in _SPECIAL_TOKENS:
            token = config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special_tokens[key] = token
        file = self._directory / "chat_template.jinja"
        if file.is_file():
            _require_size(file)
            try:
                return file.read_text(encoding="utf-8"), file, special_tokens
            except (OSError, UnicodeDecodeError) as error:
                raise CalibrationError(
                    f"{file.name} cannot be read: {error}", where=str(file), remedy=_TEMPLATE_REMEDY
                ) from error
        template = config.get("chat_template")
        if isinstance(template, list):  # several by name
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        if not isinstance(template, str):
            raise CalibrationError(
                "the tokenizer has no chat template, which chat messages need",
                where=str(self._directory),
                remedy=_TEMPLATE_REMEDY,
            )
        return template, config_path, special_tokens


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The tokenizer of a model directory.

    Raises:
        CalibrationError: there is no tokenizer.json, or it cannot be read.
    """
    path = Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        raise CalibrationError(
            "no tokenizer.json in the model directory",
            where=str(path),
            remedy="save the tokenizer with transformers as a fast tokenizer "
            "(AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR)), or give a file of token ids",
        )
    _require_size(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise CalibrationError(
            f"tokenizer.json cannot be read: {error}",
            where=str(path),
            remedy="download it again, or update the package `tokenizers`",
        ) from error
    return Tokenizer(backend, Path(model_dir))


def calibration_tokens(
    source: str,
    tokenizer: Tokenizer | None,
    *,
    num_samples: int,
    seqlen: int,
    seed: int,
    vocab_size: int,
    split: Split = "calibration",
) -> TokenBatch:
    """Random windows of the whole tokenised text, or rows of a pre-tokenised file; of several texts by share.

    The text is tokenised in one piece (documents one by one, then joined) and windows may overlap, as in GPTQ
    (Frantar et al., arXiv:2210.17323). Rows are taken as they are, cut to ``seqlen``; of more rows than
    ``num_samples`` a random choice. A pre-tokenised file needs no tokenizer. Of ``A:0.4,B:0.6`` each text gives its
    share of the windows, in this order.

    Raises:
        CalibrationError: the text cannot be had, is shorter than one window, or an id is outside the vocabulary; the
            shares of several are not shares.
    """
    _check_positive(num_samples=num_samples, seqlen=seqlen)
    parts = parse_mix(source)
    counts = apportion(num_samples, parts)
    batches = [
        _draw(part.source, tokenizer, num_samples=count, seqlen=seqlen, seed=seed, vocab_size=vocab_size, split=split)
        for part, count in zip(parts, counts, strict=True)
        if count
    ]
    if parts[0].source == source:
        return batches[0]
    ids_NL = torch.cat([batch.ids for batch in batches])
    empty = [part.source for part, count in zip(parts, counts, strict=True) if not count]
    warnings = [f"{name}: its share of {num_samples} windows is none" for name in empty]
    warnings += [warning for batch in batches for warning in batch.warnings]
    num_available = sum(batch.num_available for batch in batches)
    return TokenBatch(ids_NL, source, token_digest(ids_NL), num_available, tuple(warnings))


def _draw(
    source: str,
    tokenizer: Tokenizer | None,
    *,
    num_samples: int,
    seqlen: int,
    seed: int,
    vocab_size: int,
    split: Split,
) -> TokenBatch:
    """Windows of one text."""
    generator = torch.Generator().manual_seed(seed)
    if is_tokenised(source):
        ids_NL, num_available = _load_row_batch(source, seqlen, vocab_size)
        num_windows = len(ids_NL)
        if num_windows > num_samples:
            ids_NL = ids_NL[torch.randperm(num_windows, generator=generator)[:num_samples]]
    else:
        ids_M = _tokenise(source, tokenizer, split)
        num_available, num_windows = len(ids_M), _count_windows(source, len(ids_M), seqlen)
        num_drawn = min(num_samples, num_windows)
        last = num_available - seqlen
        # randint excludes its end: the very last window is never drawn, and a text of one window needs no draw.
        starts_N = torch.randint(0, last, (num_drawn,), generator=generator) if last else torch.zeros(1).long()
        ids_NL = ids_M[starts_N[:, None] + torch.arange(seqlen)]
        check_vocabulary(source, ids_NL, vocab_size)
    return _make_batch(source, ids_NL, num_available, num_samples, num_windows)


def evaluation_windows(
    source: str,
    tokenizer: Tokenizer | None,
    *,
    seqlen: int,
    max_windows: int | None,
    vocab_size: int,
) -> TokenBatch:
    """Windows side by side from the start of the whole tokenised text (its evaluation split), or a file's rows.

    Args:
        source: as for `calibration_tokens`.
        tokenizer: the model's; a pre-tokenised file needs none.
        seqlen: tokens in a window.
        max_windows: at most so many windows; None for all.
        vocab_size: ids must be below it.

    Raises:
        CalibrationError: the text cannot be had, is shorter than one window, or an id is outside the vocabulary.
    """
    _check_positive(max_windows=1 if max_windows is None else max_windows, seqlen=seqlen)
    if is_tokenised(source):
        ids_NL, num_available = _load_row_batch(source, seqlen, vocab_size)
        num_windows = len(ids_NL)
        ids_NL = ids_NL[:max_windows]
    else:
        ids_M = _tokenise(source, tokenizer, "evaluation")
        num_available, num_windows = len(ids_M), _count_windows(source, len(ids_M), seqlen)
        num_taken = num_windows if max_windows is None else min(max_windows, num_windows)
        ids_NL = ids_M[: num_taken * seqlen].view(num_taken, seqlen)
        check_vocabulary(source, ids_NL, vocab_size)
    return _make_batch(source, ids_NL, num_available, max_windows, num_windows)


def _tokenise(source: str, tokenizer: Tokenizer | None, split: Split) -> Tensor:
    if tokenizer is None:
        raise CalibrationError(
            "text needs a tokenizer",
            where=source,
            remedy="add tokenizer.json to the model, or give a file of token ids",
        )
    text = load_text(source, split=split)
    if isinstance(text, str):
        return tokenizer.encode_tensor(text)
    texts = [document if isinstance(document, str) else _render(document, tokenizer) for document in text]
    is_plain = [isinstance(document, str) for document in text]
    encoded = {
        plain: iter(
            tokenizer.encode_batch(
                [text for text, is_it in zip(texts, is_plain, strict=True) if is_it is plain], special_tokens=plain
            )
        )
        for plain in (True, False)
    }
    return torch.tensor([item for plain in is_plain for item in next(encoded[plain])], dtype=torch.int64)


def _render(conversation: Conversation, tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.render_chat(conversation.messages)
    except CalibrationError as error:
        where = f"{conversation.place}, with the template of {error.where}"
        raise CalibrationError(error.what, where=where, remedy=error.remedy) from error


def _load_row_batch(source: str, seqlen: int, vocab_size: int) -> tuple[Tensor, int]:
    rows = load_rows(source)
    for number, row in enumerate(rows):
        if len(row) < seqlen:
            raise CalibrationError(
                f"row {number} holds {len(row)} tokens, fewer than one window of {seqlen}",
                where=source,
                remedy="use a smaller --seqlen, or longer rows",
            )
    ids_NL = torch.stack([row[:seqlen] for row in rows])
    check_vocabulary(source, ids_NL, vocab_size)
    return ids_NL, sum(map(len, rows))


def _count_windows(source: str, num_available: int, seqlen: int) -> int:
    """How many windows fit side by side; at least one, or it is an error."""
    if num_available < seqlen:
        raise CalibrationError(
            f"the text holds {num_available} tokens, fewer than one window of {seqlen}",
            where=source,
            remedy="use a smaller --seqlen, or more text",
        )
    return num_available // seqlen


def check_vocabulary(source: str, ids_NL: Tensor, vocab_size: int) -> None:
    """Refuse ids that are outside the vocabulary; `source` is named.

    Raises:
        CalibrationError: names the first one.
    """
    outside = ((ids_NL < 0) | (ids_NL >= vocab_size)).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        raise CalibrationError(
            f"token id {int(ids_NL[row, column])} in row {row} is outside the model's vocabulary of {vocab_size}",
            where=source,
            remedy="use the tokenizer of this very model",
        )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise CalibrationError(f"{name} is {value}", where=name, remedy="give at least 1")


def _make_batch(source: str, ids_NL: Tensor, num_available: int, num_asked: int | None, num_windows: int) -> TokenBatch:
    warnings: tuple[str, ...] = ()
    if num_asked is not None and num_asked > num_windows:
        shape = f"{num_available} tokens: {num_windows} windows of {ids_NL.shape[1]}"
        warnings = (f"{source} holds {shape}, fewer than the {num_asked} asked for; {len(ids_NL)} are used",)
    ids_NL = ids_NL.contiguous()
    return TokenBatch(ids_NL, source, token_digest(ids_NL), num_available, warnings)


def token_digest(ids_NL: Tensor) -> str:
    """sha256 (hex) of the shape and the ids of windows."""
    digest = hashlib.sha256(f"{list(ids_NL.shape)}".encode())
    digest.update(ids_NL.numpy().astype("<i8", copy=False).data)
    return digest.hexdigest()


def _require_size(path: Path) -> None:
    num_bytes = path.stat().st_size
    if num_bytes > _MAX_BYTES:
        raise CalibrationError(
            f"{path.name} has {num_bytes} bytes, more than the {_MAX_BYTES} allowed",
            where=str(path),
            remedy="this is no such file of a tokenizer: get the right one",
        )


def _read_config(path: Path) -> dict[str, Any]:
    _require_size(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{path.name} cannot be read: {error}", where=str(path), remedy="download it again"
        ) from error
    if not isinstance(config, dict):
        raise CalibrationError(f"{path.name} holds no JSON object", where=str(path), remedy="download it again")
    return config


# ------------------------------------------------------------------------------ what chat templates expect to find


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``: marks the assistant's words for training; here they are printed and nothing else."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)
