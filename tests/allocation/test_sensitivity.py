"""Measured sensitivity: predictions against GPTQ, streams against whole models, costs against what matters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from alphaquant.allocation import Means, Strategy, error_table, parse_candidates
from alphaquant.allocation.predict import Inputs, predict
from alphaquant.allocation.sensitivity import _Probes, _shares
from alphaquant.formats import FORMATS, Scheme
from alphaquant.models import load_decoder
from alphaquant.pipeline import Calibration, prepare
from alphaquant.pipeline.stream import attend, feed
from alphaquant.plan import Plan
from alphaquant.solver import EvidenceSum, HessianSum, Recipe, hessian_loss, quantize_stack, trusted
from pipeline import tiny

CPU = torch.device("cpu")
SCHEMES = {name: Scheme(FORMATS[name], 32) for name in ("int2", "int4", "mxfp4")}


def stack(num_experts=12, outputs=48, inputs=64, seed=0):
    """Weights and Hessians of experts that differ in scale, in correlation of their inputs, and in evidence."""
    generator = torch.Generator().manual_seed(seed)
    w_EOI = torch.randn(num_experts, outputs, inputs, generator=generator)
    w_EOI *= torch.linspace(-1, 1, num_experts).exp()[:, None, None]
    hessian = HessianSum(num_experts, inputs, 1.0)
    counts = [150 + 60 * e for e in range(num_experts)]
    rows = []
    for e, count in enumerate(counts):
        mixed = torch.randn(inputs, inputs, generator=generator) / 8 * (e % 4) + torch.eye(inputs)
        rows.append(torch.randn(count, inputs, generator=generator) @ mixed)
    hessian.add(torch.cat(rows), counts, torch.rand(sum(counts), generator=generator))
    return w_EOI, hessian


def ranks(x):
    return torch.tensor(x).argsort().argsort().double()


@pytest.mark.parametrize("name", SCHEMES)
def test_predicted_losses_rank_as_those_of_gptq(name):
    w_EOI, hessian = stack()
    h_EII, effective_E, recipe = hessian.normalized(), hessian.evidence.effective_E, Recipe()
    true_E = quantize_stack(w_EOI, h_EII, effective_E, SCHEMES[name], recipe).loss_EO.sum(1)
    inputs = Inputs.of(*trusted(h_EII, effective_E, recipe), torch.zeros(len(w_EOI), dtype=torch.bool))
    found = predict(w_EOI, inputs, SCHEMES[name])
    assert torch.corrcoef(torch.stack([ranks(true_E.tolist()), ranks(found.loss_E.tolist())]))[0, 1] > 0.95
    assert ((found.loss_E / true_E).log().abs() < 0.6).all()
    # plain rounding is far off where inputs are correlated
    assert (hessian_loss(found.rounding_EOI, inputs.damped_EII).sum(1) / true_E).max() > 2


def test_the_error_has_the_predicted_loss():
    w_EOI, hessian = stack(4)
    rounded_E = torch.tensor([False, False, True, False])
    inputs = Inputs.of(hessian.normalized(), torch.full((4,), 0.02), rounded_E)
    found = predict(w_EOI, inputs, SCHEMES["int4"])
    error_EOI = found.error(inputs)
    torch.testing.assert_close(hessian_loss(error_EOI, inputs.damped_EII).sum(1), found.loss_E, rtol=1e-3, atol=0)
    assert torch.equal(error_EOI[2], found.rounding_EOI[2])


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_streams_are_those_of_whole_models(tmp_path, family):
    """Each stream's divergence is that of a model with the one weight changed, whichever layer it branches in."""
    model = tiny.write_model(tmp_path / "model", family)
    prepared = prepare(model, Plan.from_shorthand("bf16"))
    decoder, ids = load_decoder(prepared.source, prepared.spec), tiny.token_ids(2, 16)
    changes = [(0, "self_attn.q_proj.weight"), (0, "mlp.experts.down_proj.weight"), (1, "mlp.experts.up_proj.weight")]
    probes = _Probes(ids, decoder.outer, decoder.spec, len(changes))
    original = decoder.logits(ids).log_softmax(-1)
    wanted = []
    for layer, weights in enumerate(decoder.layers):
        for half, at in ((attend, "self_attn"), (feed, "mlp")):
            for key in (key for where, key in changes if where == layer and key.startswith(at)):
                changed = {**weights, key: weights[key].roll(1, 0)}
                probes.branch(half, changed, layer)
                layers = [changed if i == layer else w for i, w in enumerate(decoder.layers)]
                other = replace(decoder, layers=layers).logits(ids).log_softmax(-1)
                wanted.append(F.kl_div(other, original, reduction="none", log_target=True).sum(-1).mean().item())
            probes.advance(half, weights, layer)
    assert probes.divergences(decoder.outer) == pytest.approx(wanted, rel=1e-3)
    assert min(wanted) > 1e-4


def table_of(
    model, text, strategy=Strategy.SENSITIVITY, formats="int2:g32,int3:g32,int4:g32,int8:g32", dtype="auto", **options
):
    prepared = prepare(model, Plan.from_shorthand("bf16"))
    means = Means(Calibration(str(text), 16, 32), Recipe(), CPU, dtype)
    return error_table(prepared, strategy, parse_candidates(formats, {64}), means, **options)


def test_what_does_not_reach_the_logits_costs_next_to_nothing(tmp_path, text):
    changes = {"model.layers.1.self_attn.o_proj.weight": torch.zeros(64, 64)}
    model = tiny.write_model(tmp_path / "model", "olmoe", changes=changes)
    rows = {row.name: row for row in table_of(model, text).rows}
    dead = max(rows[f"model.layers.1.self_attn.{name}_proj"].cost[0] for name in "qkv")
    alive = min(rows[f"model.layers.0.self_attn.{name}_proj"].cost[0] for name in "qkv")
    assert dead < alive / 3
    for row in rows.values():
        assert row.cost[0] >= row.cost[1] >= row.cost[2] >= row.cost[3] >= 0
        if row.name not in changes and f"{row.name}.weight" not in changes:
            assert row.cost[0] > 0


def test_divergences_are_not_those_of_rounding(tmp_path, text):
    """What an error of a linear does is far below what bf16 does to logits, and is seen all the same."""
    model = tiny.write_model(tmp_path / "model", "llama")
    found = [table_of(model, text, formats="int8:g32", dtype=dtype).rows for dtype in ("bf16", "fp32")]
    pairs = [[row.facts["unit_kl"] for row in rows] for rows in zip(*found, strict=True) if rows[0].kind == "mlp"]
    assert len(pairs) == 6
    assert all(1 / 3 < bf16 / fp32 < 3 for bf16, fp32 in pairs)


def test_an_expert_counts_by_the_squares_of_its_scores():
    score_R, seen = torch.tensor([0.5, 0.25, 0.75, 1.0, 0.5]), EvidenceSum(3, 1.0)
    seen.add([2, 3, 0], score_R)
    found = _shares(seen.evidence, num_tokens=4)
    of_all = score_R.square().sum() / 5
    torch.testing.assert_close(found.float(), torch.tensor([0.25 + 0.0625, 0.5625 + 1 + 0.25, float(of_all) / 2]) / 4)


def test_rarely_used_experts_cost_less_but_something(tmp_path, text):
    """One expert that the router never takes, and the others alike: its bits matter least."""
    prepared = prepare(tiny.write_model(tmp_path / "plain", "olmoe"), Plan.from_shorthand("bf16"))
    changes = {}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        router = prepared.source.read(name).clone()
        router[5] = 0
        router[:5] = router[:5].abs()  # nothing is said of the tokens' signs, so that expert 5 is seldom among two
        changes[name] = router
    model = tiny.write_model(tmp_path / "model", "olmoe", changes=changes)
    table = table_of(model, text)
    shares = {row.name: row.facts["share"] for row in table.rows if ".experts." in row.name}
    assert min(shares.values()) < max(shares.values()) / 2
    seldom = [row for row in table.rows if row.facts["share"] == min(shares.values())]
    assert all(row.cost[0] > 0 for row in seldom)
    used = table_of(model, text, Strategy.UTILIZATION)
    counted = [row for row in used.rows if ".layers.0.mlp.experts." in row.name]
    assert sum(row.facts["share"] for row in counted) == pytest.approx(3 * 2)  # three linears, two experts a token
    most = max(row.facts["share"] for row in counted)
    assert max(counted, key=lambda row: row.cost[0]).facts["share"] == most


def test_a_saved_table_needs_no_forward_pass(olmoe, text, tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    made = table_of(olmoe, text, saved=file)
    monkeypatch.setattr("alphaquant.allocation.estimate.draw_tokens", None)
    assert table_of(olmoe, text, saved=file) == made
    assert made.settings["calibration"]["num_samples"] == 16
    assert made.settings["probes"] == ["int3:g32"]
