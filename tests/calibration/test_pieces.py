"""A text that is tokenised in pieces has the ids of the whole, whatever the tokenizer makes of borders."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from alphaquant.calibration import pieces
from alphaquant.calibration.apart import encode_apart

WORDS = ["ab", "abc", "c", "dé", "日本", "x1", "it's", "A-b", "...", "  ", "\n", "\n\n", "\t", " \n ", "ccc ab"]


def text(length: int = 4000, seed: int = 0) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(["", " ", " ", "\n"]) for _ in range(length))


def trained(pre: object, normalizer: object = None, template: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(pre, pre_tokenizers.ByteLevel) else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text(seed=1)[:3000]], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return tokenizer


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    from tokenizers import Regex  # noqa: PLC0415

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


QWEN = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TOKENIZERS = {
    "bytes": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes with a prefix": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "qwen": lambda: trained(split_by(QWEN)),
    "begins and ends": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False), None, "<s> $A </s>"),
    "metaspace": lambda: trained(pre_tokenizers.Metaspace(), None, "<s> $A"),
    "words": lambda: trained(pre_tokenizers.Whitespace(), normalizers.NFC()),
    "no pieces at all": lambda: trained(
        None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("size", [50, 700])
def test_pieces_are_the_whole(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", size)
    monkeypatch.setattr(pieces, "_AT_ONCE", 3)
    tokenizer = TOKENIZERS[name]()
    for seed in range(3):
        whole = text(seed=seed)
        assert pieces.encode(tokenizer, whole).tolist() == tokenizer.encode(whole).ids


def test_it_is_in_pieces_where_a_tokenizer_has_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 700)
    assert len(pieces._split(TOKENIZERS["bytes"](), text())) > 10
    assert len(pieces._split(TOKENIZERS["no pieces at all"](), text())) == 1
    assert pieces._split(TOKENIZERS["bytes"](), "a" * 5000) == ["a" * 5000]


def test_the_program_is_the_function() -> None:
    tokenizer, whole = TOKENIZERS["begins and ends"](), text(100_000)
    assert len(pieces._split(tokenizer, whole)) > 1
    assert encode_apart(tokenizer.to_str(), whole).tolist() == tokenizer.encode(whole).ids
