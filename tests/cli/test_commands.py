"""Every verb where all is well."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from alphaquant import __version__
from alphaquant.pipeline import KindSize, evaluate_checkpoint, load
from alphaquant.terminal import print_sizes
from pipeline import tiny

VERBS = ("quantize", "status", "eval", "report", "inspect", "plan", "export", "verify", "demo")
SMALL = ("--nsamples", 8, "--seqlen", 32)


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    path.write_text(json.dumps(tiny.SERVED_PLAN))
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, olmoe, text):
    out = tmp_path_factory.mktemp("quantized") / "out"
    tiny.quantize(olmoe, out, "int4:g32", text, num_samples=8)
    return out


def test_version(works):
    assert works("--version").out == f"alphaquant {__version__}\n"


def test_help_names_every_verb(works):
    shown = works("--help").out
    assert re.findall(r"^  (\w+) ", shown[shown.index("Commands:") :], re.MULTILINE) == list(VERBS)
    assert works("-h").out == shown


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(works, verb):
    shown = works(verb, "--help").out
    assert "Usage: alphaquant " + verb in " ".join(shown.split())
    for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown):
        assert option.islower()


def test_the_spellings_that_are_promised(works):
    shown = works("quantize", "--help").out
    for option in (
        "--config", "--scheme", "--method", "--calib", "--nsamples", "--seqlen", "--format", "-o", "--save", "--device",
        "--dtype", "--seed", "--dry-run", "-v", "--json", "--overwrite", "--routing-weight", "--effort", "MODEL",
    ):  # fmt: skip
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), option
    shown = works("eval", "--help").out
    for option in ("--data", "--seqlen", "--windows", "--against", "--json", "DIR"):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), option


def test_no_arguments_show_the_help(alphaquant):
    result = alphaquant()
    assert "Usage: alphaquant" in result.out + result.err
    assert "Traceback" not in result.err


def test_inspect(works, olmoe, llama, plan_file):
    shown = works("inspect", olmoe).out
    assert "olmoe (olmoe): 2 layers, hidden size 64, vocabulary 128" in shown
    assert "2 MoE layers of 8 experts, top-2" in shown
    assert re.search(r"^expert +float32 +48 +196,608 +32\.00 +768\.0 KiB +768\.0 KiB$", shown, re.MULTILINE)
    assert "MoE" not in works("inspect", llama).out
    shown = works("inspect", olmoe, "--config", plan_file).out
    assert re.search(r"^expert +mxfp4 g32 +5 ", shown, re.MULTILINE)
    facts = json.loads(works("inspect", olmoe, "--scheme", "int4:g32", "--json").out)
    assert facts["experts"] == 8
    assert facts["top_k"] == 2
    assert facts["parameters"] == sum(tensor.numel() for tensor in tiny.random_tensors("olmoe").values())
    assert {row["scheme"] for row in facts["kinds"] if row["kind"] == "expert"} == {"int4 g32"}


def test_plan(works, olmoe, plan_file):
    shown = works("plan", olmoe, "--config", plan_file).out
    assert re.search(r"total [\d.]+ KiB → [\d.]+ KiB \([\d.]+× smaller\)", shown)
    table = json.loads(works("plan", olmoe, "--config", plan_file, "--json").out)
    assert len(table) == 69
    assert table["model.layers.1.mlp.experts.3.up_proj"] == "mxfp8 g32"
    assert table["model.layers.1.self_attn.k_proj"] is None
    assert table["lm_head"] is None


def test_plan_explain(works, olmoe, plan_file):
    name = "model.layers.1.mlp.experts.3.up_proj"
    shown = works("plan", olmoe, "--config", plan_file, "--explain", name).out
    assert shown.splitlines() == [
        f"{name} (expert): mxfp8 g32",
        '  default: wq = "int4", aq = "bf16", group_size = 32, symmetric = true',
        '  overrides[3] *.up_proj: wq = "int3", group_size = 64, symmetric = false',
        '  overrides[5] model.layers.1.mlp.*: wq = "fp8", group_size = -1',
        '  overrides[6] model.layers.1.**.up_proj: wq = "mxfp8"',
    ]
    facts = json.loads(works("plan", olmoe, "--config", plan_file, "--explain", name, "--json").out)
    assert facts["scheme"] == "mxfp8 g32"
    assert [step["rule"] for step in facts["steps"]] == ["default", 3, 5, 6]
    shown = works("plan", olmoe, "--scheme", "int4:g32", "--explain", "model.layers.0.mlp.gate").out
    assert "unquantized" in shown
    assert "protected" in shown


def test_quantize(works, olmoe, text, plan_file, tmp_path):
    out = tmp_path / "out"
    result = works("quantize", olmoe, "--config", plan_file, "--calib", text, *SMALL, "-o", out)
    shown = result.out
    assert re.search(r"^kind +format +modules +bits +loss +events$", shown, re.MULTILINE)
    assert re.search(r"^expert +mxfp4 g32 +5 +4\.25 +[\d.]+% +0$", shown, re.MULTILINE)
    assert re.search(
        r"^size +[\d.]+ KiB → [\d.]+ KiB \([\d.]+×, [\d.]+ bits a quantized weight\)$", shown, re.MULTILINE
    )
    assert re.search(r"^audit +55 targeted, 55 quantized, 14 left as they are$", shown, re.MULTILINE)
    assert re.search(r"^time +[\d.]+ s \((?=.*calibrate )(?=.*solve ).*\)$", shown, re.MULTILINE)
    assert re.search(r"^memory [\d.]+ [MG]iB at its peak$", shown, re.MULTILINE)
    assert shown.splitlines()[-1] == f"written to {out}"
    assert load(out).logits(tiny.token_ids()).shape == (4, 24, tiny.VOCAB)
    report = json.loads((out / "alphaquant/report.json").read_text())
    assert report["command"].startswith(f"alphaquant quantize {olmoe} --config")
    assert report["calibration"]["num_samples"] == 8
    again = works("quantize", olmoe, "--config", plan_file, "--calib", text, *SMALL, "-o", out).out
    assert again.splitlines()[-1] == f"already complete, nothing was computed: {out}"
    assert json.loads((out / "alphaquant/report.json").read_text()) == report


def test_quantize_prints_json_alone(works, olmoe, text, tmp_path):
    result = works("quantize", olmoe, "--scheme", "int4:g32", "--calib", text, *SMALL, "-o", tmp_path / "out", "--json")
    report = json.loads(result.out)
    assert report == json.loads((tmp_path / "out/alphaquant/report.json").read_text())
    assert report["audit"]["quantized"] == 56


def test_warnings_do_not_disturb_json(works, llama, text, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(
        json.dumps({"overrides": [{"pattern": "*.mlp.experts.*", "wq": "int8"}], "default": {"group_size": 32}})
    )
    args = (
        "quantize",
        llama,
        "--config",
        plan,
        "--calib",
        text,
        "--nsamples",
        9000,
        "--seqlen",
        32,
        "-o",
        tmp_path / "out",
    )
    result = works(*args, "--json")
    assert len(json.loads(result.out)["warnings"]) == 2
    assert result.err.count("warning: ") >= 1
    result = works(*args, "--overwrite")
    assert result.err.count("warning: ") == 2
    assert "9000 asked for" in result.err


def test_dry_run_computes_nothing(works, olmoe, tmp_path):
    args = ("quantize", olmoe, "--scheme", "int4:g32", "-o", tmp_path / "out", "--dry-run")
    assert re.search(r"^expert +int4 g32 +48 ", works(*args).out, re.MULTILINE)
    forecast = json.loads(works(*args, "--json").out)
    assert {row["scheme"] for row in forecast["sizes"] if row["kind"] == "expert"} == {"int4 g32"}
    assert forecast["memory"]["peak_bytes"] == sum(forecast["memory"]["parts"].values()) > 0
    assert forecast["seconds"].keys() == {"read", "calibrate", "solve", "propagate"}
    assert min(forecast["seconds"].values()) > 0
    assert re.search(r"^weights of a layer +\d+ MiB|^together +\d", works(*args).out, re.MULTILINE)
    assert tiny.listing(tmp_path) == set()


def test_a_limit_of_memory_is_kept_or_refused(works, fails, olmoe, text, tmp_path):
    args = ("quantize", olmoe, "--scheme", "int4:g32", "--calib", text, *SMALL, "-o", tmp_path / "out")
    for size, says in (("1MiB", "at the least"), ("much", "no size")):
        fails(*args, "--max-memory", size, says=(says, "--max-memory"))
        assert tiny.listing(tmp_path) == set()
    report = json.loads(works(*args, "--max-memory", "64GiB", "--json").out)
    assert report["memory_plan"]["passes"] == report["memory_plan"]["least_passes"] == 4


def test_methods_and_efforts(works, olmoe, text, tmp_path):
    common = ("quantize", olmoe, "--scheme", "int4:g32", "--json")
    calibrated = (*common, "--calib", text, *SMALL)
    rtn = json.loads(works(*common, "--method", "rtn", "-o", tmp_path / "rtn").out)
    assert rtn["recipe"]["method"] == "rtn"
    assert rtn["calibration"] is None
    assert json.loads(works(*calibrated, "--method", "rtn", "-o", tmp_path / "rtn2").out)["calibration"] is not None
    fast = json.loads(works(*calibrated, "--effort", "fast", "-o", tmp_path / "fast").out)
    assert fast["recipe"]["effort"] == "fast"
    codes = {
        name: (tmp_path / name / "model-00001-of-00003.safetensors").read_bytes() for name in ("rtn", "rtn2", "fast")
    }
    assert len(set(codes.values())) == 3


def test_options_reach_the_run(works, olmoe, text, tmp_path):
    report = json.loads(
        works(
            "quantize", olmoe, "--scheme", "mxfp4", "--calib", text, "--nsamples", 5, "--seqlen", 16, "--seed", 7,
            "--routing-weight", 2, "--format", "humming", "--dtype", "bf16", "--device", "cpu", "-q",
            "-o", tmp_path / "out", "--json",
        ).out
    )  # fmt: skip
    assert report["layout"] == "humming"
    assert report["dtype"] == "bfloat16"
    assert report["device"] == "cpu"
    assert report["recipe"]["routing_power"] == 2.0
    calibration = report["calibration"]
    assert (calibration["num_samples"], calibration["seqlen"], calibration["seed"]) == (5, 16, 7)


def test_save_alone_and_beside(works, llama, text, tmp_path):
    common = ("quantize", llama, "--scheme", "int4:g32", "--calib", text, *SMALL)
    alone = tmp_path / "alone"
    shown = works(*common, "--save", alone / "model.pt").out
    assert shown.splitlines()[-1] == f"written to {alone / 'model.pt'}"
    assert tiny.listing(alone) == {"model.pt"}
    works(*common, "--save", tmp_path / "both.pt", "-o", tmp_path / "out")
    first, second = (torch.load(path, weights_only=True) for path in (alone / "model.pt", tmp_path / "both.pt"))
    assert first["tensors"].keys() == second["tensors"].keys()
    assert all(torch.equal(tensor, second["tensors"][name]) for name, tensor in first["tensors"].items())
    assert (tmp_path / "out/config.json").is_file()
    works(*common, "--save", tmp_path / "both.pt", "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "both.pt", "out"}


def test_verbose_lists_events(works, olmoe, text, tmp_path):
    args = ("quantize", olmoe, "--scheme", "int4:g32", "--calib", text, "--nsamples", 1, "--seqlen", 4)
    shown = works(*args, "-o", tmp_path / "out", "-v").out
    assert shown.count("rounded to nearest: ") >= 24
    assert works(*args, "-o", tmp_path / "out2").out.count("rounded to nearest: ") == 1


def test_eval(works, quantized, olmoe, other_text):
    args = ("eval", quantized, "--data", other_text, "--seqlen", 32, "--windows", 7)
    facts = json.loads(works(*args, "--json").out)
    assert set(facts) == {"perplexity", "stderr", "tokens", "windows"}
    assert facts["tokens"] == 7 * 31
    both = json.loads(works(*args, "--against", olmoe, "--json").out)
    expected = evaluate_checkpoint(quantized, data=str(other_text), seqlen=32, max_windows=7, against=olmoe)
    assert set(both) == {*facts, "kl", "kl_stderr", "top1_agreement", "original_perplexity", "router_by_layer"}
    assert both["router_by_layer"] == list(expected.agreement.router_by_layer)
    assert "same experts for " in works(*args, "--against", olmoe).out
    assert both["perplexity"] == facts["perplexity"] == expected.perplexity
    assert both["kl"] == expected.agreement.kl
    shown = works(*args).out
    assert re.search(
        rf"perplexity {expected.perplexity:.4f} ± {expected.stderr:.4f} \(217 tokens in 7 windows\)", shown
    )
    assert re.search(
        r"original [\d.]+ \([+-][\d.]+%\), KL [\d.]+ ± [\d.]+ nats a token", works(*args, "--against", olmoe).out
    )


def test_eval_is_kept_for_the_report(works, fails, quantized, olmoe, other_text, tmp_path):
    out = shutil.copytree(quantized, tmp_path / "out")
    args = ("eval", out, "--data", other_text, "--seqlen", 32, "--windows", 7, "--against", olmoe, "--rtn")
    facts = json.loads(works(*args, "--json").out)
    assert facts["rtn"]["kl"] > facts["kl"] > 0
    assert facts["rtn"]["original_perplexity"] == facts["original_perplexity"]
    kept = {path.stem: json.loads(path.read_text()) for path in (out / "alphaquant" / "quality").iterdir()}
    assert {name: k["kl"] for name, k in kept.items()} == {
        other_text.stem: facts["kl"],
        f"{other_text.stem}-rtn": facts["rtn"]["kl"],
    }
    works("report", out)
    page = (out / "alphaquant" / "report.md").read_text()
    assert f"{facts['kl']:.5f}" in page
    assert f"{facts['rtn']['kl']:.5f}" in page
    assert "rounded to nearest: perplexity" in works(*args).out
    fails("eval", out, "--rtn", says=("--rtn was given without an original", "--against"))
    fails("eval", olmoe, "--against", olmoe, "--rtn", says=("holds no plan",))
    fails("eval", out, "--limit", 3, says=("--limit was given without tasks", "--tasks"))


def test_export(works, quantized, tmp_path):
    shown = works("export", quantized, "-o", tmp_path / "dense").out
    assert re.fullmatch(rf"written to {tmp_path}/dense \([\d.]+ KiB\)\n", shown)
    works("export", quantized, "-o", tmp_path / "humming", "--format", "humming")
    works("export", quantized, "-o", tmp_path / "auto", "--format", "auto")
    works("export", quantized, "-o", tmp_path / "model.pt")
    assert (tmp_path / "auto/config.json").read_bytes() == (quantized / "config.json").read_bytes()
    ids = tiny.token_ids()
    logits = load(quantized).logits(ids)
    for name in ("dense", "humming", "auto"):
        assert torch.equal(load(tmp_path / name).logits(ids), logits)
    works("export", quantized, "-o", tmp_path / "model.pt", "--overwrite")
    works("export", quantized, "-o", tmp_path / "auto", "--format", "dense", "--overwrite")
    assert "quantization_config" not in json.loads((tmp_path / "auto/config.json").read_text())


def test_report(works, quantized, tmp_path):
    shown = works("report", quantized, "-o", tmp_path / "report").out
    assert shown.splitlines() == [f"written to {tmp_path}/report/report.{suffix}" for suffix in ("html", "md")]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.md"}


def test_nothing_is_lost_where_it_is_piped(capsys):
    """A file has no width: no column is cut to that of a terminal."""
    row = KindSize(
        "shared_expert_gate", "mxfp6_e3m2 g64 asym", 123_456, 123_456_789_012, 246_913_578_024, 96_450_616_415
    )
    print_sizes([row])
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "shared_expert_gate", "mxfp6_e3m2", "g64", "asym", "123,456", "123,456,789,012", "6.25",
        "230.0", "GiB", "89.8", "GiB",
    ]  # fmt: skip


def test_a_real_process(llama, text, tmp_path):
    """The one run outside this process: nothing that is imported here helps it."""
    command = [sys.executable, "-W", "error", "-m", "alphaquant"]
    args = ["quantize", llama, "--scheme", "int4:g32", "--calib", text, *SMALL, "-o", tmp_path / "out", "--json"]
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["audit"] == {"targeted": 14, "quantized": 14, "left": 7}
    assert done.stderr == ""
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
