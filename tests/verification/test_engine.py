"""What is made of an engine's answers, by probes that stand in for engines."""

from __future__ import annotations

import sys

import pytest

from alphaquant.errors import ConfigError, EngineError
from alphaquant.verification import engine

PROMPTS = [[1, 2], [3, 4]]
FOUND = {
    "tokens": [[5, 6], [7, 8]],
    "scores": [[-1.0, -2.0, -0.5], [-1.0, -1.0, -1.0]],
    "top": [[5, 5, 6], [7, 7, 8]],
    "margin": [[1.0, 1.0, 1.0], [1.0, 1.0, 0.01]],
}


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """Let the engine `vllm` be a script; it answers with FOUND for every model, changed by `changes` of the second."""

    def install(changes="{}", before=""):
        script = tmp_path / "probe.py"
        script.write_text(
            f"import json, sys\nrequest = json.load(open(sys.argv[1]))\nnan = float('nan')\n"
            f"answer = {{'engine': 'vllm 1', 'notes': ['n'], 'pairs': []}}\n"
            f"for pair in request['pairs']:\n    answer['pairs'].append([])\n    for model in pair:\n"
            f"        {before or 'pass'}\n"
            f"        answer['pairs'][-1].append({FOUND} | ({changes} if model == pair[1] else {{}}))\n"
            f"        json.dump(answer, open(sys.argv[2], 'w'))\n"
        )
        monkeypatch.setitem(engine.PROBES, "vllm", script)

    return install


def ask(tmp_path, python=sys.executable, **options):
    return engine.compare("vllm", python, [(tmp_path / "dense", tmp_path / "out")], PROMPTS, **options)


@pytest.mark.parametrize(
    ("changes", "same", "agreement", "mean", "largest"),
    [
        ("{}", 1.0, 1.0, 0.0, 0.0),
        ("{'tokens': [[5, 9], [7, 8]]}", 0.5, 1.0, 0.0, 0.0),
        ("{'tokens': [[5, 6], [7, 9]]}", 1.0, 1.0, 0.0, 0.0),  # the twin was undecided there
        ("{'tokens': [[5, 6], [9, 8]]}", 0.5, 1.0, 0.0, 0.0),  # and decided here
        ("{'top': [[5, 5, 6], [7, 7, 9]]}", 1.0, 5 / 6, 0.0, 0.0),
        ("{'scores': [[-1.0, -2.0, -0.5], [-1.0, -1.0, -1.6]]}", 1.0, 1.0, 0.1, 0.6),
        ("{'scores': [[-1.0, -2.0, nan], [-1.0, -1.0, -1.0]]}", 1.0, 1.0, float("inf"), float("inf")),
    ],
)
def test_likeness(tmp_path, probe, changes, same, agreement, mean, largest):
    probe(changes)
    (found,) = ask(tmp_path)
    assert (found.same_tokens, found.agreement) == (same, pytest.approx(agreement))
    assert (found.mean_difference, found.largest_difference) == (pytest.approx(mean), pytest.approx(largest))
    assert (found.engine, found.notes, found.logits) == ("vllm 1", ("n",), None)


def test_a_failing_engine_is_quoted_with_the_model(tmp_path, probe):
    probe(before="if model.endswith('out'): raise KeyError('weight_packed')")
    with pytest.raises(EngineError, match="vllm does not serve it: KeyError: 'weight_packed'") as error:
        ask(tmp_path)
    assert error.value.where == str(tmp_path / "out")


def test_an_interpreter_without_the_engine(tmp_path, probe):
    probe(before="import vllm")
    with pytest.raises(ConfigError, match="No module named 'vllm'"):
        ask(tmp_path)
    with pytest.raises(ConfigError, match="cannot be started"):
        ask(tmp_path, python=str(tmp_path / "no-python"))


def test_an_engine_that_hangs(tmp_path, probe):
    probe(before="__import__('time').sleep(60)")
    with pytest.raises(EngineError, match="did not answer within 1 s"):
        ask(tmp_path, timeout=1)


def test_prompts_are_reproducible():
    first = engine.random_prompts(50)
    assert first == engine.random_prompts(50)
    assert {len(prompt) for prompt in first} == {12}
    assert all(0 <= token < 50 for prompt in first for token in prompt)
