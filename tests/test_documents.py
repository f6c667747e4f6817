"""What README and examples tell people to run, runs."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alphaquant.cli import app
from alphaquant.plan import Plan

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "src" / "alphaquant" / "data" / "demo-model"
SMALL = ["--calib", "bundled", "--nsamples", "4", "--seqlen", "64"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("alphaquant")]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("readme") / "OUT"
    done = CliRunner().invoke(app, ["quantize", str(MODEL), "--scheme", "int4:g64", *SMALL, "-o", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_first_command_comes_within_thirty_lines() -> None:
    assert "make demo" in "\n".join((ROOT / "README.md").read_text().splitlines()[:30])


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_readme_commands_run(command: list[str], quantized: Path, tmp_path: Path) -> None:
    verb = command[0]
    out = tmp_path / "OUT" if verb == "quantize" else quantized
    words = [{"MODEL": str(MODEL), "OUT": str(out)}.get(word, word) for word in command]
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    words += {"quantize": SMALL, "eval": ["--data", "bundled", "--seqlen", "64", "--windows", "4"]}.get(verb, [])
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    if verb == "quantize":
        assert (out / "config.json").is_file()


def test_readme_plan_is_a_plan() -> None:
    (plan,) = (Plan.parse(block) for block in blocks("json"))
    assert [rule.pattern for rule in plan.overrides] == [
        r["pattern"] for r in json.loads(blocks("json")[0])["overrides"]
    ]


def test_readme_python_runs(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quantized.parent)
    for block in blocks("python"):
        names = {"prompt_ids": torch.tensor([[5, 6, 7]])}
        exec(block, names)
        assert names["ids"].shape == (1, 67)
        assert names["logits"].shape == (1, 67, 2048)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert "perplexity" in capsys.readouterr().out


def test_demo_model_keeps_its_promise(tmp_path: Path) -> None:
    """At INT2 plain rounding costs a tenth of the perplexity or more, and GPTQ wins back half of it."""
    assert (MODEL / "model.safetensors").stat().st_size <= 12e6
    found = {}
    for name, options in {"rtn": ["--method", "rtn", "--effort", "fast"], "gptq": []}.items():
        out = tmp_path / name
        scheme = ["--scheme", "int2:g64", "--calib", "bundled", "--nsamples", "64", "--seqlen", "256"]
        assert CliRunner().invoke(app, ["quantize", str(MODEL), *scheme, *options, "-o", str(out)]).exit_code == 0
        text = ["--data", "bundled", "--seqlen", "256", "--windows", "60", "--against", str(MODEL), "--json"]
        found[name] = json.loads(CliRunner().invoke(app, ["eval", str(out), *text]).stdout)
    original = found["rtn"]["original_perplexity"]
    cost = found["rtn"]["perplexity"] - original
    assert cost >= 0.1 * original
    assert found["gptq"]["perplexity"] - original <= cost / 2
