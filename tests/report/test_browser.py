"""The report in a real browser: nothing overflows, nothing is said on its console, and it is looked at."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from alphaquant.report import write_comparison, write_report
from report.test_report import write_quality, write_run

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
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=60, check=True)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("browser")
    for name in ("a", "b"):
        write_run(folder / name, layers=6, experts=60)
        (folder / name / "alphaquant" / "quality").mkdir()
        write_quality(folder / name / "alphaquant" / "quality" / "GPTQ.json")
        write_quality(folder / name / "alphaquant" / "quality" / "round-to-nearest.json", kl=0.08, perplexity=8.9)
    return [write_report(folder / "a")[0], write_comparison([folder / "a", folder / "b"], folder / "out")[0]]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed")
@pytest.mark.parametrize("number", [0, 1], ids=["report", "comparison"])
def test_nothing_overflows(pages: list[Path], number: int, tmp_path: Path) -> None:
    measure = tmp_path / "measure.html"
    measure.write_text(MEASURE.format(widths="[1280, 768, 390, 320]", page=pages[number].as_uri()))
    done = chromium("--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", measure.as_uri())
    found = {int(w): int(inner) for w, inner, _ in re.findall(r"\[(\d+): (\d+) (\d+)\]", done.stdout)}
    assert found == {width: width for width in (1280, 768, 390, 320)}


@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed")
@pytest.mark.parametrize(("width", "scheme"), [(1280, 1), (390, 0)], ids=["desktop-light", "phone-dark"])
def test_screenshots(pages: list[Path], width: int, scheme: int, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    colours = f"--blink-settings=preferredColorScheme={scheme}"
    done = chromium(colours, f"--window-size={width},1600", f"--screenshot={shot}", pages[0].as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert shot.stat().st_size > 30_000
