"""Outputs and options that cannot be: exit code 2, what, where and the remedy, no traceback, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alphaquant.pipeline import layer as layer_module
from pipeline import tiny

INT4 = ("--scheme", "int4:g32")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, llama, text):
    out = tmp_path_factory.mktemp("quantized") / "out"
    tiny.quantize(llama, out, "int4:g32", text, num_samples=8)
    return out


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
    fails("export", quantized, "-o", tmp_path / "x.pt", "--format", "dense", says=("keeps the layout", "directory"))


def test_a_dense_directory_keeps_no_codes(fails, quantized, tmp_path, works):
    works("export", quantized, "-o", tmp_path / "dense")
    says = ("alphaquant/modules.json", str(tmp_path / "dense"), "quantization run")
    fails("export", tmp_path / "dense", "-o", tmp_path / "out", says=says)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", "cuda:x", "mps", ""])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_unknown_devices(fails, llama, tmp_path, text, device, dry):
    args = ("--device", device)
    says = (f"device '{device}'", "cpu")
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
def test_options_that_are_none(fails, llama, quantized, tmp_path, verb, option, value):
    rest = {"quantize": (llama, *INT4, "-o", tmp_path / "out"), "eval": (llama,), "export": (quantized, "-o", tmp_path)}
    fails(verb, *rest[verb], option, value, says=(option,))


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
