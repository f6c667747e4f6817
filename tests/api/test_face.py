"""The Python face does what the command does, with its defaults; names and options are promises, kept here."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch
import typer

import alphaquant
from alphaquant import errors
from alphaquant.cli import app
from alphaquant.pipeline import Calibration, load
from alphaquant.solver import Recipe
from pipeline import tiny

SMALL = Calibration("", num_samples=8, seqlen=32)

FACE = [
    "AlphaQuantError",
    "Calibration",
    "GPTQConfig",
    "Plan",
    "PlannedModel",
    "Search",
    "Serving",
    "__version__",
    "evaluate",
    "evaluate_tasks",
    "export",
    "load",
    "plan",
    "quantize",
    "report",
]
# One that goes, or is spelled anew, breaks somebody's script; a new one is frozen when it is listed here.
OPTIONS = {
    "quantize": """MODEL --output --save --config --scheme --bits --size --formats --table --validate --method --effort
        --calib --nsamples --seqlen --seed --balance --routing-weight --repair-router --tune-steps --asymmetric-target
        --permute --rotate --kernels --format --engine --tp --gpu --legalize --device --dtype --overwrite --fresh
        --max-memory --dry-run --strict --log-json --verbose --quiet --json""",
    "status": "OUT --json",
    "eval": """DIR --data --seqlen --windows --against --rtn --tasks --limit --fewshot --task-path --device --dtype
        --quiet --json""",
    "report": "OUT... --output --quality --table --json",
    "inspect": """MODEL --config --scheme --routing --calib --nsamples --seqlen --seed --output --device --dtype
        --overwrite --quiet --json""",
    "plan": """MODEL --config --scheme --bits --size --max-kl --frontier --method --formats --floor --ceiling --table
        --csv --validate --held-out --seed --calib --nsamples --seqlen --output --explain --engine --tp --gpu --legalize
        --format --device --dtype --overwrite --quiet --json""",
    "export": "OUT --output --format --overwrite --json",
    "verify": "DIR --engine --python --trust-remote-code --json",
    "demo": "--output --overwrite --quiet --json",
}


def test_the_names_are_frozen():
    assert alphaquant.__all__ == FACE
    assert all(hasattr(alphaquant, name) for name in FACE)
    assert (Path(alphaquant.__file__).parent / "py.typed").is_file()


def test_the_options_are_frozen():
    command = typer.main.get_command(app)
    found = {
        name: [max(p.opts, key=len) if p.param_type_name == "option" else p.metavar for p in verb.params]
        for name, verb in command.commands.items()
    }
    assert found == {name: options.split() for name, options in OPTIONS.items()}


def test_defaults_are_those_of_the_command():
    commands = typer.main.get_command(app).commands

    def option(verb, name):
        value = next(p.default for p in commands[verb].params if name in p.opts)
        return getattr(value, "value", value)

    recipe, calibration = Recipe(), Calibration()
    for name, ours in {
        "--method": recipe.method.value,
        "--effort": recipe.effort.value,
        "--routing-weight": recipe.routing_power,
        "--repair-router": recipe.repair_router,
        "--tune-steps": recipe.tune_steps,
        "--asymmetric-target": recipe.asymmetric_target,
        "--permute": recipe.permute.value,
        "--kernels": recipe.backend.value,
        "--nsamples": calibration.num_samples,
        "--seqlen": calibration.seqlen,
        "--seed": calibration.seed,
    }.items():
        assert option("quantize", name) == ours, name
    for verb, function, names in (
        (
            "quantize",
            alphaquant.quantize,
            ("bits", "size", "rotate", "device", "dtype", "overwrite", "fresh", "legalize", "strict"),
        ),
        ("eval", alphaquant.evaluate, ("data", "seqlen", "windows", "against", "rtn", "device", "dtype")),
        ("eval", alphaquant.evaluate_tasks, ("limit", "fewshot", "task_path", "device", "dtype")),
        ("plan", alphaquant.plan, ("bits", "size", "max_kl", "legalize", "device", "dtype")),
        ("report", alphaquant.report, ("table",)),
        ("export", alphaquant.export, ("overwrite",)),
    ):
        parameters = inspect.signature(function).parameters
        for name in names:
            assert option(verb, f"--{name.replace('_', '-')}") == parameters[name].default, (verb, name)


def test_rooms_behind_verbs_can_be_imported():
    for name in ("plan", "report.read", "report"):
        importlib.import_module(f"alphaquant.{name}")
    assert callable(alphaquant.plan)
    assert callable(alphaquant.report)
    assert alphaquant.Plan is importlib.import_module("alphaquant.plan").Plan


@pytest.mark.parametrize("name", [name for name in FACE if name[0].islower()])
def test_docstrings_say_what_goes_in_and_what_goes_wrong(name):
    function = getattr(alphaquant, name)
    text = inspect.getdoc(function)
    assert "Raises:" in text
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}: " in text, parameter


@pytest.fixture(scope="module")
def made(tmp_path_factory, olmoe, text):
    """What `alphaquant.quantize` makes of a mixture, and its result."""
    out = tmp_path_factory.mktemp("face") / "out"
    calibration = Calibration(str(text), num_samples=8, seqlen=32)
    return out, alphaquant.quantize(olmoe, str(out), tiny.SERVED_PLAN, calibration=calibration, device="cpu")


def test_quantize_is_the_command(made, olmoe, text, tmp_path):
    out, result = made
    tiny.quantize(olmoe, tmp_path / "out", tiny.SERVED_PLAN, text, num_samples=8)
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        assert shard.read_bytes() == (out / shard.name).read_bytes()
    assert result.report == json.loads((out / "alphaquant/report.json").read_text())
    assert result.report["command"] == "alphaquant.quantize"


def test_rounding_needs_no_text(olmoe, tmp_path):
    result = alphaquant.quantize(olmoe, tmp_path / "out", "int4:g32", gptq_config=alphaquant.GPTQConfig(method="rtn"))
    assert result.report["calibration"] is None
    assert {module.method for record in result.records for module in record.modules} == {"rtn"}


def test_every_kind_of_plan(olmoe, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(tiny.SERVED_PLAN))
    plan = alphaquant.Plan.from_dict(tiny.SERVED_PLAN)
    given = [plan, tiny.SERVED_PLAN, tmp_path / "plan.json", str(tmp_path / "plan.json")]
    found = [alphaquant.plan(str(olmoe), each) for each in given]
    assert all(each.resolved.schemes == found[0].resolved.schemes for each in found)
    planned = alphaquant.plan(olmoe, "int4:g32")
    assert {str(scheme) for scheme in planned.resolved.schemes.values()} == {"int4 g32", "None"}
    assert sum(size.modules for size in planned.sizes) == 69
    assert "default" in str(planned.resolved.explain("model.layers.0.mlp.experts.0.up_proj"))
    assert planned.violations == []


def test_an_engine_is_asked(olmoe, text, tmp_path):
    planned = alphaquant.plan(olmoe, tiny.SERVED_PLAN, serving="vllm")
    assert planned.violations
    legal = alphaquant.plan(olmoe, tiny.SERVED_PLAN, serving="vllm", legalize=True)
    assert legal.violations == []
    assert legal.changes
    with pytest.raises(errors.PlanError, match="would not take this plan"):
        alphaquant.quantize(olmoe, tmp_path / "out", tiny.SERVED_PLAN, serving="vllm")
    for call in (
        lambda: alphaquant.plan(olmoe, "int4:g32", serving="tgi"),
        lambda: alphaquant.plan(olmoe, "int4:g32", legalize=True),
    ):
        with pytest.raises(errors.ConfigError, match="engine"):
            call()
    calibration = Calibration(str(text), num_samples=2, seqlen=32)
    result = alphaquant.quantize(
        olmoe, tmp_path / "out", tiny.SERVED_PLAN, calibration=calibration, serving="vllm", legalize=True
    )
    assert result.report["engines"]["vllm"] == []


def test_a_plan_for_a_budget(olmoe, text, tmp_path):
    search = alphaquant.Search(formats="int2:g32,int3:g32,int4:g32,int8:g32", validate=0, table=tmp_path / "costs.json")
    calibration = Calibration(str(text), num_samples=8, seqlen=32)
    found = alphaquant.plan(olmoe, bits=3, search=search, calibration=calibration, serving="vllm", device="cpu")
    assert found.violations == []
    assert 2.9 < found.proposal["bits_per_weight"] <= 3
    assert any("bits a weight by sensitivity" in line for line in found.changes)
    options = {"calibration": calibration, "serving": "vllm", "device": "cpu"}
    result = alphaquant.quantize(
        olmoe, tmp_path / "out", bits=3, search=search, log_json=tmp_path / "log.jsonl", **options
    )
    assert result.report["sizes"]["bits_per_weight"] == pytest.approx(found.proposal["bits_per_weight"], abs=1e-6)
    assert json.loads((tmp_path / "out/alphaquant/plan.json").read_text()) == json.loads(found.plan.to_json())
    assert (tmp_path / "out/alphaquant/costs.json").read_text() == (tmp_path / "costs.json").read_text()
    html, _ = alphaquant.report(tmp_path / "out")
    assert "Size and predicted cost" in html.read_text()
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["event"] == "end"
    # the plan that was found is one like any other
    alphaquant.quantize(olmoe, tmp_path / "again", found.plan, **options)
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()


def test_budgets_are_those_of_the_command(olmoe, tmp_path):
    fixed = {"overrides": [{"pattern": "*.self_attn.*", "wq": "int8", "group_size": 32}]}
    search = alphaquant.Search(
        "alpha", "int2:g32,int3:g32,int4:g32", floors={"*.down_proj": 3}, ceilings={"*.up_proj": 3}
    )
    found = alphaquant.plan(olmoe, fixed, size="185kB", search=search)
    schemes = {name: str(scheme) for name, scheme in found.resolved.schemes.items()}
    assert {s for name, s in schemes.items() if ".self_attn." in name and name.endswith("_proj")} == {"int8 g32"}
    assert {s for name, s in schemes.items() if name.endswith("down_proj")} <= {"int3 g32", "int4 g32"}
    assert {s for name, s in schemes.items() if name.endswith("up_proj")} <= {"int2 g32", "int3 g32"}
    assert 170_000 < sum(size.after_bytes for size in found.sizes) <= 185_000
    assert alphaquant.plan(olmoe, fixed, size=185_000, search=search).plan == found.plan


def test_evaluate_report_and_export(made, olmoe, text, tmp_path):
    out, _ = made
    options = {"data": str(text), "seqlen": 32, "windows": 4, "device": "cpu"}
    quality = alphaquant.evaluate(str(out), against=str(olmoe), rtn=True, **options)
    assert quality.windows == 4
    rounded = json.loads((out / "alphaquant/quality/calibration-rtn.json").read_text())
    assert rounded["weights"] == "round to nearest"
    assert rounded["kl"] > quality.agreement.kl
    kept = json.loads((out / "alphaquant/quality/calibration.json").read_text())
    assert kept["perplexity"] == quality.perplexity
    assert kept["weights"] == "quantized"
    html, markdown = alphaquant.report(str(out), output=tmp_path / "report")
    assert f"{quality.perplexity:.4f}" in markdown.read_text()
    assert html.is_file()
    assert len(alphaquant.report(out, out, output=tmp_path / "both")) == 2

    size = alphaquant.export(out, tmp_path / "dense")
    assert size == sum(path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors"))
    assert torch.equal(load(tmp_path / "dense").logits(tiny.token_ids()), load(out).logits(tiny.token_ids()))
    assert alphaquant.export(out, tmp_path / "x.pt") == (tmp_path / "x.pt").stat().st_size
    assert torch.load(tmp_path / "x.pt", weights_only=True)["version"] == 1


def test_what_is_refused_leaves_nothing(made, olmoe, tmp_path):
    out, _ = made
    (tmp_path / "there.pt").write_text("kept")
    before = tiny.listing(tmp_path)
    target = tmp_path / "new"
    calls = {
        "dtype is 'int8'": lambda: alphaquant.quantize(olmoe, target, "int4:g32", dtype="int8"),
        "there is no layout 'gguf'": lambda: alphaquant.quantize(olmoe, target, "int4:g32", layout="gguf"),
        "there is no layout 'gptq2'": lambda: alphaquant.export(out, target, layout="gptq2"),
        "device 'tpu'": lambda: alphaquant.quantize(olmoe, target, "int4:g32", device="tpu"),
        "no model directory": lambda: alphaquant.quantize(tmp_path / "none", target, "int4:g32"),
        "rtn was asked for without an original": lambda: alphaquant.evaluate(out, rtn=True),
        "tasks is 'arc_easy'": lambda: alphaquant.evaluate_tasks(out, "arc_easy"),
        "there is no plan": lambda: alphaquant.quantize(olmoe, target),
        "bits and size were both given": lambda: alphaquant.quantize(olmoe, target, bits=3, size="1GiB"),
        "without a budget": lambda: alphaquant.plan(olmoe, "int4:g32", search=alphaquant.Search()),
        "legalize was given with a budget": lambda: alphaquant.plan(olmoe, bits=3, serving="vllm", legalize=True),
        "bits is '3'": lambda: alphaquant.plan(olmoe, bits="3"),
        "max_kl is True": lambda: alphaquant.plan(olmoe, max_kl=True),
        "'4 bits' is no size": lambda: alphaquant.plan(olmoe, size="4 bits"),
        "--bits 99 is no budget": lambda: alphaquant.quantize(olmoe, target, bits=99),
        "config has no overrides": lambda: alphaquant.plan(olmoe, "int4:g32", bits=3),
        "strategy is 'best'": lambda: alphaquant.plan(olmoe, bits=3, search=alphaquant.Search("best")),
        "--max-kl was given with": lambda: alphaquant.plan(olmoe, max_kl=0.1, search=alphaquant.Search("alpha")),
        "matches no module": lambda: alphaquant.plan(olmoe, bits=3, search=alphaquant.Search(floors={"*.qq": 3})),
        "unknown format 'int5'": lambda: alphaquant.plan(olmoe, "int5"),
        "lm_head": lambda: alphaquant.plan(olmoe, {"lm_head": "int4:g32"}),
        "config is a int": lambda: alphaquant.plan(olmoe, 4),
        "modules without their model": lambda: alphaquant.export({}, target),
        "a directory with a model": lambda: alphaquant.export(out, target, model=load(olmoe)),
        "keeps the layout": lambda: alphaquant.export(out, tmp_path / "x.pt", layout="dense"),
        "already exists": lambda: alphaquant.export(out, tmp_path / "there.pt"),
        "no directory": alphaquant.report,
        "whose are they": lambda: alphaquant.report(out, out, quality=[out / "x.json"]),
        "a table with several": lambda: alphaquant.report(out, out, table=out / "x.json"),
        "is not a directory that alphaquant made": lambda: alphaquant.report(olmoe),
    }
    for message, call in calls.items():
        with pytest.raises(errors.AlphaQuantError, match=message) as caught:
            call()
        assert caught.value.remedy, message
        assert tiny.listing(tmp_path) == before, message
