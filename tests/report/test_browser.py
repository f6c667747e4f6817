"""The report in a real browser: nothing overflows, nothing is said on its console, and it is looked at."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from alphaquant import demo
from alphaquant.cli import app
from alphaquant.report import write_comparison, write_report
from report.test_budget import write_table
from report.test_report import Page, write_quality, write_run

if TYPE_CHECKING:
    from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
MEASURE = """<!DOCTYPE html><body><script>
const widths = {widths};
for (const width of widths) {{
  const frame = document.createElement("iframe");
  frame.style.cssText = `border:0;height:800px;width:${{width}}px`;
  frame.src = "{page}";
  frame.onload = () => {{
    const root = frame.contentDocument.documentElement;
    document.body.append(` [${{width}}: ${{root.scrollWidth}} ${{root.scrollHeight}}] `);
  }};
  document.body.append(frame);
}}
</script></body>"""


def chromium(*args: object) -> subprocess.CompletedProcess[str]:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=300, check=True)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("browser")
    for name in ("a", "b"):
        records = write_run(folder / name, layers=6, experts=60)
        write_table(folder / name / "alphaquant" / "costs.json", records)
        (folder / name / "alphaquant" / "quality").mkdir()
        routers = [None, *(0.99 - 0.02 * layer for layer in range(5))]
        write_quality(folder / name / "alphaquant" / "quality" / "GPTQ.json", router_by_layer=routers)
        write_quality(folder / name / "alphaquant" / "quality" / "round-to-nearest.json", kl=0.08, perplexity=8.9)
    return [write_report(folder / "a")[0], write_comparison([folder / "a", folder / "b"], folder / "out")[0]]


in_a_browser = pytest.mark.skipif(
    not CHROMIUM, reason="there is no chromium: `apt-get install chromium`, as .ci/run does, brings it"
)


def widths_of(page: Path, tmp_path: Path) -> dict[int, int]:
    """By width of the window what the page takes: more where something overflows."""
    measure = tmp_path / "measure.html"
    measure.write_text(MEASURE.format(widths="[1280, 768, 390, 320]", page=page.as_uri()))
    done = chromium("--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", measure.as_uri())
    return {int(w): int(inner) for w, inner, _ in re.findall(r"\[(\d+): (\d+) (\d+)\]", done.stdout)}


def look_at(page: Path, width: int, scheme: int, shot: Path) -> None:
    """Take a picture; fails where the page says something on its console, or shows next to nothing."""
    colours = f"--blink-settings=preferredColorScheme={scheme}"
    done = chromium(colours, f"--window-size={width},1600", f"--screenshot={shot}", page.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 30_000


@in_a_browser
@pytest.mark.parametrize("number", [0, 1], ids=["report", "comparison"])
def test_nothing_overflows(pages: list[Path], number: int, tmp_path: Path) -> None:
    assert widths_of(pages[number], tmp_path) == {width: width for width in (1280, 768, 390, 320)}


@in_a_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (390, 0)], ids=["desktop-light", "phone-dark"])
def test_screenshots(pages: list[Path], width: int, scheme: int, tmp_path: Path) -> None:
    look_at(pages[0], width, scheme, tmp_path / "page.png")


@in_a_browser
def test_a_page_that_complains_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><div style='width:900px'>wide</div><script>console.error('no')</script>")
    assert widths_of(page, tmp_path)[390] > 390
    with pytest.raises(AssertionError, match="CONSOLE"):
        look_at(page, 390, 0, tmp_path / "bad.png")


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report that `alphaquant demo` leaves, measured on fewer windows than it is for people."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_WINDOWS", 8)
        done = CliRunner().invoke(app, ["demo", "-o", str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    assert str(out / "alphaquant" / "report.html") in done.output
    return out / "alphaquant" / "report.html"


def test_the_demo_says_everything(demo_page: Path) -> None:
    assert demo_page.stat().st_size < 2_000_000
    page = Page(demo_page.read_text())
    order = ["verdict", "quality", "kinds", "layers", "experts", "cost", "events", "provenance"]
    assert [name for name in page.ids if name in order] == order
    for said in (
        *("Size of the weights", "Average bits", "Perplexity", "KL to the original", "Serve with vLLM vllm serve"),
        *("312 of 312 targeted modules quantized", "round to nearest", "GPTQ", "Loss against tokens", "Score mass"),
        *("Router agreement", "calibrate", "None: no module fell back.", "alphaquant demo -o", "Digest of the model"),
        *("three quarters of all weights", "AlphaQuant 0", "torch 2"),
    ):
        assert said in page.words, said


@in_a_browser
def test_the_demo_is_looked_at(demo_page: Path, tmp_path: Path) -> None:
    assert widths_of(demo_page, tmp_path) == {width: width for width in (1280, 768, 390, 320)}
    for width, scheme in ((1280, 1), (390, 0)):
        look_at(demo_page, width, scheme, tmp_path / f"demo-{width}.png")
