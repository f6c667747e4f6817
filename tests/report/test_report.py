import json
import math
import random
import re
import time
from dataclasses import asdict
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from alphaquant.errors import CheckpointError, OutputError
from alphaquant.pipeline.records import LayerRecord, ModuleRecord, RoutingRecord, summarize
from alphaquant.plan import ModuleKind, Plan
from alphaquant.report import write_comparison, write_report
from alphaquant.report.axis import linear_axis, log_axis

HOSTILE = '<script>alert(1)</script>"|`'
PLAN = {
    "default": {"wq": "int4", "group_size": 128},
    "overrides": [
        {"pattern": "*.self_attn.*", "wq": "int8", "group_size": -1, "comment": "Small, and sensitive."},
        {"pattern": "*.mlp.experts.*", "wq": "int3", "group_size": 64},
        {"pattern": "model.layers.[0-1].mlp.experts.*", "wq": "int4"},
    ],
}
BITS = {"int8 channel": 8.008, "int4 g64": 4.25, "int3 g64": 3.25, "fp8 channel": 8.011}
LOSS = {"int8 channel": 2e-4, "int4 g64": 9e-3, "int3 g64": 3.4e-2, "fp8 channel": 9e-4}


def module(name, kind, scheme, shape, rng, *, depth=1.0, seen=262_144, tokens=262_144):
    loss = LOSS[scheme] * depth * math.exp(rng.gauss(0, 0.25)) * (1.6 if name.endswith("down_proj") else 1)
    event, method = None, "gptq"
    if seen < shape[1] // 4:
        event, method = f"rounded to nearest: {seen} effective samples for {shape[1]} inputs", "rtn"
        loss *= 2.5
    return ModuleRecord(
        name=name,
        kind=kind,
        scheme=scheme,
        bits_per_weight=BITS[scheme],
        num_weights=shape[0] * shape[1],
        loss=loss * 40,
        relative_loss=loss,
        tokens=tokens,
        effective_samples=float(seen),
        damping=0.01,
        method=method,
        event=event,
    )


def layer_record(layer, num_layers, experts, rng, *, dense=False, calibrated=True, hidden=2048, inner=1408):
    depth = 0.6 + 1.1 * layer / num_layers
    prefix = f"model.layers.{layer}"
    modules = [
        module(f"{prefix}.self_attn.{p}_proj", "attention", "int8 channel", (hidden, hidden), rng, depth=depth)
        for p in "qkvo"
    ]
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    if dense:
        modules += [module(f"{prefix}.mlp.{p}", "mlp", "int4 g64", shape, rng) for p, shape in shapes.items()]
        return LayerRecord(layer, modules)
    popularity = [math.exp(rng.gauss(0, 0.55)) for _ in range(experts)]
    for expert in rng.sample(range(experts), max(1, experts // 30)):
        popularity[expert] *= 0.04
    if layer % 7 == 3:
        popularity[rng.randrange(experts)] = 0.0
    tokens = [round(262_144 * 4 * p / sum(popularity)) for p in popularity]
    effective = [t * 0.1 for t in tokens]
    scheme = "int4 g64" if layer < 2 else "int3 g64"
    for name, shape in shapes.items():
        for e in range(experts):
            seen = round(effective[e])
            modules.append(
                module(f"{prefix}.mlp.experts.{e}.{name}", "expert", scheme, shape, rng, depth=depth, seen=seen)
            )
        modules.append(module(f"{prefix}.mlp.shared_expert.{name}", "shared_expert", "fp8 channel", shape, rng))
    routing = RoutingRecord(tokens, [t * 0.21 for t in tokens], effective) if calibrated else None
    return LayerRecord(layer, modules, routing)


def write_run(out, *, layers=3, experts=8, dense_layers=1, calibrated=True, name="Qwen1.5-MoE-A2.7B", **changes):
    """A run directory as `quantize` leaves it, of made-up but plausible figures."""
    rng = random.Random(7)
    records = [
        layer_record(i, layers, experts, rng, dense=i < dense_layers, calibrated=calibrated) for i in range(layers)
    ]
    head = module("lm_head", "head", "int8 channel", (151_936, 2048), rng)
    records.append(LayerRecord(None, [head]))
    modules = [m for record in records for m in record.modules]
    weights = sum(m.num_weights for m in modules)
    stored = sum(m.num_weights * m.bits_per_weight for m in modules)
    report = {
        "version": 1,
        "alphaquant": "0.1.0",
        "torch": "2.8.0",
        "created": "2025-10-04T09:31:07+00:00",
        "command": f"alphaquant quantize {name} --config configs/gptq_mixed_precision.json --nsamples 128 -o OUT",
        "model": {
            "path": f"/models/{name}",
            "family": "qwen2_moe",
            "architecture": "qwen2",
            "digest": "4be5b1f0f8ad6c1d1a1ff32a1c1f8c4d53a1f6f7a2ef6f1e58d35c3b8f1d9a70",
        },
        "layout": "compressed-tensors",
        "recipe": {"method": "gptq", "effort": "default", "act_order": True, "block_size": 128, "damping": 0.01},
        "calibration": {
            "source": "wikitext2",
            "num_samples": 128,
            "seqlen": 2048,
            "seed": 0,
            "digest": "9d5e3ecdeb1f2a6f0a0f1ec74d8d8a3f6c0a5b7a1e2d3c4b5a69788796a5b4c3",
        }
        if calibrated
        else None,
        "device": "cuda:0",
        "dtype": "bfloat16",
        "sizes": {
            "before_bytes": weights * 2 + 620_000_000,
            "after_bytes": round(stored / 8) + 620_000_000,
            "quantized_weights": weights,
            "bits_per_weight": stored / weights,
        },
        "summary": [asdict(row) for row in summarize(records, list(ModuleKind))],
        "audit": {"targeted": len(modules), "quantized": len(modules), "left": 2 * layers + 2},
        "events": [{"module": m.name, "event": m.event} for m in modules if m.event is not None],
        "warnings": ["the rule '*.mlp.shared_expert_gate' matches nothing in this model"],
        "notes": ["q, k and v of a layer share one scheme"],
        "seconds": {
            "tokenize": 3.912,
            "read": 41.203,
            "calibrate": 233.018,
            "solve": 388.447,
            "propagate": 121.55,
            "pack": 17.9,
            "write": 30.116,
            "total": 849.2,
        },
        "memory": {"tokenize": 900_000_000, "calibrate": 9_900_000_000, "solve": 10_100_000_000},
        "peak_memory_bytes": 11_274_289_152,
    }
    folder = out / "alphaquant"
    (folder / "records").mkdir(parents=True)
    for record in records:
        stem = "outer" if record.layer is None else f"layer-{record.layer:05d}"
        (folder / "records" / f"{stem}.json").write_text(json.dumps(record.to_dict()))
    (folder / "report.json").write_text(json.dumps(report | changes))
    (folder / "plan.json").write_text(Plan.from_dict(PLAN).to_json())
    return records


def write_quality(path, **changes):
    facts = {"perplexity": 7.4312, "stderr": 0.0521, "tokens": 245_640, "windows": 120}
    facts |= {"kl": 0.02817, "kl_stderr": 0.00041, "top1_agreement": 0.9263, "original_perplexity": 7.2216}
    facts |= changes
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
    return path


class Page(HTMLParser):
    """Tags, ids, texts and what is fetched of a page; fails where elements do not nest."""

    VOID = frozenset({"meta", "wbr", "link", "br", "img"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.text, self.titles, self.open = [], [], [], [], []
        self.attributes = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        self.titles += [value for name, value in attrs if name == "title"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
            if self.open and self.open[-1] == "title":
                self.titles.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def draw(out, quality=()):
    html, md = write_report(out, None, list(quality))
    return Page(html.read_text()), md.read_text()


def tables(text):
    """Markdown tables of a text, as lists of rows of cells; fails where rows differ in length."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        assert len({len(row) for row in rows}) == 1, block
        found.append([[cell.strip() for cell in row] for row in rows])
    return found


def test_files_go_to_the_run_or_to_a_new_directory(tmp_path):
    write_run(tmp_path / "out")
    folder = tmp_path / "out" / "alphaquant"
    assert write_report(tmp_path / "out", None, []) == [folder / "report.html", folder / "report.md"]
    other = tmp_path / "new" / "place"
    paths = write_report(tmp_path / "out", other, [])
    assert sorted(other.iterdir()) == sorted(paths) == [other / "report.html", other / "report.md"]
    assert paths[0].read_text() == (folder / "report.html").read_text()


def test_sections_stand_in_order_and_say_the_figures(tmp_path):
    write_run(tmp_path)
    quality = [write_quality(tmp_path / "mixed.json"), write_quality(tmp_path / "plain.json", kl=None)]
    page, text = draw(tmp_path, quality)
    assert page.ids == ["verdict", "quality", "kinds", "layers", "experts", "cost", "events", "warnings", "provenance"]
    report = json.loads((tmp_path / "alphaquant" / "report.json").read_text())
    ratio = report["sizes"]["before_bytes"] / report["sizes"]["after_bytes"]
    bits = report["sizes"]["bits_per_weight"]
    for shown in (page.words, text):
        for figure in (f"{ratio:.2f}×", f"{bits:.2f}", "7.4312", "+2.90%", "0.02817", "92.63%", "mixed", "plain"):
            assert figure in shown
        for figure in ("14 min 09 s", "10.5 GiB", report["model"]["digest"], report["calibration"]["digest"]):
            assert figure in shown
        assert "*.self_attn.*" in shown
        assert "the rule '" in shown
        assert "q, k and v of a layer share one scheme" in shown
    assert report["command"] in page.words
    assert "KL to the original 0.0282 ± 0.0004" in page.words


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    write_run(tmp_path)
    page, _ = draw(tmp_path)
    assert not {"script", "img", "link", "iframe", "object", "image", "use"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "srcset", "xlink:href") or name.startswith("on")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    html = (tmp_path / "alphaquant" / "report.html").read_text()
    assert "url(" not in html
    assert "@import" not in html
    assert "://" not in html


def test_hostile_names_are_harmless(tmp_path):
    records = write_run(tmp_path, name=HOSTILE, warnings=[HOSTILE], notes=[HOSTILE], command=HOSTILE, device=HOSTILE)
    first = records[0].modules[0]
    changed = asdict(first) | {"name": f"model.{HOSTILE}", "kind": HOSTILE, "scheme": HOSTILE, "event": HOSTILE}
    file = tmp_path / "alphaquant" / "records" / "layer-00000.json"
    record = json.loads(file.read_text())
    record["modules"][0] = changed
    file.write_text(json.dumps(record))
    path = tmp_path / "alphaquant" / "report.json"
    report = json.loads(path.read_text())
    report["events"] = [{"module": f"model.{HOSTILE}", "event": HOSTILE}]
    report["summary"][0] |= {"kind": HOSTILE, "scheme": HOSTILE}
    path.write_text(json.dumps(report))
    (tmp_path / "alphaquant" / "plan.json").write_text(json.dumps({"comment": "</pre>" + HOSTILE}))
    quality = write_quality(tmp_path / '<script>alert(1)"|`.json')
    page, text = draw(tmp_path, [quality])
    assert "script" not in page.tags
    assert page.words.count("<script>alert(1)") >= 10
    assert any("<script>" in title for title in page.titles)
    tables(text)
    outside_code = re.sub(r"(?s)```json.*?\n```|(?<![`\\])(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    assert not re.search(r"(?<!\\)<script", outside_code)


def test_loss_map_averages_experts_and_names_bits(tmp_path):
    records = write_run(tmp_path)
    page, text = draw(tmp_path)
    chosen = [m for m in records[2].modules if m.kind == "expert" and m.name.endswith("up_proj")]
    mean = sum(m.relative_loss for m in chosen) / len(chosen)
    title = next(t for t in page.titles if t.startswith("layer 2, expert up_proj: loss"))
    assert f"loss {mean:.3%}" in title
    assert "mean of 8" in title
    assert "layer 2, expert up_proj: 3.25 bits (int3 g64)" in page.titles
    table = [t for t in tables(text) if t[0][:2] == ["layer", "attention q\\_proj"]][1]
    column = table[0].index("expert up\\_proj")
    assert table[2][column] == ""  # layer 0 is dense
    assert float(table[4][column]) == pytest.approx(100 * mean, abs=0.01)
    assert not any(t.startswith("layer 0, expert") for t in page.titles)
    assert any(t.startswith("layer 0, mlp up_proj: ") and "mean of" not in t for t in page.titles)
    assert "lm_head: loss" in page.words


def test_loss_map_colours_follow_the_loss(tmp_path):
    write_run(tmp_path)
    draw(tmp_path)
    html = (tmp_path / "alphaquant" / "report.html").read_text()
    cells = re.findall(r'<td class="s(\d)" title="layer \d+, [^"]*?: loss ([\d.]+)%', html)
    assert len(cells) == 7 + 2 * 10
    steps = [int(step) for step, _ in sorted(cells, key=lambda cell: float(cell[1]))]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 7)


@pytest.mark.parametrize(("loss", "step"), [(0.0, "0"), (4e-3, "7")])
def test_equal_losses_are_drawn(tmp_path, loss, step):
    for record in write_run(tmp_path):
        stem = "outer" if record.layer is None else f"layer-{record.layer:05d}"
        data = record.to_dict()
        for m in data["modules"]:
            m["relative_loss"] = loss
        (tmp_path / "alphaquant" / "records" / f"{stem}.json").write_text(json.dumps(data))
    page, _ = draw(tmp_path)
    assert f"loss {loss:.3%}" in " ".join(page.titles)
    html = (tmp_path / "alphaquant" / "report.html").read_text()
    assert set(re.findall(r'<td class="s(\d)" title="layer', html)) == {step}


def test_expert_map_marks_starved_and_dead(tmp_path):
    write_run(tmp_path, layers=1, dense_layers=0)
    file = tmp_path / "alphaquant" / "records" / "layer-00000.json"
    record = json.loads(file.read_text())
    tokens = [0, 24, 25, 100, 100, 100, 151, 300]  # of 800: the fair share is 100
    record["routing"] |= {"tokens": tokens, "effective_samples": [float(t) for t in tokens]}
    file.write_text(json.dumps(record))
    page, text = draw(tmp_path)
    assert "Of 8 experts, starved of tokens: 1, without any: 1." in page.words
    html = (tmp_path / "alphaquant" / "report.html").read_text()
    drawing = html[html.index('<svg class="map"') :]
    drawing = drawing[: drawing.index("</svg>")]
    cells = re.findall(r'<rect class="(\w+)"[^>]*><title>layer 0, expert (\d)', drawing)
    assert cells == [(c, str(i)) for i, c in enumerate(["dead", "d0", "d1", "d3", "d3", "d3", "d4", "d6"])]
    assert drawing.count('class="starved"') == 1
    assert "expert 1: 3.00% of tokens, 0.24 × fair, 24 tokens, 24 effective" in drawing
    row = next(t for t in tables(text) if t[0][-1] == "saw no token")[2]
    assert row == ["0", "8", "0.00", "3.00", "1", "1"]


def test_router_agreement_is_drawn_layer_by_layer(tmp_path):
    write_run(tmp_path)
    page, _ = draw(tmp_path, [write_quality(tmp_path / "plain.json")])
    assert "Router agreement" not in page.words
    gptq = write_quality(tmp_path / "gptq.json", router_by_layer=[None, 0.98, 0.93])
    page, text = draw(tmp_path, [gptq, write_quality(tmp_path / "rtn.json", router_by_layer=[None, 0.95, 0.85])])
    assert "Router agreement" in page.words
    assert [t for t in page.titles if "same experts" in t] == [
        f"{name}, layer {layer}: same experts {share}%"
        for name, shares in (("gptq", ("98.00", "93.00")), ("rtn", ("95.00", "85.00")))
        for layer, share in enumerate(shares, 1)
    ]
    html = (tmp_path / "alphaquant" / "report.html").read_text()
    drawing = html[html.index("<h3>Router agreement") :]
    places = [float(y) for y in re.findall(r'<circle class="point c\d" cx="[\d.]+%" cy="([\d.]+)"', drawing)]
    assert sorted(places) == [places[i] for i in (0, 2, 1, 3)]  # the higher the share, the higher up
    assert len(re.findall(r'<line class="trace', drawing)) == 2
    row = next(t for t in tables(text) if t[0][0] == "measured")[2]
    assert row[8] == "95.50%"


def test_experts_without_calibration_and_dense_models(tmp_path):
    write_run(tmp_path / "rtn", calibrated=False)
    page, text = draw(tmp_path / "rtn")
    assert "Not measured: the run used no calibration tokens." in page.words
    assert "Not measured: the run used no calibration tokens." in text
    assert "Rounded to nearest, without calibration." in page.words
    write_run(tmp_path / "dense", layers=2, dense_layers=2)
    page, text = draw(tmp_path / "dense")
    assert "experts" not in page.ids
    assert "## Use of the experts" not in text
    assert "No module fell back." in page.words


def test_events_are_grouped_by_parent_and_by_reason(tmp_path):
    reason = "rounded to nearest: {} effective samples for 2048 inputs"
    events = [("a.experts.1.gate_proj", 7), ("a.experts.1.up_proj", 7), ("a.experts.2.up_proj", 9), ("lm_head", 9)]
    write_run(tmp_path, events=[{"module": name, "event": reason.format(n)} for name, n in events])
    page, text = draw(tmp_path)
    assert "rounded to nearest: … effective samples for … inputs 4" in page.words
    rows = next(t for t in tables(text) if t[0] == ["modules", "reason"])[2:]
    assert rows == [
        ["`a.experts.1.gate_proj, up_proj`", reason.format(7)],
        ["`a.experts.2.up_proj`", reason.format(9)],
        ["`lm_head`", reason.format(9)],
    ]


def test_an_endless_list_of_events_is_cut(tmp_path):
    write_run(tmp_path, events=[{"module": f"m.{i}.w", "event": "why"} for i in range(700)])
    page, text = draw(tmp_path)
    assert "200 more rows are in report.json." in page.words
    assert "200 more rows are in report.json." in text
    assert "m.499.w" in text
    assert "m.500.w" not in text


def test_phases_that_the_clock_missed_are_other(tmp_path):
    write_run(tmp_path, seconds={"read": 1.0, "solve": 3.0, "total": 5.0})
    page, text = draw(tmp_path)
    rows = next(t for t in tables(text) if t[0][0] == "phase")[2:]
    assert rows == [
        ["read", "1.0 s", "20.0%", ""],
        ["solve", "3.0 s", "60.0%", "9.4 GiB"],
        ["other", "1.0 s", "20.0%", ""],
    ]
    assert "3.0 s 60.0% 9.4 GiB" in page.words
    assert {"33.33%", "100.00%"} <= {value for name, value in page.attributes if name == "width"}


def test_a_run_that_quantized_nothing(tmp_path):
    sizes = {"before_bytes": 1000, "after_bytes": 1000, "quantized_weights": 0, "bits_per_weight": None}
    write_run(tmp_path, sizes=sizes, summary=[], audit={"targeted": 0, "quantized": 0, "left": 9}, events=[])
    for file in (tmp_path / "alphaquant" / "records").iterdir():
        file.write_text(json.dumps(json.loads(file.read_text()) | {"modules": [], "routing": None}))
    page, text = draw(tmp_path)
    assert "Nothing was quantized." in page.words
    assert "1.00×" in text


def test_a_hub_model_is_called_by_its_id(tmp_path):
    write_run(tmp_path, name="hub/models--allenai--OLMoE-1B-7B-0924/snapshots/4fa3a6fe")
    page, text = draw(tmp_path)
    assert "allenai/OLMoE-1B-7B-0924 · AlphaQuant report" in page.words
    assert text.startswith("# allenai/OLMoE-1B-7B-0924: quantization report\n")


def test_an_infinite_perplexity_is_shown(tmp_path):
    write_run(tmp_path)
    page, _ = draw(tmp_path, [write_quality(tmp_path / "broken.json", perplexity=math.inf, stderr=math.nan)])
    assert "broken inf nan" in page.words


def test_a_large_model_stays_small_on_disk(tmp_path):
    write_run(tmp_path, layers=24, experts=60, dense_layers=0)
    begin = time.process_time()
    html, md = write_report(tmp_path, None, [write_quality(tmp_path / "q.json")])
    assert time.process_time() - begin < 5
    assert html.stat().st_size < 1_500_000
    page = Page(html.read_text())
    assert sum(title.startswith("layer") and ", expert " in title for title in page.titles) >= 24 * 60
    tables(md.read_text())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_the_ramp_can_be_read(scheme):
    css = (files("alphaquant.report") / "templates" / "style.css.jinja").read_text()
    light, dark = css.split("prefers-color-scheme: dark", 1)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6}|var\(.*?\));", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#\w{6});", dark[: dark.index("* {")]))

    def luminance(name):
        value = colours[name]
        if value.startswith("var"):
            return luminance(value[6:-1])
        channels = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    pairs = [(f"{ramp}{i}", f"t{i}") for ramp in "sg" for i in range(8)]
    pairs += [("page", name) for name in ("text", "soft", "accent", "alert", "fine")] + [("panel", "text")]
    assert all(contrast(*pair) >= 4.5 for pair in pairs), {p: contrast(*p) for p in pairs}
    for ramp in "sg":
        steps = [luminance(f"{ramp}{i}") for i in range(8)]
        assert steps == sorted(steps, reverse=scheme == "light")
    # under and over the fair share differ by hue, and both fall or rise in lightness from the middle
    shares = [luminance(f"d{i}") for i in range(7)]
    middle = max(shares) if scheme == "light" else min(shares)
    assert shares.index(middle) == 3


def test_a_run_of_an_older_version_is_drawn(tmp_path):
    """All that a report.json must hold; no records, no plan's comment, no time."""
    write_run(tmp_path)
    folder = tmp_path / "alphaquant"
    report = json.loads((folder / "report.json").read_text())
    needed = ("version", "alphaquant", "created", "model", "layout", "sizes", "audit")
    (folder / "report.json").write_text(json.dumps({key: report[key] for key in needed}))
    for record in (folder / "records").iterdir():
        record.unlink()
    page, text = draw(tmp_path)
    assert "The records of the modules are missing: no maps are drawn." in page.words
    assert "layers" not in page.ids
    assert "memory not recorded" in text


@pytest.mark.parametrize(
    ("engines", "layout", "shown", "hidden"),
    [
        ({"vllm": [], "transformers": []}, "compressed-tensors", ("vllm serve", "transformers serve"), "export"),
        ({"vllm": [], "transformers": ["a: rule; remedy"]}, "humming", ("vllm serve",), "transformers serve"),
        (
            {"vllm": ["m: <b>rule; x"], "transformers": ["n: y"]},
            "humming",
            ("--format dense", "<b>rule"),
            "as it is: n",
        ),
        (None, "compressed-tensors", ("vllm serve", "did not check"), "transformers serve"),
        (None, "dense", ("vllm serve", "transformers serve"), "did not check"),
    ],
)
def test_only_engines_that_take_it_are_offered(tmp_path, engines, layout, shown, hidden):
    out = tmp_path / "a b"
    write_run(out, engines=engines, layout=layout)
    page, _ = draw(out)
    verdict = page.words[: page.words.index("modules quantized")]
    assert f"'{out}'" in verdict
    for words in shown:
        assert words in verdict
    assert hidden not in verdict


def test_what_eval_left_is_shown_without_being_named(tmp_path):
    write_run(tmp_path)
    (tmp_path / "alphaquant" / "quality").mkdir()
    write_quality(tmp_path / "alphaquant" / "quality" / "wikitext2.json", weights="GPTQ here")
    page, _ = draw(tmp_path)
    assert "GPTQ here 7.4312" in page.words


def test_loss_against_tokens_has_a_point_for_every_expert(tmp_path):
    records = write_run(tmp_path, layers=4, experts=16)
    draw(tmp_path)
    html = (tmp_path / "alphaquant" / "report.html").read_text()
    plane = html[html.index('class="plot plane"') :]
    plane = plane[: plane.index("</svg>")]
    marks = re.findall(r'<circle class="(ring|point)[^>]*cx="([\d.]+)%"[^>]*><title>([^<]*)', plane)
    assert len(marks) == 3 * 16
    fell_back = [m for r in records for m in r.modules if m.kind == "expert" and m.event is not None]
    experts = {m.name.rpartition(".")[0] for m in fell_back}
    assert [kind for kind, _, _ in marks].count("ring") == len(experts) > 0
    assert all(("fell back" in title) == (kind == "ring") for kind, _, title in marks)


def test_runs_side_by_side(tmp_path):
    a, b = tmp_path / "a", tmp_path / HOSTILE.replace("/", "")
    write_run(a, seconds={"total": 10.0})
    write_run(b, seconds={"total": 30.0}, layout="humming")
    for out, kl in ((a, 0.03), (b, 0.02)):
        (out / "alphaquant" / "quality").mkdir()
        write_quality(out / "alphaquant" / "quality" / "q.json", kl=kl)
    html, md = write_comparison([a, b], tmp_path / "out")
    page = Page(html.read_text())
    assert "script" not in page.tags
    assert page.ids == ["figures", "plane", "kinds", "settings"]
    assert "layout compressed-tensors humming" in page.words
    rows = tables(md.read_text())
    figures = {row[0]: row[1:] for row in rows[0][2:]}
    assert figures["time"] == ["**10.0 s**", "30.0 s"]
    assert figures["KL to the original, nats a token"] == ["0.03000", "**0.02000**"]
    assert "cannot be compared" not in page.words
    write_run(tmp_path / "c", model={"path": "/m", "family": "f", "architecture": "a", "digest": "other"})
    (html, _) = write_comparison([a, tmp_path / "c"], tmp_path / "out")
    assert "These runs quantized different models" in html.read_text()


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-9, 5.0], [-2.0, 7.0], [math.inf, math.nan, 1.0], []])
def test_axes_hold_what_they_are_given(values):
    for axis in (linear_axis(values), linear_axis(values, start=0.0), log_axis(values)):
        assert axis.high > axis.low
        assert 1 <= len(axis.ticks) <= 12
        assert all(0 <= axis.at(value) <= 100 for value in values)
        assert [tick.at for tick in axis.ticks] == sorted(tick.at for tick in axis.ticks)


def test_a_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a directory that alphaquant made") as error:
        write_report(tmp_path, None, [])
    assert error.value.where == str(tmp_path / "alphaquant" / "report.json")
    assert "quantize -o" in error.value.remedy
    with pytest.raises(CheckpointError, match=r"not a directory"):
        write_report(tmp_path / "missing", None, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["report.json", "plan.json", "records/layer-00001.json"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"version": 1', "is not JSON"),
        (b"[1]", r"malformed|version"),
        (b'"\\ud800"', "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"version": NaN}', "is not JSON"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, content, what):
    write_run(tmp_path)
    (tmp_path / "alphaquant" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as error:
        write_report(tmp_path, None, [])
    assert error.value.where == str(tmp_path / "alphaquant" / name)
    assert error.value.remedy
    assert not (tmp_path / "alphaquant" / "report.html").exists()


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("seconds", {"total": "long"}, "seconds.total"),
        ("sizes", {"before_bytes": 1, "after_bytes": 0}, "sizes.after_bytes"),
        ("summary", [{"kind": "expert"}], "summary.0.scheme"),
        ("created", "yesterday", "created"),
        ("version", 2, "of version 2, not 1"),
    ],
)
def test_wrong_values_are_named(tmp_path, key, value, what):
    write_run(tmp_path, **{key: value})
    with pytest.raises(CheckpointError, match=what):
        write_report(tmp_path, None, [])


def test_missing_plan_and_records_are_named(tmp_path):
    write_run(tmp_path)
    folder = tmp_path / "alphaquant"
    plan = (folder / "plan.json").read_bytes()
    (folder / "plan.json").unlink()
    with pytest.raises(CheckpointError, match=r"plan\.json cannot be read"):
        write_report(tmp_path, None, [])
    (folder / "plan.json").write_bytes(plan)
    (folder / "records" / "layer-00001.json").unlink()
    with pytest.raises(CheckpointError, match=r"the records hold \d+ modules, report\.json says \d+"):
        write_report(tmp_path, None, [])


def test_malformed_quality_is_named(tmp_path):
    write_run(tmp_path)
    for content, what in (("perplexity: 7", "not JSON"), ('{"perplexity": "low"}', "perplexity")):
        (tmp_path / "q.json").write_text(content)
        with pytest.raises(CheckpointError, match=what) as error:
            write_report(tmp_path, None, [tmp_path / "q.json"])
        assert error.value.where == str(tmp_path / "q.json")
        assert "eval --json" in error.value.remedy
    with pytest.raises(CheckpointError, match=r"none\.json cannot be read"):
        write_report(tmp_path, None, [tmp_path / "none.json"])


def test_an_output_that_is_a_file_is_refused(tmp_path):
    write_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        write_report(tmp_path, tmp_path / "file", [])
