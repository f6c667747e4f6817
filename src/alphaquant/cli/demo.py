"""The verb that shows it all on the bundled model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.options import JsonOpt, OverwriteOpt, QuietOpt, print_json
from alphaquant.demo import run_demo
from alphaquant.terminal import out, print_comparison, print_result, progress_bar

__all__ = ["demo"]


def demo(
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to make.")] = Path("demo-output"),
    overwrite: OverwriteOpt = False,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Quantize the small model that comes with alphaquant, compare it with the original, write the report."""
    with progress_bar("demo", quiet=quiet or as_json) as progress:
        result = run_demo(output, overwrite=overwrite, progress=progress)
    if as_json:
        quality = {"original": result.original, "rtn": asdict(result.rounded), "gptq": asdict(result.quantized)}
        print_json({"report": result.report, "quality": quality, "written": [str(p) for p in (output, *result.files)]})
        return
    print_result(result.report)
    print_comparison(result.original, {"round to nearest, absmax": result.rounded, "GPTQ": result.quantized})
    for path in (output, *result.files):
        out.print(f"written to {path}", soft_wrap=True)
