"""`inspect --routing`: what it prints, what it saves, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest

from pipeline import tiny
from pipeline.test_records import unloved

SMALL = ("--nsamples", 8, "--seqlen", 32)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_routing_is_printed_and_saved(works, text, tmp_path):
    model = tiny.write_model(tmp_path / "model", "olmoe", changes=unloved(3))
    shown = works("inspect", model, "--routing", "--calib", text, *SMALL).out
    assert re.search(r"^1 +top-2 of 8 +0\.\d{3} +0\.00 +\d\.\d\d +\d+% +\d +1$", shown, re.MULTILINE)
    assert "on 256 tokens of" in shown
    assert re.search(r"^dead  layer 0: 3\ndead  layer 1: 3$", shown, re.MULTILINE)
    assert shown.splitlines()[-1] == "written to routing.json"
    saved = json.loads((tmp_path / "routing.json").read_text())
    assert [layer["dead"] for layer in saved["layers"]] == [[3], [3]]
    starved = {layer["layer"]: layer["starved"] for layer in saved["layers"] if layer["starved"]}
    named = dict(re.findall(r"^starved  layer (\d+): (.*)$", shown, re.MULTILINE))
    assert starved
    assert {int(layer): list(map(int, names.split(", "))) for layer, names in named.items()} == starved
    assert sum(saved["layers"][0]["tokens"]) == 2 * 256

    result = works("inspect", model, "--routing", "--calib", text, *SMALL, "--json", "-o", "other.json")
    assert json.loads(result.out) == saved == json.loads((tmp_path / "other.json").read_text())
    shown = works("inspect", model, "--routing", "--calib", text, *SMALL, "--json", "--seed", 1)
    assert json.loads(shown.out)["layers"] != saved["layers"]
    assert tiny.listing(tmp_path) == {"model", "routing.json", "other.json"} | {
        f"model/{path.name}" for path in model.iterdir()
    }


def test_shared_gates_have_a_column(works, text, tmp_path):
    model = tiny.write_model(tmp_path / "model", "qwen2_moe")
    shown = works("inspect", model, "--routing", "--calib", text, *SMALL).out
    assert re.search(r"^layer +experts .* dead +gate$", shown, re.MULTILINE)
    assert re.search(r"^0 +top-2 of 8 .* 0\.\d{3}$", shown, re.MULTILINE)


def test_what_is_refused(fails, works, olmoe, llama, text, tmp_path):
    routing = ("--routing", "--calib", text, *SMALL)
    fails("inspect", llama, *routing, says=("llama is dense", str(llama)))
    for option in (("--calib", text), ("--nsamples", 4), ("--seqlen", 4), ("--seed", 0), ("-o", "x.json")):
        fails("inspect", olmoe, *option, says=(f"{option[0]} was given without --routing", "add --routing"))
    fails("inspect", olmoe, "--routing", "--calib", "nowhere.txt", says=("nowhere.txt",))
    fails("inspect", olmoe, *routing, "-o", tmp_path / "no" / "x.json", says=("no",))
    fails("inspect", olmoe, *routing, "--device", "tpu", says=("device 'tpu'",))
    (tmp_path / "routing.json").write_text("kept")
    fails("inspect", olmoe, *routing, says=("routing.json already exists", "--overwrite"))
    works("inspect", olmoe, *routing, "--overwrite")
    assert json.loads((tmp_path / "routing.json").read_text())["version"] == 1
    out = tmp_path / "out"
    tiny.quantize(olmoe, out, "int4:g32", None)
    fails("inspect", out, *routing, says=("quantized already",))
