"""Every bad input: exit code 2, a message that names value, place and remedy, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from pipeline import tiny

from alphaquant.pipeline import layer as layer_module

INT4 = ("--scheme", "int4:g32")


@pytest.fixture
def model(tmp_path, olmoe):
    """A sharded model of one's own, to damage."""
    return shutil.copytree(olmoe, tmp_path / "model")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, llama, text):
    out = tmp_path_factory.mktemp("quantized") / "out"
    tiny.quantize(llama, out, "int4:g32", text, num_samples=8)
    return out


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# --------------------------------------------------------------------------------------------------- checkpoints


def truncate(model: Path) -> None:
    path = model / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(model: Path) -> None:
    path = model / "part-0.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def lose_shard(model: Path) -> None:
    (model / "part-1.safetensors").unlink()


def lose_all(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()


def pickled(model: Path) -> None:
    lose_all(model)
    torch.save({}, model / "pytorch_model.bin")


def misplaced(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))


def absolute(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "/etc/passwd"
    index.write_text(json.dumps(content))


def more_layers(model: Path) -> None:
    edit(model / "config.json", num_hidden_layers=3)


def wider(model: Path) -> None:
    edit(model / "config.json", hidden_size=128)


CHECKPOINTS = {
    "truncated": (truncate, ("part-1.safetensors", "no valid safetensors file", "download")),
    "cut in the header": (cut_header, ("part-0.safetensors", "header")),
    "missing shard": (lose_shard, ("part-1.safetensors", "is not there", "model.safetensors.index.json")),
    "no weights": (lose_all, ("no *.safetensors", "model")),
    "pickle": (pickled, ("pytorch_model.bin", "refused", "save_pretrained(DIR, safe_serialization=True)")),
    "path outside": (misplaced, ("../elsewhere.safetensors", "model.norm.weight", "model.safetensors.index.json")),
    "absolute path": (absolute, ("/etc/passwd", "model.norm.weight")),
    "missing layer": (more_layers, ("model.layers.2.", "not in the checkpoint")),
    "wrong width": (wider, ("input_layernorm.weight", "[64]", "[128]", "config.json")),
    "unknown family": (
        lambda model: edit(model / "config.json", model_type="olmo"),
        ("'olmo'", "known families: ", "llama, mistral, olmoe", "did you mean 'olmoe'?", "config.json"),
    ),
    "no family": (lambda model: edit(model / "config.json", model_type=None), ("model_type is None", "llama")),
    "missing key": (lambda model: edit(model / "config.json", num_experts=None), ("'num_experts'", "config.json")),
    "unknown activation": (lambda model: edit(model / "config.json", hidden_act="gelu"), ("'gelu'", "silu")),
    "too many experts": (lambda model: edit(model / "config.json", num_experts_per_tok=9), ("9", "8 experts")),
    "no config": (lambda model: (model / "config.json").unlink(), ("no config.json", "model")),
    "config is no JSON": (lambda model: (model / "config.json").write_text("{"), ("config.json", "not valid JSON")),
    "config is a list": (lambda model: (model / "config.json").write_text("[]"), ("config.json", "list")),
    "quantized already": (
        lambda model: edit(model / "config.json", quantization_config={"quant_method": "gptq"}),
        ("is quantized already", "quantization_config", "original"),
    ),
}


# Their messages say what is expected, but not yet what to do.
WITHOUT_REMEDY = ("missing layer", "unknown activation", "too many experts")


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_broken_checkpoints(fails, model, tmp_path, text, fault):
    damage, says = CHECKPOINTS[fault]
    damage(model)
    expected = {"says": says, "remedy": fault not in WITHOUT_REMEDY}
    fails("quantize", model, *INT4, "--calib", text, "-o", tmp_path / "out", **expected)
    fails("inspect", model, **expected)
    fails("plan", model, *INT4, **expected)
    if fault != "quantized already":
        fails("eval", model, "--data", text, **expected)
    assert not (tmp_path / "out").exists()


def test_models_that_are_none(fails, tmp_path, text, monkeypatch):
    (tmp_path / "file").write_text("x")
    for verb in (("inspect",), ("plan", *INT4), ("quantize", *INT4, "-o", tmp_path / "out"), ("eval", "--data", text)):
        fails(verb[0], tmp_path / "nowhere", *verb[1:], says=("nowhere", "hub id"))
        fails(verb[0], tmp_path / "file", *verb[1:], says=("is a file", "config.json"))
    for verb in ("export", "report"):
        options = ("-o", tmp_path / "out")
        fails(verb, tmp_path / "nowhere", *options, says=("nowhere",))
        fails(verb, tmp_path, *options, says=(str(tmp_path),))
    import huggingface_hub  # noqa: PLC0415

    def offline(*_args, **_options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    fails("inspect", "someone/model", says=("'someone/model'", "no route to host", "the network"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers(fails, tmp_path, text, value):
    name = "model.layers.1.mlp.experts.6.up_proj.weight"
    tensor = tiny.random_tensors("olmoe")[name]
    tensor[3, 5] = float(value)
    model = tiny.write_model(tmp_path / "model", "olmoe", changes={name: tensor})
    says = (f"where: {name}", "NaN or infinity")
    fails("quantize", model, *INT4, "--calib", text, "--seqlen", 32, "-o", tmp_path / "out", says=says)
    fails("quantize", model, *INT4, "--method", "rtn", "-o", tmp_path / "out", says=says)
    fails("quantize", model, *INT4, "--method", "rtn", "--save", tmp_path / "x.pt", says=says)
    fails("eval", model, "--data", text, "--seqlen", 32, says=says)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_activations_that_overflow(fails, tmp_path, text):
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(8)]
    large = {name: torch.randn(64, 64).clamp(-3, 3) * 1e38 for name in names}
    model = tiny.write_model(tmp_path / "model", "olmoe", changes=large, dtype="bfloat16")
    says = ("where: layer 1, feed-forward", "NaN or infinite in sample 0", "--dtype fp32")
    calib = ("--nsamples", 4, "--seqlen", 32, "--calib", text)
    fails("quantize", model, "--scheme", "int8:g32", *calib, "-o", tmp_path / "out", says=says)
    fails("eval", model, "--data", text, "--seqlen", 32, says=says)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# --------------------------------------------------------------------------------------------------------- plans

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
    "activations": ({"default": {"aq": "int8"}}, ('aq is "int8"', "default.aq", '"bf16"')),
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


# --------------------------------------------------------------------------------------------------------- texts


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


# ------------------------------------------------------------------------------------------------------- outputs


def test_outputs_that_hold_something_else(fails, olmoe, tmp_path, text, quantized):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    args = ("--calib", text, "--seqlen", 32)
    says = (str(out), "not empty", "--overwrite")
    fails("quantize", olmoe, *INT4, *args, "-o", out, says=says)
    fails("quantize", olmoe, *INT4, "--dry-run", "-o", out, says=says)
    fails("quantize", olmoe, *INT4, *args, "-o", out / "thesis.txt", says=("thesis.txt", "--overwrite"))
    fails("export", quantized, "-o", out, says=says)
    single = tmp_path / "model.pt"
    single.write_text("mine")
    says = (str(single), "already exists", "--overwrite")
    fails("quantize", olmoe, *INT4, *args, "--save", single, says=says)
    fails("quantize", olmoe, *INT4, *args, "-o", tmp_path / "new", "--save", single, says=says)
    fails("export", quantized, "-o", single, says=says)
    assert single.read_text() == "mine"
    directory = tmp_path / "directory.pt"
    directory.mkdir()
    for options in ((), ("--overwrite",)):
        fails("quantize", olmoe, *INT4, *args, "--save", directory, *options, says=("directory.pt", "already exists"))
        fails("export", quantized, "-o", directory, *options, says=("directory.pt", "already exists"))


def test_the_model_is_not_the_output(fails, model, tmp_path):
    for options in ((), ("--overwrite",)):
        for out in (model, model / "out", tmp_path):
            fails("quantize", model, *INT4, "--method", "rtn", "-o", out, *options, says=(str(out), "model itself"))


@pytest.mark.parametrize("path", ["/dev/null/x", "/dev/null/deep/er/x", f"/tmp/{'x' * 300}"])
def test_outputs_that_cannot_be_written(fails, olmoe, quantized, tmp_path, text, path):
    args = ("quantize", olmoe, *INT4, "--calib", text, "--seqlen", 32)
    says = (path, "cannot be", "choose another")
    fails(*args, "-o", path, says=says)
    fails(*args, "-o", path, "--overwrite", says=says)
    fails(*args, "--save", f"{path}.pt", says=(str(Path(path).parent), *says[1:]))
    fails(*args, "-o", tmp_path / "out", "--save", f"{path}.pt", says=says)
    fails("export", quantized, "-o", path, says=says)
    fails("export", quantized, "-o", f"{path}.pt", says=says)
    fails("report", quantized, "-o", path, says=(path, "cannot be"))
    assert tiny.listing(tmp_path) == set()


def test_a_full_disk(fails, llama, tmp_path, text, monkeypatch):
    from alphaquant.checkpoint import writer  # noqa: PLC0415

    calls = []

    def fsync(_descriptor):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", fsync)
    args = ("quantize", llama, *INT4, "--calib", text, "--seqlen", 32)
    fails(*args, "-o", tmp_path / "out", says=("the disk is full", "free space"))
    assert tiny.listing(tmp_path) == set()


def test_nowhere_to_write(fails, olmoe, tmp_path):
    fails("quantize", olmoe, *INT4, says=("nothing to write to", "-o DIR", "--save FILE.pt"))
    fails("quantize", olmoe, *INT4, "--save", tmp_path / "x.bin", says=("x.bin does not end in .pt", "quantized.pt"))
    fails("quantize", olmoe, *INT4, "--save", tmp_path / "x.pt", "-o", tmp_path / "x.pt", says=("are both",))


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_layout_that_cannot_hold_the_plan(fails, olmoe, quantized, tmp_path, text, dry):
    common = ("quantize", olmoe, "--calib", text, "--seqlen", 32, "-o", tmp_path / "out", *dry)
    says = ("compressed-tensors cannot hold fp4 g32", "model.layers.0.self_attn.q_proj", "--format auto")
    fails(*common, "--scheme", "fp4:g32", "--format", "compressed-tensors", says=says)
    says = ("humming cannot hold int3 g16", "32-bit words", "--format")
    assert dry or not (tmp_path / "out").exists()
    fails("export", quantized, "-o", tmp_path / "x.pt", "--format", "dense", says=("keeps the layout", "directory"))


def test_a_dense_directory_keeps_no_codes(fails, quantized, tmp_path, works):
    works("export", quantized, "-o", tmp_path / "dense")
    says = ("alphaquant/modules.json", str(tmp_path / "dense"), "quantization run")
    fails("export", tmp_path / "dense", "-o", tmp_path / "out", says=says)


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", "cuda:x", "mps", ""])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_unknown_devices(fails, llama, tmp_path, text, device, dry):
    args = ("--device", device)
    says = (f"--device '{device}'", "cpu")
    fails("quantize", llama, *INT4, "--calib", text, "--seqlen", 32, "-o", tmp_path / "out", *args, *dry, says=says)
    fails("eval", llama, "--data", text, "--seqlen", 32, *args, says=says)
    assert tiny.listing(tmp_path) == set()


@pytest.mark.parametrize(
    ("verb", "option", "value"),
    [
        ("quantize", "--method", "awq"),
        ("quantize", "--effort", "heroic"),
        ("quantize", "--format", "gguf"),
        ("quantize", "--dtype", "int8"),
        ("quantize", "--nsamples", "0"),
        ("quantize", "--nsamples", "many"),
        ("quantize", "--seqlen", "-1"),
        ("quantize", "--seed", "99999999999999999999"),
        ("quantize", "--routing-weight", "-1"),
        ("quantize", "--bogus", "1"),
        ("eval", "--seqlen", "1"),
        ("eval", "--windows", "0"),
        ("eval", "--dtype", "int8"),
        ("export", "--format", "gguf"),
    ],
)
def test_options_that_are_none(alphaquant, llama, quantized, tmp_path, verb, option, value):
    """The parser's own words: usage, the option and the value, exit code 2."""
    rest = {"quantize": (llama, *INT4, "-o", tmp_path / "out"), "eval": (llama,), "export": (quantized, "-o", tmp_path)}
    result = alphaquant(verb, *rest[verb], option, value)
    assert result.code == 2
    assert result.out == ""
    assert f"Usage: alphaquant {verb}" in result.err
    assert option in result.err
    assert "Traceback" not in result.err
    assert tiny.listing(tmp_path) == set()


@pytest.mark.parametrize("args", [("quantise",), ("quantize",), ("eval",), ("export", "x"), ("inspect", "a", "b")])
def test_commands_that_are_none(alphaquant, args):
    result = alphaquant(*args)
    assert result.code == 2
    assert "Usage: alphaquant" in result.err
    assert "Traceback" not in result.err


def test_an_interrupted_run_says_so(alphaquant, llama, tmp_path, text, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_module.LayerQuantizer, "layer", interrupt)
    for target in (("-o", tmp_path / "out"), ("--save", tmp_path / "out.pt")):
        result = alphaquant("quantize", llama, *INT4, "--calib", text, "--seqlen", 32, *target)
        assert result.code == 130
        assert "interrupted" in result.err
        assert "Traceback" not in result.err
    assert tiny.listing(tmp_path) == set()


def test_comparing_other_models(fails, llama, tmp_path, text):
    other = tiny.write_model(tmp_path / "other", "llama", vocab_size=160)
    args = ("eval", llama, "--data", text, "--seqlen", 32, "--against")
    fails(*args, other, says=("128 and 160", str(other), "--against"))
    fails(*args, tmp_path / "nowhere", says=("nowhere",))


def test_errors_do_not_disturb_json(fails, llama, tmp_path):
    """Standard output stays empty: `fails` holds that; a reader of JSON sees the exit code."""
    fails(
        "quantize", llama, *INT4, "--calib", tmp_path / "none.txt", "-o", tmp_path / "out", "--json", says=("none.txt",)
    )
    fails("eval", llama, "--data", tmp_path / "none.txt", "--json", says=("none.txt",))


def test_a_real_process_fails_the_same_way(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "alphaquant", "inspect", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no model directory")
    assert "Traceback" not in done.stderr
