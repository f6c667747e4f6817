"""Bits by budget at the command: what is proposed fits, is legal, and is what the file says."""

from __future__ import annotations

import csv
import json

import pytest
from safetensors.torch import load_file

from alphaquant.plan import Plan

METHODS = ("sensitivity", "utilization", "alpha", "uniform", "random")
G32 = ("--formats", "int2:g32,int3:g32,int4:g32,int8:g32")
ALPHA = ("--method", "alpha", *G32)


@pytest.fixture
def calib(text):
    return ("--calib", text, "--nsamples", 16, "--seqlen", 32, "--validate", 0)


def facts_of(result):
    facts = json.loads(result.out)
    return facts["proposal"], facts["schemes"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2.7, 3.0, 5.5])
def test_the_budget_is_kept_and_spent(works, olmoe, calib, method, bits):
    proposal, schemes = facts_of(works("plan", olmoe, "--bits", bits, "--method", method, *G32, *calib, "--json"))
    assert bits - 0.02 < proposal["bits_per_weight"] <= bits
    assert bits - 0.02 < proposal["uniform"]["bits_per_weight"] <= bits
    assert len({scheme for scheme in schemes.values() if scheme}) > 1
    if method not in ("uniform", "random"):
        assert proposal["predicted_cost"] < proposal["uniform"]["predicted_cost"]


def test_the_file_is_the_plan(works, olmoe, tmp_path):
    file = tmp_path / "plan.json"
    _, schemes = facts_of(works("plan", olmoe, "--bits", 3, *ALPHA, "-o", file, "--json"))
    assert json.loads(works("plan", olmoe, "--config", file, "--json").out) == schemes
    plan = Plan.load(file)
    assert "bits a weight" in plan.comment
    assert all("predicted cost" in rule.comment for rule in plan.overrides)


def test_size_counts_the_whole_checkpoint(works, olmoe, tmp_path):
    for size, most in (("200kB", 200_000), ("180 KiB", 184_320)):
        file = tmp_path / f"{most}.json"
        works("plan", olmoe, "--size", size, *ALPHA, "-o", file)
        works("quantize", olmoe, "--config", file, "--method", "rtn", "-o", tmp_path / f"out{most}")
        tensors = [
            tensor.nbytes
            for file in (tmp_path / f"out{most}").glob("*.safetensors")
            for name, tensor in load_file(file).items()
            if not name.endswith("weight_shape")
        ]
        assert 0.99 * most < sum(tensors) <= most


@pytest.mark.parametrize("engine", ["vllm", "transformers", "any"])
@pytest.mark.parametrize("method", METHODS)
def test_engines_take_what_is_proposed(works, olmoe, calib, engine, method):
    result = works("plan", olmoe, "--bits", 3.4, "--method", method, *G32, *calib, "--engine", engine, "--json")
    facts = json.loads(result.out)
    assert facts["violations"] == []
    assert 2.25 < facts["proposal"]["bits_per_weight"] <= 3.4
    experts = {scheme for name, scheme in facts["schemes"].items() if ".layers.0.mlp.experts." in name}
    assert len(experts) == 1


def test_floors_ceilings_and_fixed_modules(works, olmoe, tmp_path):
    config = tmp_path / "fixed.json"
    config.write_text(json.dumps({"overrides": [{"pattern": "model.layers.0.self_attn.q_proj", "skip": True}]}))
    limits = ("--floor", "*.self_attn.*=4", "--ceiling", "*.down_proj=2", "--ceiling", "model.layers.1.**.down_proj=3")
    file = tmp_path / "plan.json"
    result = works("plan", olmoe, "--bits", 3.5, *ALPHA, *limits, "--config", config, "-o", file, "--json")
    proposal, schemes = facts_of(result)
    assert proposal["bits_per_weight"] <= 3.5
    assert schemes.pop("model.layers.0.self_attn.q_proj") is None
    assert {s for name, s in schemes.items() if "self_attn" in name and "proj" in name} <= {"int4 g32", "int8 g32"}
    assert {s for name, s in schemes.items() if "layers.0" in name and "down_proj" in name} == {"int2 g32"}
    assert {s for name, s in schemes.items() if "layers.1" in name and "down_proj" in name} <= {"int2 g32", "int3 g32"}
    assert "as --config says" in {rule.comment for rule in Plan.load(file).overrides}


def test_a_table_is_kept_and_read_again(works, olmoe, tmp_path):
    file = tmp_path / "table.json"
    first = works("plan", olmoe, "--bits", 3, *ALPHA, "--table", file, "--json").out
    before = file.read_bytes()
    assert works("plan", olmoe, "--bits", 3, *ALPHA, "--table", file, "--json").out == first
    works("plan", olmoe, "--bits", 2.6, "--method", "alpha", "--formats", "int2:g32,int4:g32", "--table", file)
    assert file.read_bytes() == before


def test_alphas_and_costs_come_as_csv(works, fails, olmoe, tmp_path):
    sheet, table = tmp_path / "alpha.csv", tmp_path / "table.json"
    works("plan", olmoe, "--bits", 3, *ALPHA, "--csv", sheet, "--table", table)
    with sheet.open(newline="") as lines:
        rows = {line["module"]: line for line in csv.DictReader(lines)}
    for row in json.loads(table.read_text())["rows"]:
        line = rows.pop(row["name"])
        assert float(line["alpha"]) == row["facts"]["alpha"]
        assert int(line["weights"]) == row["num_weights"]
        assert float(line["cost int3:g32"]) == row["cost"][1]
        assert int(line["bits int8:g32"]) == row["bits"][3]
    assert not rows
    fails("plan", olmoe, "--bits", 3, *ALPHA, "--csv", sheet, says=("already exists", "--overwrite"))


def test_explain_tells_the_predicted_cost(works, olmoe):
    told = works("plan", olmoe, "--bits", 3, *ALPHA, "--explain", "model.layers.0.self_attn.k_proj").out
    assert "k_proj (attention): int" in told


def test_quantize_finds_the_plan_itself(works, fails, olmoe, calib, tmp_path):
    table, plan = tmp_path / "table.json", tmp_path / "plan.json"
    budget = ("--bits", 3, *G32, "--table", table, *calib)
    result = works("quantize", olmoe, *budget, "-o", tmp_path / "out", "--engine", "vllm")
    assert "3.0" in result.out or "2.9" in result.out
    assert "bits a weight by sensitivity" in result.err
    assert json.loads((tmp_path / "out/alphaquant/costs.json").read_text()) == json.loads(table.read_text())
    works("report", tmp_path / "out")
    assert "Size and predicted cost" in (tmp_path / "out/alphaquant/report.html").read_text()
    works("plan", olmoe, "--bits", 3, *ALPHA, "--table", tmp_path / "alpha.json")
    works("report", tmp_path / "out", "--table", tmp_path / "alpha.json")
    assert "α of the spectra" in (tmp_path / "out/alphaquant/report.html").read_text()
    fails("report", tmp_path / "out", tmp_path / "out", "--table", table, says=("--table with several directories",))
    report = json.loads((tmp_path / "out/alphaquant/report.json").read_text())
    assert 2.9 < report["sizes"]["bits_per_weight"] <= 3
    works("plan", olmoe, *budget, "--engine", "vllm", "-o", plan)
    assert json.loads((tmp_path / "out/alphaquant/plan.json").read_text()) == json.loads(plan.read_text())
    for options in (("--scheme", "int4:g32"), ("--dry-run",), ("--legalize", "--engine", "vllm")):
        fails(
            "quantize", olmoe, *budget, *options, "-o", tmp_path / "other", says=(f"{options[0]} was given", "budget")
        )
    fails("quantize", olmoe, "--scheme", "int4:g32", "--formats", "int4", "-o", tmp_path / "other", says=("a budget",))


def test_both_plans_are_measured_on_held_out_tokens(works, olmoe, calib, other_text):
    budget = ("--bits", 3, *G32, *calib[:-2], "--validate", 3, "--held-out", other_text)
    proposal, _ = facts_of(works("plan", olmoe, *budget, "--json"))
    assert proposal["measured"]["windows"] == proposal["measured_uniform"]["windows"] == 3
    better = proposal["measured"]["kl"] <= proposal["measured_uniform"]["kl"]
    assert proposal["method"] == ("sensitivity" if better else "uniform")
    assert "held-out KL" in works("plan", olmoe, *budget).err


def test_a_frontier_is_shown_written_and_drawn(works, fails, olmoe, tmp_path):
    page, data = tmp_path / "frontier.html", tmp_path / "frontier.json"
    shown = works("plan", olmoe, "--frontier", *ALPHA, "-o", page).out
    assert shown.count("knee") == 1
    html = page.read_text()
    assert html.count("<circle") == 12
    assert "2.500 bits" in html
    facts = json.loads(works("plan", olmoe, "--frontier", *ALPHA, "-o", data, "--json").out)
    assert json.loads(data.read_text()) == facts
    assert 0 < facts["knee"] < 11
    fails("plan", olmoe, "--frontier", "--bits", 3, *ALPHA, says=("--bits and --frontier were both given",))


BAD = {
    "below the smallest": (("--bits", "2.0", *G32), ("2.000 bits", "2.500", "give --bits 2.500 or more")),
    "above bf16": (("--bits", "17"), ("--bits 17", "bf16 takes 16")),
    "no bits": (("--bits", "0"), ("--bits 0",)),
    "nan": (("--bits", "nan"), ("--bits nan",)),
    "both": (("--bits", "3", "--size", "1MB"), ("--bits and --size",)),
    "a size that is none": (("--size", "4 apples"), ("'4 apples'", "4GiB")),
    "a size above the model": (("--size", "4GiB"), ("4,294,967,296", "no more than")),
    "a size below the rest": (("--size", "1kB"), ("1,000 bytes", "stays unquantized")),
    "a floor above the budget": (
        ("--bits", "3", *G32, "--floor", "*.mlp.experts.*=8"),
        ("3.000 bits", "lower floors", "give --bits"),
    ),
    "floor above ceiling": (
        ("--bits", "3", *G32, "--floor", "*.self_attn.*=4", "--ceiling", "*.q_proj=3"),
        ("no format is left for model.layers.0.self_attn.q_proj", "at least 4 and at most 3"),
    ),
    "an unknown pattern": (("--bits", "3", "--floor", "*.self_atn.*=4"), ("'*.self_atn.*'", "--floor", "did you mean")),
    "a bound that is none": (("--bits", "3", "--floor", "*.self_attn.*"), ("PATTERN=BITS",)),
    "an unknown format": (("--bits", "3", "--formats", "int2,int5"), ("int5", "--formats")),
    "a format given twice": (("--bits", "3", "--formats", "int4,int4"), ("given twice",)),
    "a group that fits nothing": (("--bits", "3", "--formats", "int2:g48"), ("groups of 48", "64 inputs")),
    "a format that the engine refuses": (
        ("--bits", "5", "--formats", "int4:g32,fp6:g32", "--engine", "transformers"),
        ("fp6:g32", "transformers", "leave fp6:g32 out"),
    ),
    "an engine and half a tie": (
        ("--bits", "4", *G32, "--engine", "vllm", "--config", "half"),
        ("experts.0.gate_proj", "must have the same format"),
    ),
    "a scheme": (("--bits", "3", "--scheme", "int4"), ("--scheme", "--formats")),
    "legalize": (("--bits", "3", "--engine", "vllm", "--legalize"), ("--legalize", "leave it out")),
    "no budget": (("--scheme", "int4:g32", "--method", "alpha"), ("--method", "without a budget", "--bits")),
    "no text": (("--bits", "3", *G32, "--calib", "nowhere.txt"), ("nowhere.txt",)),
    "two budgets": (("--bits", "3", "--max-kl", "0.1"), ("--bits and --max-kl",)),
    "no divergence": (("--max-kl", "-1"), ("--max-kl -1", "nats")),
    "a divergence of spectra": (("--max-kl", "0.1", "--method", "alpha"), ("--max-kl", "only sensitivity")),
    "nothing to validate": (("--scheme", "int4:g32", "--validate", "3"), ("--validate", "without a budget")),
    "a sheet of nothing": (("--scheme", "int4:g32", "--csv", "a.csv"), ("--csv", "without a budget")),
    "no held-out text": (
        ("--bits", "3", *ALPHA, "--validate", "2", "--held-out", "nowhere.txt"),
        ("nowhere.txt",),
    ),
    "an unknown method": (("--bits", "3", "--method", "magic"), ("magic",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_budgets(fails, olmoe, tmp_path, case):
    options, says = BAD[case]
    (tmp_path / "half").write_text(
        json.dumps(
            {"overrides": [{"pattern": "model.layers.0.mlp.experts.0.gate_proj", "wq": "int8", "group_size": 32}]}
        )
    )
    options = [tmp_path / "half" if option == "half" else option for option in options]
    fails("plan", olmoe, *options, "-o", tmp_path / "plan.json", says=says)


def test_files_are_not_replaced(fails, olmoe, llama, works, tmp_path):
    plan, table = tmp_path / "plan.json", tmp_path / "table.json"
    works("plan", olmoe, "--bits", 3, *ALPHA, "-o", plan, "--table", table)
    fails("plan", olmoe, "--bits", 3, *ALPHA, "-o", plan, says=("already exists", "--overwrite"))
    fails("plan", llama, "--bits", 3, *ALPHA, "--table", table, says=("another checkpoint", str(table)))
    fails("plan", olmoe, "--bits", 3, *ALPHA, "--table", tmp_path, says=("cannot be read", str(tmp_path)))
