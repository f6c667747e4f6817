"""Plans tried out, divergences allowed, frontiers: what is said was measured is what a run would give."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from alphaquant.allocation import Budget, Limits, Means, Request, Strategy, frontier, propose, request
from alphaquant.allocation.request import knee_of
from alphaquant.allocation.trial import try_plans
from alphaquant.calibration import evaluation_windows, load_tokenizer
from alphaquant.errors import PlanError
from alphaquant.evaluation import Agreement, Quality
from alphaquant.pipeline import Calibration, evaluate_checkpoint, prepare
from alphaquant.pipeline.run import draw_tokens
from alphaquant.plan import Plan
from alphaquant.solver import Recipe
from pipeline import tiny

CPU = torch.device("cpu")
FORMATS = "int2:g32,int4:g32,int8:g32"


def asked(budget, **options):
    return Request(budget, Strategy.SENSITIVITY, FORMATS, Limits(), **options)


@pytest.fixture(scope="module")
def means(text):
    return Means(Calibration(str(text), 16, 32), Recipe(), CPU)


@pytest.fixture(scope="module")
def table(olmoe, means, tmp_path_factory):
    """Costs of the model, kept, so that each test needs no pass of its own."""
    file = tmp_path_factory.mktemp("table") / "table.json"
    propose(asked(Budget(3.0), table=file), tiny_of(olmoe), means)
    return file


def tiny_of(model, plan="bf16"):
    return prepare(model, tiny.as_plan(plan))


QUALITY = Quality(10.0, 0.1, 100, 4, Agreement(0.0, 0.0, 1.0, 9.0))
PLAN = {
    "default": {"wq": "int4", "group_size": 32},
    "overrides": [{"pattern": "*.mlp.experts.*", "wq": "int2"}, {"pattern": "lm_head", "wq": "int8"}],
}


def test_a_trial_measures_what_a_run_gives(tmp_path, text, other_text):
    """Embedding and head included, and several plans side by side."""
    model = tiny.write_model(tmp_path / "model", "olmoe", tie_word_embeddings=False)
    plans = [PLAN, {**PLAN, "overrides": [{"pattern": "model.embed_tokens", "wq": "int4"}]}]
    calibration = Calibration(str(text), 16, 32)
    ids = draw_tokens(tiny_of(model), calibration).ids
    held_out = evaluation_windows(
        str(other_text), load_tokenizer(model), seqlen=32, max_windows=6, vocab_size=tiny.VOCAB
    ).ids
    found = try_plans([tiny_of(model, plan) for plan in plans], ids, held_out, Recipe(), device=CPU)
    for number, plan in enumerate(plans):
        out = tmp_path / f"out{number}"
        tiny.quantize(model, out, plan, text, num_samples=16, seqlen=32)
        wanted = evaluate_checkpoint(out, data=str(other_text), seqlen=32, max_windows=6, against=model)
        assert found[number].perplexity == pytest.approx(wanted.perplexity, rel=1e-4)
        assert found[number].agreement.kl == pytest.approx(wanted.agreement.kl, rel=1e-3)
    assert found[0].agreement.kl != pytest.approx(found[1].agreement.kl, rel=0.01)


def test_the_plan_that_measures_better_is_proposed(olmoe, means, table, monkeypatch):
    wish = asked(Budget(3.0), table=table, validate=4)
    seen = []

    def better(first):
        def measured(_, plans, __):
            seen.append(plans)
            kls = (0.1, 0.2) if first else (0.2, 0.1)
            return [dataclasses.replace(QUALITY, agreement=dataclasses.replace(QUALITY.agreement, kl=kl)) for kl in kls]

        return measured

    monkeypatch.setattr(request, "_measured", better(first=True))
    kept = propose(wish, tiny_of(olmoe), means)
    assert kept.facts["method"] == "sensitivity"
    assert kept.prepared.schemes == seen[0][0].schemes != seen[0][1].schemes
    assert kept.facts["measured"]["kl"] == 0.1
    monkeypatch.setattr(request, "_measured", better(first=False))
    other = propose(wish, tiny_of(olmoe), means)
    assert other.facts["method"] == "uniform"
    assert other.prepared.schemes == seen[1][1].schemes
    assert "the uniform plan measures better" in other.notes[-1]


def test_the_smallest_plan_within_a_divergence(olmoe, means, table):
    found = [propose(asked(Budget(max_kl=kl), table=table), tiny_of(olmoe), means) for kl in (1e-3, 1e-2, 5e-2)]
    bits = [proposal.facts["bits_per_weight"] for proposal in found]
    assert bits[0] > bits[1] > bits[2]
    for proposal, allowed in zip(found, (1e-3, 1e-2, 5e-2), strict=True):
        assert 0.7 * allowed < proposal.facts["predicted_cost"] <= allowed
        smaller = propose(asked(Budget(proposal.facts["bits_per_weight"] - 0.05), table=table), tiny_of(olmoe), means)
        assert smaller.facts["predicted_cost"] > allowed
    everything = propose(asked(Budget(max_kl=1e6), table=table), tiny_of(olmoe), means)
    assert everything.facts["bits_per_weight"] == pytest.approx(2.5)
    with pytest.raises(PlanError, match="finer --formats"):
        propose(asked(Budget(max_kl=1e-12), table=table), tiny_of(olmoe), means)


def test_a_measured_divergence_is_kept(olmoe, means, table, other_text):
    found = propose(
        asked(Budget(max_kl=0.02), table=table, validate=4, held_out=str(other_text)), tiny_of(olmoe), means
    )
    assert found.facts["measured"]["kl"] <= 0.02
    assert any("held-out KL" in note for note in found.notes)


def test_the_frontier_falls(olmoe, means, table, other_text):
    wish = asked(Budget(), table=table, validate=2, held_out=str(other_text))
    found = frontier(wish, tiny_of(olmoe), means, num_points=4)
    assert [round(point.bits, 2) for point in found.points] == [2.5, 4.5, 6.5, 8.5]
    for key in ("predicted", "measured", "num_bytes"):
        values = [getattr(point, key) for point in found.points]
        assert values == sorted(values, reverse=key != "num_bytes")
    assert found.points[0].measured == pytest.approx(found.points[0].uniform, rel=1e-6)  # there is only one such plan
    assert 0 < found.knee < 3


def test_the_knee_is_the_point_farthest_below_the_chord():
    assert knee_of([0, 1, 2, 3, 4], [10, 4, 1, 0.5, 0]) == 2
    assert knee_of([0, 1, 2, 3, 4], [10, 1, 0.9, 0.5, 0]) == 1
    assert knee_of([5], [1.0]) == 0


def test_plans_are_those_of_the_budget(olmoe, means, table):
    plan = propose(asked(Budget(3.0), table=table), tiny_of(olmoe), means).prepared.plan
    assert Plan.parse(plan.to_json()) == plan
