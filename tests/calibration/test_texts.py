import importlib.resources
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from alphaquant.calibration import SOURCES, Conversation, is_tokenised, load_rows, load_text
from alphaquant.errors import CalibrationError


def error_of(call, *args, **kwargs):
    with pytest.raises(CalibrationError) as info:
        call(*args, **kwargs)
    assert info.value.where
    assert info.value.remedy
    return info.value


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the package `datasets` that records what is asked of it."""
    fake = SimpleNamespace(calls=[], texts=["", "= Title =", "A b c ."])

    def load_dataset(*args, **kwargs):
        fake.calls.append((args, kwargs))
        return {"text": fake.texts}

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


# Files.


def test_text_file_as_open_reads_it(tmp_path):
    source = write(tmp_path / "a.txt", "one\r\ntwo\u2028é\n")
    assert load_text(source) == "one\ntwo\u2028é\n"
    assert load_text(write(tmp_path / "README.md", "# hello")) == "# hello"


def test_jsonl(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": []}]
    lines = [json.dumps({"text": "one\u2028two"}, ensure_ascii=False), "", json.dumps({"messages": messages})]
    source = write(tmp_path / "a.jsonl", "\n".join([*lines, '{"text": "  "}', '{"text": "end", "messages": 1}']))
    assert load_text(source) == ["one\u2028two", Conversation(messages, f"{source}:3"), "end"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[" * 100_000,
        "1",
        '["text"]',
        "{}",
        '{"text": 1}',
        '{"messages": []}',
        '{"messages": "hi"}',
        '{"messages": [1]}',
        '{"messages": [{"content": "hi"}]}',
        '{"messages": [{"role": "user"}]}',
    ],
    ids=lambda line: line[:30],
)
def test_bad_line_is_named(tmp_path, line):
    source = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n\n{line}\n')
    assert error_of(load_text, source).where == f"{source}:3"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty_text(tmp_path, name, content):
    assert "no text" in error_of(load_text, write(tmp_path / name, content)).what


def test_jsonl_of_blank_texts(tmp_path):
    assert "no text" in error_of(load_text, write(tmp_path / "a.jsonl", '{"text": " "}\n')).what


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_not_utf_8(tmp_path, name):
    error = error_of(load_text, write(tmp_path / name, b'{"text": "\xe9"}'))
    assert name in error.what
    assert "UTF-8" in error.remedy


# Names.


@pytest.mark.parametrize("source", ["wikitext", "wiki-text2", "bundeld", "C4", "C44"])
def test_unknown_source_did_you_mean(source):
    error = error_of(load_text, source)
    assert f"{source!r}" in error.what
    assert "did you mean" in error.remedy
    assert all(name in error.remedy for name in (*SOURCES, ".jsonl", ".safetensors"))


@pytest.mark.parametrize("source", ["/no/such/file.txt", "x" * 300, "~nosuchuser/x", "a\0b"])
def test_unknown_file(source):
    assert "did you mean" not in error_of(load_text, source).remedy


def test_directory(tmp_path):
    assert "is a directory" in error_of(load_text, str(tmp_path)).what


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_bundled_text_is_there(split):
    assert len(load_text("bundled", split=split).split()) > 1000


def test_bundled_splits_and_a_broken_installation(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path / package)
    data = tmp_path / "alphaquant" / "data"
    data.mkdir(parents=True)
    write(data / "calibration.txt", "one")
    assert load_text("bundled") == "one"
    error = error_of(load_text, "bundled", split="evaluation")
    assert error.where.endswith("evaluation.txt")


# The hub.


@pytest.mark.parametrize(("split", "hub_split"), [("calibration", "train"), ("evaluation", "test")])
def test_wikitext2(datasets, split, hub_split):
    assert load_text("wikitext2", split=split) == "\n\n= Title =\n\nA b c ."
    assert datasets.calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": hub_split})]


@pytest.mark.parametrize(
    ("split", "hub_split", "file"),
    [
        ("calibration", "train", "en/c4-train.00000-of-01024.json.gz"),
        ("evaluation", "validation", "en/c4-validation.00000-of-00008.json.gz"),
    ],
)
def test_c4(datasets, split, hub_split, file):
    assert load_text("c4", split=split) == ["= Title =", "A b c ."]
    ((args, kwargs),) = datasets.calls
    assert args == ("allenai/c4",)
    assert kwargs == {"data_files": {hub_split: file}, "split": f"{hub_split}[:10000]"}


@pytest.mark.parametrize("source", ["wikitext2", "c4"])
def test_datasets_is_not_installed(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = error_of(load_text, source)
    assert "`datasets`" in error.what
    assert "pip install" in error.remedy
    assert "--calib bundled" in error.remedy
    assert "FILE" in error.remedy


@pytest.mark.parametrize("source", ["wikitext2", "c4"])
@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_no_network(monkeypatch, datasets, source, split):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = error_of(load_text, source, split=split)
    assert "no route to the hub" in error.what
    assert "bundled" in error.remedy
    assert "FILE" in error.remedy


# Pre-tokenised files.


def test_is_tokenised():
    assert is_tokenised("a/b.json")
    assert is_tokenised("b.safetensors")
    assert not is_tokenised("b.jsonl")
    assert not is_tokenised("bundled")


def test_json_rows(tmp_path):
    rows = load_rows(write(tmp_path / "a.json", "[[1, 2, 3], [4]]"))
    assert [row.tolist() for row in rows] == [[1, 2, 3], [4]]
    assert all(row.dtype == torch.int64 for row in rows)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[[1", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"input_ids": [[1]]}', "no list of lists"),
        ("[[1], 2]", "row 1 "),
        ("[[1], [2, true]]", "row 1 "),
        ("[[1], [2.0]]", "row 1 "),
        ("[[9223372036854775808]]", "row 0 "),
        ("[]", "no rows"),
    ],
    ids=lambda content: content[:30],
)
def test_broken_json_rows(tmp_path, content, says):
    assert says in error_of(load_rows, write(tmp_path / "a.json", content)).what


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_safetensors_rows(tmp_path, dtype):
    ids = torch.arange(12, dtype=dtype).view(3, 4)
    save_file({"input_ids": ids}, tmp_path / "a.safetensors")
    rows = load_rows(str(tmp_path / "a.safetensors"))
    assert torch.stack(rows).equal(ids.long())


@pytest.mark.parametrize(
    "tensors",
    [
        {"ids": torch.zeros(2, 3).long()},
        {"input_ids": torch.zeros(3).long()},
        {"input_ids": torch.zeros(2, 3)},
        {"input_ids": torch.zeros(2, 3).bool()},
        {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.zeros(2, 3).long()},
        {},
    ],
    ids=["name", "1d", "float", "bool", "mask", "none"],
)
def test_safetensors_of_something_else(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    assert "input_ids" in error_of(load_rows, str(tmp_path / "a.safetensors")).remedy


def test_safetensors_without_rows_or_broken(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"input_ids": torch.zeros(0, 3).long()}, file)
    assert "no rows" in error_of(load_rows, str(file)).what
    assert "safetensors" in error_of(load_rows, write(file, b"\x00")).what


@pytest.mark.parametrize("source", ["none.json", "none.safetensors"])
def test_rows_of_no_file(source):
    assert "no file" in error_of(load_rows, source).what
