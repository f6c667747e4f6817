"""What README and examples tell people to run, runs."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from alphaquant.calibration import load_tokenizer
from alphaquant.cli import app
from alphaquant.pipeline import load
from alphaquant.plan import Plan
from pipeline import tiny

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "src" / "alphaquant" / "data" / "demo-model"
SMALL = ["--calib", "bundled", "--nsamples", "4", "--seqlen", "64"]


README, CHINESE, QUICKSTART = "README.md", "README.zh-CN.md", "docs/quickstart.md"
# Lines that no test runs: another tool's, or what the tests themselves stand on.
NOT_RUN = {"pip install .", "vllm serve OUT"}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def lines(page: str) -> list[str]:
    """The lines of a page's shell blocks, without their comments."""
    found = (line.split("#")[0].strip() for block in blocks("bash", page) for line in block.splitlines())
    return [line for line in found if line]


def commands(page: str = README) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in lines(page) if line.startswith("alphaquant ")]


def run(command: list[str], folder: Path) -> None:
    """Run a command of a document on the bundled model, in little; what it names lies in `folder`."""
    names = {word: str(folder / word) for word in ("OUT", "OUT2", "DENSE", "COMPARED")} | {"MODEL": str(MODEL)}
    words = [str(ROOT / word) if word.startswith("configs/") else names.get(word, word) for word in command]
    few = {"quantize": SMALL if "--calib" not in command else SMALL[2:], "eval": ["--seqlen", "64", "--windows", "4"]}
    bundled = ["--data", "bundled"] if command[0] == "eval" and "--data" not in command else []
    done = CliRunner().invoke(app, [*words, *few.get(command[0], []), *bundled])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("readme") / "OUT"
    done = CliRunner().invoke(app, ["quantize", str(MODEL), "--scheme", "int4:g64", *SMALL, "-o", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_first_command_comes_within_thirty_lines() -> None:
    assert "make demo" in "\n".join((ROOT / "README.md").read_text().splitlines()[:30])


@pytest.mark.parametrize("page", [README, QUICKSTART])
def test_every_line_of_a_shell_block_is_known(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = NOT_RUN | {f"make {target}" for target in targets}
    assert [line for line in lines(page) if not line.startswith("alphaquant ") and line not in known] == []


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_readme_commands_run(command: list[str], quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path if command[0] == "quantize" else quantized.parent
    run(command, folder)
    assert (folder / "OUT" / "config.json").is_file()


def test_quickstart_runs_from_top_to_bottom(tmp_path: Path) -> None:
    for command in commands(QUICKSTART):
        run(command, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"OUT", "OUT2", "DENSE", "COMPARED"}
    assert (tmp_path / "OUT" / "alphaquant" / "report.html").is_file()
    assert (tmp_path / "COMPARED" / "comparison.html").is_file()


def shape(page: str) -> list[str]:
    """What must be the same in every language: code without its comments, levels of headings, names, and links."""
    text = (ROOT / page).read_text(encoding="utf-8")
    code = re.findall(r"```.*?```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    names = sorted({" ".join(name.split()) for name in re.findall(r"`([^`]+)`", prose)})
    links = sorted(link for link in re.findall(r"\]\(([^)]+)\)", prose) if link not in (README, CHINESE))
    headings = re.findall(r"^#+", prose, re.MULTILINE)
    return [*(re.sub(r"\s+# .*", "", block) for block in code), *headings, *names, *links]


def test_the_chinese_readme_says_the_same() -> None:
    assert shape(CHINESE) == shape(README)
    assert len(re.findall(r"[\u4e00-\u9fff]", (ROOT / CHINESE).read_text(encoding="utf-8"))) > 500


def test_generated_pages_are_current() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_docs.py"))
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert script["rewritten"](text) == text, f"{page.name}: run python scripts/write_docs.py"


@pytest.mark.parametrize("page", [README, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()] == []


def test_what_the_readme_calls_proven_is_tested() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests*/**/test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / README).read_text(encoding="utf-8"))
    assert len(named) >= 6
    assert [name for name in named if f"\ndef {name}(" not in tests] == []


def test_readme_plan_is_a_plan() -> None:
    (plan,) = (Plan.parse(block) for block in blocks("json"))
    assert [rule.pattern for rule in plan.overrides] == [
        r["pattern"] for r in json.loads(blocks("json")[0])["overrides"]
    ]


def test_readme_python_runs(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in {"OUT": quantized, "MODEL": MODEL}.items():
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    from_disk, in_memory = blocks("python")
    names = {"prompt_ids": torch.tensor([[5, 6, 7]])}
    exec(from_disk, names)
    assert 1 < names["quality"].perplexity / names["quality"].agreement.original_perplexity < 1.1
    assert names["html"].is_file()
    assert names["ids"].shape == (1, 67)
    assert names["logits"].shape == (1, 67, 2048)
    names = {"dataloader": [torch.arange(512).view(8, 64)]}
    exec(in_memory, names)
    assert names["arch"] == "olmoe"
    assert names["first"].tokens == 512
    assert names["first"].loss > 0
    table = json.loads((tmp_path / "QUANTIZED/alphaquant/modules.json").read_text())["modules"]
    assert table.keys() == names["quantizers"].keys()


ENGINES = {"serve_vllm.py": "vllm", "evaluate_tasks.py": "lm_eval"}  # what an example needs beside alphaquant


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--nsamples", "8", *options])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py") if p.name not in ENGINES))
def test_examples_run(example: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run_example(example, monkeypatch)
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: `make test-tasks` runs this")
@pytest.mark.filterwarnings("ignore")
def test_example_of_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    run_example("evaluate_tasks.py", monkeypatch)
    found = re.findall(r"^(.*): next_word acc (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in found] == ["original", "int3:g64"]
    assert float(found[0][1]) > 0.5


def test_example_of_serving(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for vLLM that reads the directory by our own decoder."""

    class Engine:
        def __init__(self, model: str, **options: object) -> None:
            assert options["tensor_parallel_size"] == 1
            self.decoder, self.tokenizer = load(model), load_tokenizer(Path(model))

        def generate(self, prompts: list[str], params: SimpleNamespace) -> list[SimpleNamespace]:
            answers = []
            for prompt in prompts:
                ids = self.tokenizer.encode(prompt)
                new = self.decoder.generate(torch.tensor([ids]), params.max_tokens)[0, len(ids) :]
                answers.append(SimpleNamespace(outputs=[SimpleNamespace(text=self.tokenizer.decode(new.tolist()))]))
            return answers

    stand_in = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    run_example("serve_vllm.py", monkeypatch, "--out", str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert said.startswith("The state of the Union is")
    assert len(said.split()) > 10
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"]


def test_example_of_the_shell(tmp_path: Path) -> None:
    few = ["--calib", "bundled", "--nsamples", "2", "--seqlen", "64", "--quiet"]  # the later --nsamples wins
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    command = ["bash", str(ROOT / "run_gptq_example.sh"), str(MODEL), *few]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["quantized.pt"]
    assert torch.load(tmp_path / "quantized.pt", weights_only=True)


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
