"""--log-json: a line of JSON for every event, that survives whatever ends the run."""

from __future__ import annotations

import json

import pytest

QUIET = ("--nsamples", 2, "--seqlen", 16, "--scheme", "int4:g32")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_event_has_layer_phase_seconds_and_memory(works, olmoe, text, tmp_path):
    log = tmp_path / "run.jsonl"
    result = works("quantize", olmoe, *QUIET, "--calib", text, "-o", tmp_path / "out", "--log-json", log, "--json")
    report, events = json.loads(result.out), lines(log)
    assert [events[0]["event"], events[-1]["event"]] == ["phase", "end"]
    kinds = [event["event"] for event in events]
    assert kinds.count("start") == 1
    assert kinds.count("fallback") == len(report["events"]) > 0
    commits = [event for event in events if event["event"] == "commit"]
    manifest = json.loads((tmp_path / "out/alphaquant/manifest.json").read_text())
    assert [event["sha256"] for event in commits] == [shard["sha256"] for shard in manifest["shards"]]
    phases = [event for event in events if event["event"] == "phase"]
    assert all(event["seconds"] >= 0 and event["peak_memory_bytes"] > 1 << 20 for event in phases)
    seen = {(event["layer"], event["phase"]) for event in phases}
    for layer in (0, 1):
        assert {(layer, phase) for phase in ("read", "calibrate", "solve", "propagate", "pack", "write")} <= seen
    for phase in ("read", "calibrate", "solve", "propagate", "pack"):
        spent = sum(event["seconds"] for event in phases if event["phase"] == phase)
        assert spent == pytest.approx(report["seconds"][phase], abs=0.002)


def test_an_error_is_the_last_event_and_starts_follow_each_other(fails, works, llama, text, tmp_path):
    log = tmp_path / "run.jsonl"
    out = ("-o", tmp_path / "out", "--log-json", log)
    fails("quantize", llama, *QUIET, "--calib", tmp_path / "nowhere.txt", *out, says=("nowhere.txt",), logs=log)
    (error,) = lines(log)[-1:]
    assert error["event"] == "error"
    assert "nowhere.txt" in error["what"]
    assert error["remedy"]
    works("quantize", llama, *QUIET, "--calib", text, *out)
    assert [line["event"] for line in lines(log) if line["event"] in ("error", "end")] == ["error", "end"]


def test_a_log_that_cannot_be_written(fails, llama, tmp_path):
    for log in (tmp_path, tmp_path / "no/where.jsonl"):
        fails(
            "quantize",
            llama,
            *QUIET,
            "--method",
            "rtn",
            "-o",
            tmp_path / "out",
            "--log-json",
            log,
            says=("the log cannot be written", str(log)),
        )


def test_strict(fails, works, olmoe, text, tmp_path):
    call = ("quantize", olmoe, *QUIET, "--calib", text, "-o", tmp_path / "out")
    fails(*call, "--strict", says=("--strict: rounded to nearest", "model.layers.0.mlp.experts."))
    said = works(*call).out
    assert "× rounded to nearest: … effective samples for … inputs" in said
