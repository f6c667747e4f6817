"""The verb that holds a directory against its run, and against an engine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.cli.options import JsonOpt, print_json
from alphaquant.terminal import print_verified
from alphaquant.verification import check_stored, compare_with_dense

__all__ = ["verify"]


class Probed(str, Enum):
    """Engines that can be asked."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory that `quantize` or `export` made.")],
    *,
    engine: Annotated[Probed | None, typer.Option(help="Also load it there, beside its dense export.")] = None,
    python: Annotated[
        str, typer.Option(help="Interpreter that has the engine.", show_default="this one")
    ] = sys.executable,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the engine run code that lies in DIR.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Hash every file, hold every module's codes against the run's, and with --engine ask the engine.

    Ends with code 2 where something differs.
    """
    stored = check_stored(directory)
    likeness = None
    if engine is not None and not stored.problems:
        likeness = compare_with_dense(directory, engine.value, python, trust_remote_code=trust_remote_code)
    if as_json:
        content = {"problems": [problem._asdict() for problem in stored.problems]}
        facts = {"layout": stored.layout, "modules": stored.modules, "uncompared": stored.uncompared}
        print_json(content | facts | {"engine": None if likeness is None else asdict(likeness)})
    else:
        print_verified(directory, stored, likeness)
    if stored.problems or (likeness is not None and not likeness.is_same):
        raise typer.Exit(2)
