"""The command: parse, call, show. Nothing imports this room."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from alphaquant import __version__
from alphaquant.cli.demo import demo
from alphaquant.cli.evaluate import evaluate
from alphaquant.cli.model import inspect
from alphaquant.cli.outputs import export, report, status
from alphaquant.cli.plan import plan
from alphaquant.cli.quantize import quantize
from alphaquant.cli.usage import USAGE_ERROR, usage_error
from alphaquant.cli.verify import verify
from alphaquant.errors import AlphaQuantError
from alphaquant.numerics import keep_freed_memory
from alphaquant.terminal import err, out, print_error

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["app", "main"]

# in the order in which help lists them
_VERBS: dict[str, tuple[Callable[..., None], str]] = {
    "quantize": (quantize, "Quantize a checkpoint into a directory that engines load."),
    "status": (status, "Tell where a run stands."),
    "eval": (evaluate, "Measure perplexity, and KL against the original."),
    "report": (report, "Draw what a run did, or several runs side by side."),
    "inspect": (inspect, "Show a model's architecture, modules and sizes."),
    "plan": (plan, "Show which module gets which format, and why."),
    "export": (export, "Convert to another layout, losslessly."),
    "verify": (verify, "Hold a directory against its run, and against an engine."),
    "demo": (demo, "Do it all on the small model that comes along."),
}
_HELP = """Quantize MoE and dense language models with GPTQ in mixed precision.

\b
alphaquant quantize MODEL --scheme int4:g128 -o OUT
alphaquant eval OUT --against MODEL
alphaquant report OUT"""


def _version(value: bool) -> None:  # noqa: FBT001  (typer's callback signature)
    if value:
        out.print(f"alphaquant {__version__}")
        raise typer.Exit


def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,  # noqa: ARG001, FBT002
) -> None:
    if context.invoked_subcommand is None:
        out.print(context.get_help(), soft_wrap=True, markup=False)


def _build() -> typer.Typer:
    built = typer.Typer(
        name="alphaquant",
        help=_HELP,
        invoke_without_command=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    built.callback()(_main)
    for name, (verb, short) in _VERBS.items():
        built.command(name=name, short_help=short)(verb)
    return built


app = _build()


def main() -> None:
    """Entry point: our own errors, and those of the command line, become a message and exit code 2."""
    keep_freed_memory()
    command = typer.main.get_command(app)
    for parameter in command.params:  # one line of the screen is enough for completion
        if isinstance(parameter, typer.core.TyperOption) and parameter.name == "show_completion":
            parameter.hidden = True
    try:
        code = command(prog_name="alphaquant", standalone_mode=False)
    except USAGE_ERROR as error:
        print_error(usage_error(error, list(_VERBS)))
        sys.exit(2)
    except AlphaQuantError as error:
        print_error(error)
        sys.exit(2)
    if code == 130:  # typer makes this of Ctrl-C
        err.print("interrupted; what was committed is kept, and the same command goes on")
    sys.exit(code if isinstance(code, int) else 0)
