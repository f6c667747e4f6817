"""What typer says of a wrong command line, in the one shape that errors have here."""

from __future__ import annotations

import difflib
import re
from typing import Any

import typer

from alphaquant.errors import ConfigError
from alphaquant.patterns import did_you_mean

__all__ = ["USAGE_ERROR", "usage_error"]

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""`UsageError`, which typer does not export: of its own copy of click, or of click, by version."""

_NO_VERB = re.compile(r"No such command '(?P<name>[^']*)'")


def usage_error(error: Any, verbs: list[str]) -> ConfigError:
    """What is wrong with the command line, and what was meant."""
    command = error.ctx.command_path if error.ctx is not None else "alphaquant"
    look = f"`{command} --help` lists what there is"
    message = str(error.format_message())
    option = getattr(error, "option_name", None)
    parameter = getattr(error, "param", None)
    if found := _NO_VERB.match(message):
        name = found["name"]
        return _error(f"there is no command {name!r}", name, verbs, look)
    if parameter is not None and message.startswith("Missing"):
        name = parameter.metavar or parameter.opts[-1]
        return ConfigError(f"{name} is missing", where=command, remedy=f"`{command} --help` shows how it is called")
    if parameter is not None:
        what = str(error.message).removeprefix("Value error, ").rstrip(".")
        known = re.findall(r"'([^']*)'", what)
        name = parameter.metavar or parameter.opts[-1]
        return _error(f"{name}: {what}", known[0] if known else "", known[1:], look)
    if option is not None and "No such option" in message:
        options = [opt for p in error.ctx.command.params for opt in p.opts] if error.ctx is not None else []
        return _error(f"{command} has no option {option}", option, options, look)
    return ConfigError(message.rstrip("."), remedy=look)


def _error(what: str, given: str, known: list[str], otherwise: str) -> ConfigError:
    close = difflib.get_close_matches(given, known, n=2, cutoff=0.6)
    return ConfigError(what, remedy=did_you_mean(close) or otherwise)
