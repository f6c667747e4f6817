"""Verbs that work on what a run left."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.options import Format, JsonOpt, OverwriteOpt, check_single_file, print_json
from alphaquant.errors import OutputError
from alphaquant.numerics import give_back_freed_memory
from alphaquant.pipeline import export_checkpoint, run_status, save_single_file
from alphaquant.report import human_bytes, write_comparison, write_report
from alphaquant.terminal import out, print_status

__all__ = ["export", "report", "status"]


def export(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="Directory that `quantize` made.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory, or .pt file, to make.")],
    layout: Annotated[
        Format | None, typer.Option("--format", help="Layout to convert to.", show_default="dense")
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Convert a quantized directory to another layout, losslessly from its codes, or gather it in one .pt file."""
    give_back_freed_memory()  # else a second layer lies beside the first one's remains
    if output.suffix == ".pt":
        if layout is not None:
            raise OutputError(
                f"--format {layout.value} with {output}: a .pt file keeps the layout of its directory",
                remedy="convert into a directory first, and export that one",
            )
        check_single_file(output, overwrite=overwrite)
        save_single_file(directory, output)
        size = output.stat().st_size
    else:
        name = Format.DENSE.value if layout is None else layout.value
        size = export_checkpoint(directory, output, None if layout is Format.AUTO else name, overwrite=overwrite)
    if as_json:
        print_json({"written": [str(output)], "bytes": size})
    else:
        out.print(f"written to {output} ({human_bytes(size)})", soft_wrap=True)


def report(
    directories: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Directories that `quantize` made.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where to write.", show_default="OUT/alphaquant; of several: here"),
    ] = None,
    quality: Annotated[list[Path] | None, typer.Option(help="JSON of `eval --json` to show; may be repeated.")] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="Costs that `plan --table` wrote: draws the frontier of sizes, and α.", show_default="those of the run"
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Draw what a run did: report.html and report.md; of several runs comparison.html and comparison.md."""
    if len(directories) == 1:
        written = write_report(directories[0], output, quality or [], table=table)
    elif table is not None:
        raise OutputError("--table with several directories", remedy="draw them one by one")
    elif quality:
        raise OutputError(
            "--quality with several directories: whose is it?",
            remedy="measure with `alphaquant eval OUT --against MODEL`, which leaves the figures in OUT",
        )
    else:
        written = write_comparison(directories, Path() if output is None else output)
    if as_json:
        print_json({"written": [str(path) for path in written]})
        return
    for path in written:
        out.print(f"written to {path}", soft_wrap=True)


def status(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="Directory that `quantize` makes or made.")],
    *,
    as_json: JsonOpt = False,
) -> None:
    """Tell where a run stands: running, stopped or complete, how many layers are done, how long it will take."""
    found = run_status(directory)
    print_json(asdict(found)) if as_json else print_status(found)
