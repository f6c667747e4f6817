"""Tasks: the adapter's answers against a plain forward pass, and lm-eval itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from alphaquant.calibration import load_tokenizer
from alphaquant.errors import ConfigError
from alphaquant.pipeline import evaluate_tasks, load
from alphaquant.pipeline.tasks import TaskModel
from pipeline import tiny

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: `make test-tasks` runs this"
)


@pytest.fixture(scope="module")
def decoder(olmoe):
    return load(olmoe)


@pytest.fixture(scope="module")
def model(olmoe, decoder):
    return TaskModel(decoder, load_tokenizer(olmoe), prefix=3, stops=frozenset([0]))


def expected(decoder, context, continuation):
    """By the definition, one request at a time, over all positions."""
    ids = torch.tensor([[*context, *continuation]])
    log_p = decoder.logits(ids)[0].double().log_softmax(-1)
    places = range(len(context) - 1, ids.shape[1] - 1)
    return (
        sum(log_p[place, ids[0, place + 1]].item() for place in places),
        all(log_p[place].argmax() == ids[0, place + 1] for place in places),
    )


def test_scores_are_those_of_the_definition_whatever_the_batch(model, decoder):
    ids = tiny.token_ids(12, 60)
    pairs = [(ids[i, : 5 + 3 * i].tolist(), ids[i, 40 : 41 + i].tolist()) for i in range(12)]
    greedy = decoder.generate(ids[:1, :9], 4)[0].tolist()
    pairs.append((greedy[:9], greedy[9:]))
    found = model.score(pairs)
    wanted = [expected(decoder, *pair) for pair in pairs]
    assert [likelihood for likelihood, _ in found] == pytest.approx([w for w, _ in wanted], abs=1e-3)
    assert [is_greedy for _, is_greedy in found] == [g for _, g in wanted]
    assert found[-1][1]
    assert not all(is_greedy for _, is_greedy in found)
    assert model.score([]) == []
    assert model.score([([4, 5], [])]) == [(0.0, True)]


def test_what_is_too_long_loses_its_beginning(model, decoder):
    limit = decoder.spec.max_positions
    ids = tiny.token_ids(1, limit + 40)[0].tolist()
    assert model.score([(ids[:-5], ids[-5:])]) == model.score([(ids[-limit - 1 : -5], ids[-5:])])


def test_rolling_counts_every_token_once(model, decoder):
    limit = decoder.spec.max_positions
    ids = tiny.token_ids(1, 2 * limit + 10)[0].tolist()
    text = " ".join(f"w{i}" for i in ids)
    parts = [
        ([3], ids[:limit]),
        (ids[limit - 1 : limit], ids[limit : 2 * limit]),
        (ids[2 * limit - 1 : 2 * limit], ids[2 * limit :]),
    ]
    assert model.score_text(text) == pytest.approx(sum(expected(decoder, *p)[0] for p in parts), abs=1e-2)


def test_answers_are_greedy_and_end_at_a_stop(model, decoder):
    prompt = " ".join(f"w{i}" for i in tiny.token_ids(1, 9)[0].tolist())
    whole = decoder.generate(tiny.token_ids(1, 9), 12)[0, 9:].tolist()
    model = TaskModel(decoder, model.tokenizer, 3, frozenset())
    text = model.tokenizer.decode(whole)
    assert model.answer(prompt, 12, []) == text
    words = text.split(" ")
    assert model.answer(prompt, 12, [words[5], words[7]]) == text[: text.index(words[5])]
    ended = TaskModel(decoder, model.tokenizer, 3, frozenset([whole[4]]))
    assert ended.answer(prompt, 12, []) == model.tokenizer.decode(whole[: whole.index(whole[4])])


def test_without_the_harness_the_remedy_is_named(olmoe, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="needs lm-eval") as error:
        evaluate_tasks(olmoe, ["arc_easy"])
    assert "alphaquant-moe[eval]" in error.value.remedy


@pytest.fixture
def task_files(tmp_path):
    """A task of two choices, one of text, one of answers, on data made here: nothing is fetched."""
    rows = [
        {"question": f"w{i} w{i + 1} w{i + 2}", "choices": [f"w{i + 3}", f"w{2 * i}"], "answer": i % 2}
        for i in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "rows.jsonl"}
test_split: test
"""
    (tmp_path / "choice.yaml").write_text(
        "task: aq_choice\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n" + common
    )
    (tmp_path / "rolling.yaml").write_text(
        "task: aq_rolling\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
        "metric_list:\n  - metric: word_perplexity\n" + common
    )
    (tmp_path / "answer.yaml").write_text(
        "task: aq_answer\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: 'w1'\n"
        "generation_kwargs:\n  until: ['w5']\n  max_gen_toks: 3\nmetric_list:\n  - metric: exact_match\n" + common
    )
    return tmp_path


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_the_harness_runs_tasks_of_every_sort(olmoe, model, task_files, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(task_files / "cache"))
    found = evaluate_tasks(olmoe, ["aq_choice", "aq_rolling", "aq_answer"], task_path=task_files, limit=10)
    figures = {(m.task, m.metric): m for m in found}
    right = 0
    for i in range(10):
        context = model.tokenizer.encode(f"w{i} w{i + 1} w{i + 2}")
        scores = model.score([(context, [i + 3]), (context, [2 * i])])
        right += (scores[1][0] > scores[0][0]) == (i % 2)
    assert figures["aq_choice", "acc"].value == pytest.approx(right / 10)
    assert figures["aq_choice", "acc"].stderr > 0
    assert figures["aq_rolling", "word_perplexity"].value > 1
    assert figures["aq_answer", "exact_match"].value == 0


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_none_is_named(olmoe, task_files):
    with pytest.raises(ConfigError, match="no task 'aq_choise'") as error:
        evaluate_tasks(olmoe, ["aq_choise"], task_path=task_files)
    assert "aq_choice" in error.value.remedy
    with pytest.raises(ConfigError, match="is no directory"):
        evaluate_tasks(olmoe, ["arc_easy"], task_path=task_files / "none")
