"""What a report draws of an error table: the frontier of size and predicted cost, the run on it, and α."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest

from alphaquant.errors import CheckpointError
from alphaquant.report import write_report
from alphaquant.report.budget import alpha_map, frontier
from alphaquant.report.read import Table, TableRow, read_run
from report.test_report import Page, write_run

DIGEST = "4be5b1f0f8ad6c1d1a1ff32a1c1f8c4d53a1f6f7a2ef6f1e58d35c3b8f1d9a70"
CANDIDATES = {"int3:g64": 3.25, "int4:g64": 4.25, "int8:channel": 8.008, "fp8:channel": 8.011, "bf16": 16.0}


def write_table(path, records, *, alpha=True, **changes):
    """A table of every module of a made-up run, in which each bit takes three quarters of the cost."""
    rows = [
        {
            "name": module.name,
            "kind": module.kind,
            "num_weights": module.num_weights,
            "bits": [round(bits * module.num_weights) for bits in CANDIDATES.values()],
            "cost": [module.loss * 4.0**-bits if bits < 16 else 0.0 for bits in CANDIDATES.values()],
            "facts": {"alpha": 2 + module.relative_loss * 40} if alpha else {},
        }
        for record in records
        for module in record.modules
        if module.kind != "head"
    ]
    table = {"version": 1, "method": "alpha", "checkpoint": DIGEST, "candidates": list(CANDIDATES), "rows": rows}
    path.write_text(json.dumps(table | changes))
    return path


def small(rows, candidates=("a", "b", "c")):
    named = [TableRow(**dict(zip(TableRow.model_fields, row, strict=True))) for row in rows]
    return Table(method="sensitivity", checkpoint=DIGEST, candidates=list(candidates), rows=named)


@pytest.fixture
def run(tmp_path):
    records = write_run(tmp_path / "out")
    return tmp_path / "out", records


def test_the_frontier_is_the_hull_of_all_plans(run):
    directory, _ = run
    rows = [
        ("model.layers.0.mlp.experts.0.up_proj", "expert", 10, [20, 30, 80], [8.0, 5.0, 0.1], {}),
        ("model.layers.0.mlp.experts.1.up_proj", "expert", 10, [20, 40, 60], [1.0, 0.9, 0.1], {}),
        ("model.layers.0.mlp.experts.2.up_proj", "expert", 20, [50, None, 90], [4.0, None, 2.0], {}),
    ]
    table = small(rows)
    drawn = frontier(table, read_run(directory))
    plans = []
    for choice in itertools.product(range(3), repeat=3):
        if all(row[3][c] is not None for row, c in zip(rows, choice, strict=True)):
            bits, cost = (sum(row[at][c] for row, c in zip(rows, choice, strict=True)) for at in (3, 4))
            plans.append((bits / 40, cost))
    found = [
        tuple(map(float, re.findall(r": ([\d.]+) bits a weight, predicted cost (\S+)$", p.title)[0]))
        for p in drawn.best
    ]
    for bits, cost in found:
        assert any(math.isclose(bits, b, abs_tol=1e-3) and math.isclose(cost, c, rel_tol=1e-3) for b, c in plans)
        # no other plan lies below the line from any point of the frontier to the next
    for (b0, c0), (b1, c1) in itertools.pairwise(found):
        assert b1 > b0
        assert c1 < c0
        for bits, cost in plans:
            assert cost >= c0 + (c1 - c0) * (bits - b0) / (b1 - b0) - 1e-2
    assert [p.title.split(":")[0] for p in drawn.uniform] == ["a everywhere", "c everywhere"], "b does not fit all"
    assert drawn.run is None
    assert [p.x for p in drawn.best] == sorted(p.x for p in drawn.best)
    assert [p.y for p in drawn.best] == sorted(p.y for p in drawn.best), "from the top down"


def test_a_table_of_one_size_has_no_frontier(run):
    rows = [("model.layers.0.self_attn.q_proj", "attention", 4, [8], [1.0], {})]
    assert frontier(small(rows, ["a"]), read_run(run[0])) is None
    assert alpha_map(small(rows, ["a"])) is None


def test_frontier_run_and_alpha_are_drawn(run, tmp_path):
    directory, records = run
    html, markdown = write_report(directory, table=write_table(tmp_path / "table.json", records))
    page, text = Page(html.read_text()), markdown.read_text()
    assert [name for name in page.ids if name in ("experts", "budget", "cost")] == ["experts", "budget", "cost"]
    quantized = [m for record in records for m in record.modules if m.kind != "head"]
    weights = sum(m.num_weights for m in quantized)
    bits = sum(m.num_weights * m.bits_per_weight for m in quantized) / weights
    (own,) = [title for title in page.titles if title.startswith("this run: ")]
    assert float(own.split()[2]) == pytest.approx(bits, abs=2e-3)
    assert "int3:g64 everywhere: 3.250 bits a weight" in text
    assert "- this run: " in text
    assert "predicted cost by bits a weight" in page.words
    assert "α of the spectra" in page.words
    expert = [m for m in records[1].modules if m.kind == "expert" and m.name.endswith("up_proj")]
    mean = sum(2 + m.relative_loss * 40 for m in expert) / len(expert)
    assert any(t.startswith(f"layer 1, expert up_proj: α {mean:.3f}; mean of {len(expert)}") for t in page.titles)


def test_the_runs_own_table_is_drawn_without_being_named(run):
    directory, records = run
    assert "Size and predicted cost" not in Page(write_report(directory)[0].read_text()).words
    write_table(directory / "alphaquant" / "costs.json", records, alpha=False)
    words = Page(write_report(directory)[0].read_text()).words
    assert "Size and predicted cost" in words
    assert "α of the spectra" not in words


def test_formats_that_the_table_lacks_are_told(run, tmp_path):
    directory, records = run
    renamed = [name.replace("int8", "int6") for name in CANDIDATES]
    table = write_table(tmp_path / "table.json", records, candidates=renamed)
    words = Page(write_report(directory, table=table)[0].read_text()).words
    assert "This run used formats that the table lacks." in words
    assert not [
        title for title in Page(write_report(directory, table=table)[0].read_text()).titles if "this run" in title
    ]


def test_a_large_table_is_drawn_small(tmp_path):
    records = write_run(tmp_path / "out", layers=24, experts=60)
    table = write_table(tmp_path / "table.json", records)
    html, _ = write_report(tmp_path / "out", table=table)
    assert html.stat().st_size < 5_000_000
    assert html.read_text().count('class="trace c0"') <= 120


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint": "0" * 64}, "another checkpoint"),
        ({"candidates": ["int3:g64"]}, "differ in length"),
        ({"rows": 3}, "rows"),
        ({"method": None}, "method"),
    ],
)
def test_a_table_that_is_none_of_this_run_is_refused(run, tmp_path, changes, says):
    directory, records = run
    table = write_table(tmp_path / "table.json", records, **changes)
    with pytest.raises(CheckpointError, match=says) as caught:
        write_report(directory, table=table)
    assert str(table) in caught.value.where
    assert "plan --table" in caught.value.remedy
    assert not (directory / "alphaquant" / "report.html").exists()


def test_a_missing_table_is_named(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.json"):
        write_report(run[0], table=tmp_path / "nowhere.json")
