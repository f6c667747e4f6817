"""What is said of a directory: what engines would not take of it, and how the others are started."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, NamedTuple

from alphaquant.engines.profile import NAMELESS_ATTENTION
from alphaquant.engines.rules import PROFILES
from alphaquant.plan import ModuleKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from alphaquant.engines.parts import Schemes
    from alphaquant.plan import Module

__all__ = ["Serve", "engine_notes", "nameless_scheme", "serve"]


def nameless_scheme(schemes: Schemes, modules: Sequence[Module], family: str) -> Schemes:
    """By the empty name, the scheme of linears that reach vLLM without a name, where they share one; else nothing.

    Rules by name meet it as ``^$``.
    """
    if family not in NAMELESS_ATTENTION:
        return {}
    found = {schemes[module.name] for module in modules if module.kind is ModuleKind.ATTENTION}
    return {"": found.pop()} if len(found) == 1 else {}


def engine_notes(schemes: Schemes, modules: Sequence[Module], layout: str, family: str = "") -> dict[str, list[str]]:
    """For every single engine what it would not take of a directory in this layout, in words, on one GPU."""
    return {
        name: [str(violation) for violation in profile.on(family).violations(schemes, modules, layout=layout)]
        for name, profile in PROFILES.items()
        if name != "any"
    }


class Serve(NamedTuple):
    """How to put a directory to use: what it is for, the command, and what stands in the way."""

    engine: str
    command: str
    caveat: str = ""


def serve(
    notes: Mapping[str, Sequence[str]] | None, layout: str, directory: str, *, runs_code: bool = False
) -> list[Serve]:
    """The engines that take a directory, or the way to one that does.

    Args:
        notes: from `engine_notes`; None where that was not asked.
        layout: the directory's.
        directory: its path.
        runs_code: its config.json names classes of its own, which an engine must be allowed to run.
    """
    path, option = shlex.quote(directory), " --trust-remote-code" * runs_code
    vllm = f"vllm serve {path}{option}"
    if notes is None and layout != "dense":
        return [Serve("vLLM", vllm, "this run did not check what engines take")]
    notes = notes or {}
    found = []
    if not notes.get("vllm"):
        found.append(Serve("vLLM", vllm, "on NVIDIA GPUs, with humming-kernels" if layout == "humming" else ""))
    if not notes.get("transformers"):
        found.append(Serve("transformers", f"transformers serve {path}{option}"))
    if not found:
        dense = "../dense" if directory == "." else shlex.quote(f"{directory.rstrip('/')}-dense")
        reason = next(iter(notes.values()))[0]
        command = f"alphaquant export {path} --format dense -o {dense} && vllm serve {dense}{option}"
        found.append(Serve("any engine, de-quantized", command, f"no engine takes this mix as it is: {reason}"))
    return found
