"""Plans and texts that cannot be used: exit code 2, what, where and the remedy, no traceback, nothing half-written."""

from __future__ import annotations

import json
import sys
import types
from typing import TYPE_CHECKING

import pytest

from pipeline import tiny

if TYPE_CHECKING:
    from pathlib import Path

INT4 = ("--scheme", "int4:g32")


PLANS: dict[str, tuple[object, tuple[str, ...]]] = {
    "unknown key": ({"defaults": {}}, ('"defaults"', "did you mean", "default")),
    "unknown key of a rule": ({"default": {"bits": 4}}, ('"bits"', "default", "known keys: ", "wq")),
    "unknown key of an override": (
        {"overrides": [{"pattern": "*", "groupsize": 4}]},
        ('"groupsize"', "overrides[0]", "group_size"),
    ),
    "unknown format": ({"default": {"wq": "int5"}}, ("int5", "default.wq", "int4")),
    "a group that does not divide": (
        {"default": {"wq": "int4", "group_size": 48}},
        ("48", "64 inputs", "model.layers.0.self_attn.q_proj", '"group_size": 64'),
    ),
    "a group of zero": ({"default": {"group_size": 0}}, ("group_size is 0", "default.group_size", "positive")),
    "nothing matches": (
        {"overrides": [{"pattern": "*.self_atn.*", "wq": "int8"}]},
        ("'*.self_atn.*' matches no module", "overrides[0].pattern", 'did you mean "*.self_attn.*"'),
    ),
    "no such layer": (
        {"overrides": [{"pattern": "model.layers.7.*", "wq": "int8"}]},
        ("model.layers.7.*", "layers are 0 to 1"),
    ),
    "activations": ({"default": {"aq": "fp4"}}, ('aq is "fp4"', "no engine", "default.aq", '"int8"')),
    "a norm": ({"overrides": [{"pattern": "model.norm", "wq": "int8"}]}, ("model.norm", "norm", "skip")),
    "zero point of a float": ({"default": {"wq": "fp8", "symmetric": False}}, ('"fp8"', "symmetric")),
    "an override of nothing": ({"overrides": [{"pattern": "*.mlp.*"}]}, ("sets nothing", "overrides[0]")),
    "no pattern": ({"overrides": [{"wq": "int8"}]}, ("pattern is missing", "overrides[0]")),
    "a regular expression": ({"overrides": [{"pattern": "(a|b)", "skip": True}]}, ("'(a|b)'", "regular expression")),
    "a wrong type": ({"default": {"group_size": "64"}}, ('"64"', "default.group_size")),
    "null": ({"default": {"wq": None}}, ("null", "default.wq")),
    "a list": ([1, 2], ("the plan is [1, 2]", "JSON object")),
}


@pytest.mark.parametrize("fault", PLANS)
def test_broken_plans(fails, olmoe, tmp_path, text, fault):
    content, says = PLANS[fault]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(content))
    for verb in (("inspect",), ("plan",), ("quantize", "--calib", text, "-o", tmp_path / "out")):
        fails(verb[0], olmoe, "--config", plan, *verb[1:], says=says)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json"}


def test_plans_that_cannot_be_read(fails, olmoe, tmp_path):
    plan = tmp_path / "plan.json"
    fails("plan", olmoe, "--config", plan, says=("does not exist", str(plan)))
    fails("plan", olmoe, "--config", tmp_path, says=("cannot be read", str(tmp_path)))
    plan.write_text('{"default": {"wq": "int4",}}')
    fails("plan", olmoe, "--config", plan, says=("not valid JSON", "line 1, column"))
    plan.write_bytes(b"\xff\xfe\x00")
    fails("plan", olmoe, "--config", plan, says=("UTF-8", str(plan)))


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ("int5", ("int5",)),
        ("int4:g48", ("48", "64 inputs")),
        ("int4:128", ("'128'", "g64")),
        ("int4:g32:g64", ("a second time",)),
        ("", ("unknown",)),
    ],
)
def test_broken_shorthand(fails, olmoe, tmp_path, scheme, says):
    fails("quantize", olmoe, "--scheme", scheme, "-o", tmp_path / "out", says=says)


def test_no_plan_and_two_plans(fails, olmoe, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    for verb in (("plan",), ("quantize", "-o", tmp_path / "out")):
        fails(verb[0], olmoe, *verb[1:], says=("there is no plan", "--config FILE", "--scheme"))
        fails(verb[0], olmoe, "--config", plan, *INT4, *verb[1:], says=("--config and --scheme were both given",))
    fails("inspect", olmoe, "--config", plan, *INT4, says=("--config and --scheme were both given",))


def test_explaining_what_is_not_there(fails, olmoe):
    name = "model.layers.0.mlp.experts.3.up"
    fails("plan", olmoe, *INT4, "--explain", name, says=(name, "did you mean", "up_proj"))


def test_broken_texts(fails, olmoe, tmp_path):
    path = tmp_path / "text.txt"
    plan = (*INT4, "-o", tmp_path / "out")

    def both(*says: str, file: Path = path) -> None:
        fails("quantize", olmoe, *plan, "--calib", file, "--seqlen", 32, says=says)
        fails("eval", olmoe, "--data", file, "--seqlen", 32, says=says)

    both("is no known text and no file", str(path), "bundled")
    for empty in ("", " \n\n\t "):
        path.write_text(empty)
        both("holds no text", str(path))
    path.write_text(" ".join(["w1"] * 31))
    both("31 tokens, fewer than one window of 32", str(path), "smaller --seqlen")
    path.write_bytes(b"\x80\x81")
    both("UTF-8", str(path))
    both("is a directory", file=tmp_path)
    rows = tmp_path / "rows.json"
    rows.write_text("[[1, 2, 3]]")
    both("row 0 holds 3 tokens", file=rows)
    rows.write_text(json.dumps([[5] * 31 + [128]]))
    both("128", "vocabulary of 128", file=rows)
    rows.write_text("[]")
    both("no rows", file=rows)
    rows.write_text("{")
    both("not valid JSON", file=rows)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "w1"}\n{"words": 3}\n')
    both("neither a text nor chat messages", f"{lines}:2", file=lines)
    lines.write_text('{"messages": [{"role": "user", "content": "w1"}]}\n')
    both("no chat template", file=lines)
    fails("quantize", olmoe, *plan, "--calib", "", says=("''", "is a directory"))
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer(fails, tmp_path, text):
    model = tiny.write_model(tmp_path / "model", "llama", tokenizer=False)
    says = ("no tokenizer.json", str(model), "save_pretrained")
    fails("quantize", model, *INT4, "--calib", text, "-o", tmp_path / "out", says=says)
    fails("eval", model, "--data", text, says=says)
    (model / "tokenizer.json").write_text("{}")
    fails("eval", model, "--data", text, says=("tokenizer.json cannot be read",))


@pytest.mark.parametrize("source", ["wikitext2", "c4", None])
def test_no_network_offers_the_bundled_text(fails, llama, tmp_path, monkeypatch, source):
    """The default is WikiText-2; where it cannot be had nothing else is taken in its place."""

    def offline(*_args, **_options):
        raise ConnectionError("no route to host")

    given = () if source is None else ("--calib", source)
    for module, why in ((types.SimpleNamespace(load_dataset=offline), "no route to host"), (None, "pip install")):
        monkeypatch.setitem(sys.modules, "datasets", module)
        says = (f"'{source or 'wikitext2'}'", why, "--calib bundled")
        fails("quantize", llama, *INT4, *given, "-o", tmp_path / "out", says=says)
        given_data = () if source is None else ("--data", source)
        fails("eval", llama, *given_data, says=(f"'{source or 'wikitext2'}'", why, "bundled"))
    assert tiny.listing(tmp_path) == set()
