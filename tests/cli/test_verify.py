"""`alphaquant verify`: says what is wrong, with code 2."""

from __future__ import annotations

import json
import sys

import pytest

from alphaquant import cli, verification
from alphaquant.verification import Likeness
from pipeline import tiny


@pytest.fixture
def run(olmoe, tmp_path):
    tiny.quantize(olmoe, tmp_path / "out", "int4:g32", None)
    return tmp_path / "out"


def test_a_good_directory(works, run):
    said = works("verify", run).out
    assert "every file is as it was written; 56 modules hold the run's codes" in said
    facts = json.loads(works("verify", run, "--json").out)
    assert facts == {"problems": [], "layout": "compressed-tensors", "modules": 56, "uncompared": 0, "engine": None}


def test_a_damaged_directory_is_named_and_the_engine_not_asked(alphaquant, run):
    shard = sorted(run.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = alphaquant("verify", run, "--engine", "vllm", "--python", "/nowhere")
    assert result.code == 2
    assert f"{shard.name}: its content is not what was written" in result.out


def test_what_cannot_be_asked(fails, works, run, tmp_path):
    fails("verify", run, "--engine", "vllm", "--python", "/nowhere", says=("vllm cannot be started", "/nowhere"))
    fails("verify", tmp_path, says=("there is no manifest",))
    works("export", run, "-o", tmp_path / "dense")
    assert "dense: no codes to hold" in works("verify", tmp_path / "dense").out


@pytest.mark.parametrize(("agreement", "code"), [(1.0, 0), (0.5, 2)])
def test_what_the_engine_says_decides(run, monkeypatch, capsys, agreement, code):
    likeness = Likeness("vllm 1", 1.0, agreement, 0.0, 0.0, 1e-4, ("a note",))
    monkeypatch.setattr(sys.modules["alphaquant.cli.verify"], "compare_with_dense", lambda *_, **__: likeness)
    monkeypatch.setattr("sys.argv", ["alphaquant", "verify", str(run), "--engine", "vllm"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    said = capsys.readouterr().out
    assert "a note" in said
    assert ("not the same model" in said) == bool(code)
    assert verification.PROBES.keys() == {"vllm", "transformers"}
