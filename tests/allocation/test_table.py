"""The error table: sizes as stored, saved and read again, and refused where it is another's."""

from __future__ import annotations

import json

import pytest
import torch

from alphaquant.allocation import ErrorTable, Means, Strategy, error_table, parse_candidates
from alphaquant.allocation.alpha import hill_alpha, matrix_alpha
from alphaquant.errors import PlanError
from alphaquant.pipeline import Calibration, plan_sizes, prepare
from alphaquant.plan import Plan
from alphaquant.solver import Recipe
from pipeline import tiny

CPU = torch.device("cpu")


def table_of(model, formats="int2:g32,int4:g32,int4:g32:asym,mxfp4", strategy=Strategy.UNIFORM, seed=0, **options):
    prepared = prepare(model, Plan.from_shorthand("bf16"))
    means = Means(Calibration(), Recipe(), CPU, seed=seed)
    return error_table(prepared, strategy, parse_candidates(formats, {64}), means, **options)


@pytest.mark.parametrize("scheme", ["int2:g32", "int4:g32:asym", "mxfp4", "nvfp4", "int8:channel", "bf16"])
def test_bits_are_those_of_the_sizes_that_plans_show(olmoe, scheme):
    """Everything that a budget counts, and nothing else, is what `plan` calls attention and experts."""
    table = table_of(olmoe, scheme)
    sizes = plan_sizes(prepare(olmoe, Plan.from_shorthand(scheme)))
    assert sum(row.bits[0] for row in table.rows) == 8 * sum(
        s.after_bytes for s in sizes if s.kind in ("attention", "expert")
    )


def test_candidates_take_the_largest_common_group():
    assert [c.text for c in parse_candidates("mxfp4,int8:channel,int2", {64, 192})] == [
        "int2:g64",
        "mxfp4",
        "int8:channel",
    ]
    for text, says in (("int5", "int5"), ("int4,int4", "given twice"), ("int4,", "unknown format")):
        with pytest.raises(PlanError, match=says):
            parse_candidates(text, {64})


def test_saved_and_read_again(olmoe, tmp_path):
    file = tmp_path / "table.json"
    made = table_of(olmoe, saved=file)
    assert table_of(olmoe, saved=file) == made
    fewer = table_of(olmoe, "mxfp4,int2:g32", saved=file)
    assert fewer.candidates == ("int2:g32", "mxfp4")
    assert [row.cost for row in fewer.rows] == [(row.cost[0], row.cost[-1]) for row in made.rows]


def test_tables_of_others_are_refused(olmoe, llama, tmp_path):
    file = tmp_path / "table.json"
    table_of(olmoe, saved=file)
    for model, options, says in (
        (llama, {}, "another checkpoint"),
        (olmoe, {"strategy": Strategy.ALPHA}, "by --method uniform, not alpha"),
        (olmoe, {"formats": "int3:g32"}, "lacks int3:g32"),
    ):
        with pytest.raises(PlanError, match=says):
            table_of(model, saved=file, **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.update(version=2),
        lambda data: data.pop("rows"),
        lambda data: data["rows"][0]["bits"].pop(),
        lambda data: data["rows"][0].update(cost=[1, 2, -3, 4]),
        lambda data: data["rows"][0].update(cost=[1, None, 3, 4]),
        lambda data: data["rows"][0].update(bits=[0, 1, 2, 3]),
        lambda data: data.update(rows=data["rows"][:-1]),
        lambda data: data["rows"][0].update(name="model.layers.9.self_attn.q_proj"),
    ],
)
def test_damaged_tables_are_refused(olmoe, tmp_path, damage):
    file = tmp_path / "table.json"
    data = json.loads(table_of(olmoe, saved=file).to_json())
    damage(data)
    file.write_text(json.dumps(data))
    with pytest.raises(PlanError) as error:
        table_of(olmoe, saved=file)
    assert str(file) in str(error.value)


def test_no_table_at_all_is_refused(tmp_path):
    file = tmp_path / "table.json"
    for text in ("", "[]", "{}", '{"version": 1, "candidates": 3}', "null", "[" * 10_000):
        file.write_text(text)
        with pytest.raises(PlanError, match="no error table"):
            ErrorTable.load(file, "", "alpha")
    with pytest.raises(PlanError, match="cannot be read"):
        ErrorTable.load(tmp_path, "", "alpha")


def test_hill_finds_the_exponent_of_a_pareto_tail():
    generator = torch.Generator().manual_seed(0)
    for alpha in (2.0, 4.0):  # density exponent: P(λ > x) = x^(1 - alpha)
        eigenvalues = torch.rand(1, 200_000, generator=generator, dtype=torch.float64) ** (-1 / (alpha - 1))
        assert hill_alpha(eigenvalues).item() == pytest.approx(alpha, rel=0.05)
    assert torch.isnan(hill_alpha(torch.zeros(1, 100)))


def test_alpha_is_smaller_for_a_heavier_tail_whatever_the_shape():
    generator = torch.Generator().manual_seed(0)
    light = torch.randn(256, 512, generator=generator)
    spikes = torch.randn(256, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    assert matrix_alpha(light + spikes) < matrix_alpha(light) - 0.5
    assert matrix_alpha(light) == pytest.approx(matrix_alpha(light.T.contiguous()), rel=0.1)
    assert matrix_alpha(light) == pytest.approx(matrix_alpha(0.01 * light), rel=1e-4)


def test_alpha_weights_modules_by_tail_variance_and_size(tmp_path):
    base = tiny.write_model(tmp_path / "base", "llama")
    name = "model.layers.0.mlp.down_proj"
    weight = prepare(base, Plan.from_shorthand("bf16")).source.read(f"{name}.weight")
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, 4, generator=generator) for size in weight.shape)
    spiked = weight + left @ right.T * weight.std()
    spiked *= weight.square().mean().sqrt() / spiked.square().mean().sqrt()  # the same variance
    changed = tiny.write_model(tmp_path / "changed", "llama", changes={f"{name}.weight": spiked})
    rows = [{row.name: row for row in table_of(model, strategy=Strategy.ALPHA).rows}[name] for model in (base, changed)]
    assert rows[1].facts["alpha"] < rows[0].facts["alpha"]
    assert rows[1].cost[0] > 2 * rows[0].cost[0]
    table = table_of(base, strategy=Strategy.ALPHA)
    assert table.settings["bound_by"] in ("read", "spectra")
    assert table.settings["gamma"] > 0
    for row in table.rows:  # fewer bits cost more, and the zero point of int4 gains something
        assert row.cost[0] > row.cost[1] > row.cost[2] > 0


def test_a_random_table_is_made_again_by_its_seed(olmoe):
    tables = [table_of(olmoe, strategy=Strategy.RANDOM, seed=seed) for seed in (1, 1, 2)]
    assert tables[0].rows == tables[1].rows
    assert [row.cost for row in tables[0].rows] != [row.cost for row in tables[2].rows]
    assert tables[2].settings["seed"] == 2
