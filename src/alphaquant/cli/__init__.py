"""The command: parse, call, show. Nothing imports this room."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from alphaquant import __version__
from alphaquant.cli.demo import demo
from alphaquant.cli.evaluate import evaluate
from alphaquant.cli.model import inspect, plan
from alphaquant.cli.outputs import export, report
from alphaquant.cli.quantize import quantize
from alphaquant.errors import AlphaQuantError
from alphaquant.numerics import keep_freed_memory
from alphaquant.terminal import err, out, print_error

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["app", "main"]

# in the order in which help lists them
_VERBS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "plan": plan,
    "quantize": quantize,
    "eval": evaluate,
    "export": export,
    "report": report,
    "demo": demo,
}


def _version(value: bool) -> None:  # noqa: FBT001  (typer's callback signature)
    if value:
        out.print(f"alphaquant {__version__}")
        raise typer.Exit


def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,  # noqa: FBT002
) -> None:
    pass


def _build() -> typer.Typer:
    built = typer.Typer(
        name="alphaquant",
        help="Quantize Mixture-of-Experts and dense language models with GPTQ in mixed precision.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    built.callback()(_main)
    for name, verb in _VERBS.items():
        built.command(name=name)(verb)
    return built


app = _build()


def main() -> None:
    """Entry point: our own errors become a message and exit code 2."""
    keep_freed_memory()
    try:
        app(prog_name="alphaquant")
    except AlphaQuantError as error:
        print_error(error)
        sys.exit(2)
    except SystemExit as stop:  # typer makes this of Ctrl-C
        if stop.code == 130:
            err.print("interrupted; nothing was left behind")
        raise
