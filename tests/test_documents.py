"""What README and examples tell people to run, runs."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alphaquant.cli import app
from alphaquant.plan import Plan
from pipeline import tiny

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


def test_readme_python_runs(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in {"OUT": quantized, "MODEL": MODEL}.items():
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    loaded, in_memory = blocks("python")
    names = {"prompt_ids": torch.tensor([[5, 6, 7]])}
    exec(loaded, names)
    assert names["ids"].shape == (1, 67)
    assert names["logits"].shape == (1, 67, 2048)
    names = {"dataloader": [torch.arange(512).view(8, 64)]}
    exec(in_memory, names)
    assert names["arch"] == "olmoe"
    assert names["first"].tokens == 512
    assert names["first"].loss > 0
    table = json.loads((tmp_path / "QUANTIZED/alphaquant/modules.json").read_text())["modules"]
    assert table.keys() == names["quantizers"].keys()


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(example), "--nsamples", "8"])
    runpy.run_path(str(example), run_name="__main__")
    assert "perplexity" in capsys.readouterr().out


def test_moe_example_runs_on_a_model_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.write_model(tmp_path / "model", "qwen2_moe", num_key_value_heads=2)
    text = tiny.write_text(tmp_path / "text.txt", 3000)
    options = ["--nsamples", "4", "--seqlen", "32", "--calib", str(text), "--out", str(tmp_path / "out")]
    example = ROOT / "examples" / "gptq_moe_example.py"
    monkeypatch.setattr(sys, "argv", [str(example), "--model", str(model), "--transformers", *options])
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    assert "architecture: qwen" in said
    assert "perplexity" in said
    assert (tmp_path / "out" / "config.json").is_file()


def script(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run_gptq.py", *options])
    try:
        runpy.run_path(str(ROOT / "scripts" / "run_gptq.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_script_is_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(ROOT / "configs" / "gptq_olmoe_mixed.json"), *SMALL]
    ours, theirs = tmp_path / "script.pt", tmp_path / "command.pt"
    assert script(monkeypatch, "--model", str(MODEL), *config, "--save", str(ours)) == 0
    assert CliRunner().invoke(app, ["quantize", str(MODEL), *config, "--save", str(theirs)]).exit_code == 0
    a, b = (torch.load(path, weights_only=True) for path in (ours, theirs))
    assert a["modules"] == b["modules"]
    assert a["tensors"].keys() == b["tensors"].keys()
    assert all(torch.equal(tensor, b["tensors"][name]) for name, tensor in a["tensors"].items())
    assert script(monkeypatch, "--config", "c.json", "--save", str(tmp_path / "x.pt")) == 2
    assert "MODEL is missing" in capsys.readouterr().err
    assert script(monkeypatch, "--model", str(MODEL), "--scheme", "int5", "--save", str(tmp_path / "x.pt")) == 2
    assert "unknown format 'int5'" in " ".join(capsys.readouterr().err.split())


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
