"""The verb that shows it all on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.options import OverwriteOpt, QuietOpt
from alphaquant.demo import run_demo
from alphaquant.terminal import out, print_comparison, print_result, progress_bar

__all__ = ["demo"]


def demo(
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to make.")] = Path("demo-output"),
    overwrite: OverwriteOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Quantize the small model that comes with alphaquant, compare it with the original, write the report."""
    with progress_bar("demo", quiet=quiet) as progress:
        result = run_demo(output, overwrite=overwrite, progress=progress)
    print_result(result.report)
    print_comparison(result.original, {"round to nearest, absmax": result.rounded, "GPTQ": result.quantized})
    for path in (output, *result.files):
        out.print(f"written to {path}", soft_wrap=True)
