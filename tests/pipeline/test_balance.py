"""Calibration windows chosen by the experts that they reach."""

from __future__ import annotations

import pytest
import torch

from alphaquant.calibration import calibration_tokens, load_tokenizer
from alphaquant.errors import ConfigError
from alphaquant.pipeline import Calibration, prepare, quantize_checkpoint
from alphaquant.pipeline.balance import CANDIDATES, balanced, choose_windows
from alphaquant.plan import Plan
from alphaquant.solver import Recipe

from . import tiny


def test_the_window_that_reaches_an_unseen_expert_is_taken():
    counts_NX = torch.tensor([[50.0, 50, 0], [60, 40, 0], [40, 60, 0], [95, 0, 5]])
    assert 3 in choose_windows(counts_NX, 2).tolist()


def test_all_windows_are_kept_in_order_where_none_can_be_left_out():
    assert choose_windows(torch.rand(5, 3), 5).tolist() == [0, 1, 2, 3, 4]


def test_the_choice_is_near_the_best_one():
    generator = torch.Generator().manual_seed(0)
    counts_NX = torch.rand(9, 6, generator=generator).pow(4).mul(20).round()

    def value(kept: list[int]) -> float:
        return float(counts_NX[kept].double().sum(0).log1p().sum())

    every = torch.combinations(torch.arange(9), 4).tolist()
    chosen = value(choose_windows(counts_NX, 4).tolist())
    best = max(map(value, every))
    assert chosen > (1 - 1 / torch.e) * best
    assert chosen > sum(map(value, every)) / len(every)


def test_a_run_raises_the_tokens_of_the_least_used_experts(olmoe, text, tmp_path):
    model, plan = prepare(olmoe, Plan.from_shorthand("int4:g32")), {"num_samples": 6, "seqlen": 32}
    reports = [
        quantize_checkpoint(
            model, tmp_path / name, recipe=Recipe(), calibration=Calibration(str(text), **plan, balance=balance)
        )
        for name, balance in (("plain", False), ("balanced", True))
    ]
    assert "coverage" not in reports[0].report["calibration"]
    coverage = reports[1].report["calibration"]["coverage"]
    assert coverage["drawn"] == 6 * CANDIDATES
    assert coverage["after"]["lowest_tenth"] > coverage["before"]["lowest_tenth"]
    assert reports[1].report["calibration"]["num_samples"] == 6
    assert "balance" in reports[1].report["seconds"]
    # the first layer's attention is quantized before its experts are seen, so its counts are close to the original's
    first = reports[1].records[0].routing
    assert first is not None
    assert sum(first.tokens) == 6 * 32 * 2


def test_coverage_is_that_of_the_original(olmoe, text):
    prepared = prepare(olmoe, Plan.from_shorthand("int4:g32"))
    drawn = calibration_tokens(
        str(text), load_tokenizer(olmoe), num_samples=8, seqlen=32, seed=0, vocab_size=prepared.spec.vocab_size
    )
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    kept = balanced(prepared.source, prepared.spec, drawn, 8, **options)
    assert torch.equal(kept.ids, drawn.ids)
    assert kept.digest == drawn.digest
    assert kept.coverage is not None
    assert kept.coverage["before"] == kept.coverage["after"]
    fewer = balanced(prepared.source, prepared.spec, drawn, 3, **options)
    assert fewer.ids.shape == (3, 32)
    assert fewer.digest != drawn.digest


def test_a_dense_model_has_nothing_to_balance(text, tmp_path):
    prepared = prepare(tiny.write_model(tmp_path / "llama", "llama"), Plan.from_shorthand("int4:g32"))
    with pytest.raises(ConfigError, match="no experts"):
        quantize_checkpoint(
            prepared, tmp_path / "out", recipe=Recipe(), calibration=Calibration(str(text), 4, 32, balance=True)
        )
    assert not (tmp_path / "out").exists()
