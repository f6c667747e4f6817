"""The model card: what hubs and readers find in README.md of an output, and whose it is."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from alphaquant.layouts import QuantizedCheckpoint
from alphaquant.pipeline import export_checkpoint, measure_quality, torch_device
from alphaquant.pipeline import rundir as rundir_module
from alphaquant.verification import check_stored

from . import tiny
from .test_resume import Stop, stop_in_layer

THEIRS = """---
license: other
license_name: some-license
license_link: "https://example.org/LICENSE"
base_model: someone/parent
tags:
- chat
---
# Of the original

Nothing of this is true of what is made of it.
"""


def card_of(directory):
    """As the hub reads it."""
    return ModelCard((directory / "README.md").read_text(encoding="utf-8"))


@pytest.fixture
def cached(tmp_path):
    """A model as the hub's cache holds it, with a card of its own."""
    model = tiny.write_model(tmp_path / "models--org--Some-MoE" / "snapshots" / "1234", "olmoe")
    (model / "README.md").write_text(THEIRS)
    return model


def test_what_a_hub_reads(cached, text, tmp_path):
    out = tmp_path / "out"
    result = tiny.quantize(cached, out, tiny.SERVED_PLAN, text, command="alphaquant quantize X")
    data, body = card_of(out).data.to_dict(), card_of(out).text
    assert data == {
        "license": "other",
        "license_name": "some-license",
        "license_link": "https://example.org/LICENSE",
        "base_model": "org/Some-MoE",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["alphaquant", "gptq", "compressed-tensors"],
    }
    assert "# org/Some-MoE, quantized" in body
    assert "Of the original" not in body
    assert f"| {result.report['sizes']['bits_per_weight']:.3f} |" in body
    assert "```bash\nalphaquant quantize X\n```" in body
    assert "alphaquant export . --format dense" in body  # no engine takes this mix
    assert "Not measured yet" in body
    assert json.dumps(json.loads((out / "alphaquant/plan.json").read_text()), indent=2) in body
    for scheme in {str(module.scheme) for module in QuantizedCheckpoint.open(out).modules.values()}:
        assert f"| {scheme} |" in body


def test_an_export_keeps_the_heritage_and_tells_its_own_layout(cached, tmp_path, text):
    out, humming, dense = (tmp_path / name for name in ("out", "humming", "dense"))
    tiny.quantize(cached, out, "int4:g32", None)
    measure_quality(out, data=str(text), seqlen=32, windows=4, against=cached, device=torch_device("cpu"))
    for target in (humming, dense):
        export_checkpoint(out, target, target.name)
        ours, theirs = (card_of(path).data.to_dict() for path in (out, target))
        assert theirs.pop("tags") == ["alphaquant", target.name]  # rounded to nearest: no gptq
        assert ours.pop("tags") == ["alphaquant", "compressed-tensors"]
        assert ours == theirs
        assert "calibration.txt | quantized" in card_of(target).text
    assert "vllm serve ." in card_of(dense).text
    assert "NVIDIA" in card_of(humming).text


def test_what_is_measured_stands_in_the_card_and_verify_knows_it(olmoe, text, other_text, tmp_path):
    out, cpu = tmp_path / "out", torch_device("cpu")
    tiny.quantize(olmoe, out, "int3:g32", None)
    before = (out / "README.md").read_text()
    found = measure_quality(out, data=str(text), seqlen=32, windows=4, against=olmoe, rtn=True, device=cpu).found
    after = (out / "README.md").read_text()
    assert f"| {found.perplexity:.4f} ± {found.stderr:.4f} |" in after
    assert "round to nearest" in after
    assert before.split("## Quality")[0] == after.split("## Quality")[0]
    assert before.split("## How")[1] == after.split("## How")[1]
    assert check_stored(out).problems == ()
    measure_quality(out, data=str(other_text), seqlen=32, windows=4, device=cpu)
    assert (out / "README.md").read_text().count(" | quantized | ") == 2
    (out / "README.md").write_text("mine")
    measure_quality(out, data=str(text), seqlen=32, windows=8, device=cpu)
    assert (out / "README.md").read_text() == "mine"
    assert [problem.where for problem in check_stored(out).problems] == ["README.md"]


@pytest.mark.parametrize(
    "front",
    [
        "license: mit # free\nlicense_name: [1]",
        "license: 'mit\\nbase_model: x/y'",
        "license: {a: b}",
        "license:\n- mit",
        "",
    ],
)
def test_what_is_no_plain_value_is_not_taken_over(tmp_path, front):
    model = tiny.write_model(tmp_path / "model", "llama")
    (model / "README.md").write_text(f"---\n{front}\n---\n")
    tiny.quantize(model, tmp_path / "out", "int4:g32", None)
    data = card_of(tmp_path / "out").data.to_dict()
    assert data.keys() == {"pipeline_tag", "tags"}


@pytest.mark.parametrize("content", [b"\xff\xfe---", b"---\nlicense: mit", None])
def test_a_card_that_cannot_be_read_is_no_obstacle(tmp_path, content):
    model = tiny.write_model(tmp_path / "model", "llama")
    (model / "README.md").mkdir() if content is None else (model / "README.md").write_bytes(content)
    tiny.quantize(model, tmp_path / "out", "int4:g32", None)
    assert "license" not in card_of(tmp_path / "out").data.to_dict()


def test_names_and_plans_cannot_break_out(tmp_path):
    name = "a|b `c` <script>\n# x\n## Quality"
    model = tiny.write_model(tmp_path / name, "llama")
    plan = {"default": {"wq": "int4", "group_size": 32}, "comment": "```\n<b>", "overrides": []}
    tiny.quantize(model, tmp_path / "out", plan, None, command="alphaquant '```\n## Quality\n# y'")
    body = card_of(tmp_path / "out").text
    prose = body.split("## How it was made")[0]
    assert [line for line in prose.splitlines() if line.startswith("# ")] == [
        r"# a\|b \`c\` \<script\> \# x \#\# Quality, quantized"
    ]
    assert "<script>" not in prose.replace("`` a\\|b `c` <script> # x ## Quality ``", "")
    assert "````bash\n" in body
    assert "````json\n" in body


def test_the_command_is_that_which_started_the_run(olmoe, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_layer(patch, 1)
        with pytest.raises(Stop):
            tiny.quantize(olmoe, tmp_path / "a", "int4:g32", text, command="first")
    tiny.quantize(olmoe, tmp_path / "a", "int4:g32", text, command="first --quiet")
    tiny.quantize(olmoe, tmp_path / "b", "int4:g32", text, command="first")
    assert (tmp_path / "a" / "README.md").read_bytes() == (tmp_path / "b" / "README.md").read_bytes()


def test_an_older_directory_without_a_card_is_measured_and_exported(olmoe, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rundir_module, "card", lambda *_: "")
        tiny.quantize(olmoe, tmp_path / "out", "int4:g32", None)
    path = tmp_path / "out" / "alphaquant" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["README.md"]
    path.write_text(json.dumps(manifest))
    (tmp_path / "out" / "README.md").unlink()
    measure_quality(tmp_path / "out", data=str(text), seqlen=32, windows=2, device=torch_device("cpu"))
    assert not (tmp_path / "out" / "README.md").exists()
    assert check_stored(tmp_path / "out").problems == ()
    export_checkpoint(tmp_path / "out", tmp_path / "dense", "dense")
    assert "olmoe" in card_of(tmp_path / "dense").text
