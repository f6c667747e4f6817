"""A directory held against what its run wrote down: every file by its hash, every module by the hash of its codes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from alphaquant.checkpoint import Checkpoint
from alphaquant.errors import AlphaQuantError, CheckpointError
from alphaquant.layouts import QuantizedCheckpoint, open_source
from alphaquant.models import detect, logical
from alphaquant.pipeline import FOLDER, check_shards

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Difference", "Stored", "check_stored"]


class Difference(NamedTuple):
    """A file, by its path in the directory, or a module, and what of it is not as it was written."""

    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Stored:
    """What a look at a directory found.

    Attributes:
        problems: what differs from what was written, by file or module; empty when all is well.
        layout: its layout; None where it does not open.
        modules: quantized modules whose codes were held against the run's.
        uncompared: quantized modules of which the run noted no hash.
    """

    problems: tuple[Difference, ...]
    layout: str | None
    modules: int
    uncompared: int


def check_stored(directory: Path) -> Stored:
    """Hash every file, read every module back by its layout and hold its codes against those of the run, bit for bit.

    A dense directory keeps no codes: its files alone are held.

    Raises:
        CheckpointError: the directory has no manifest, or it cannot be read.
    """
    problems = [Difference(*problem) for problem in check_shards(directory)]
    try:
        source = open_source(directory)
        logical(source, detect(source.config, str(directory / "config.json")))
    except AlphaQuantError as error:
        return Stored((*problems, Difference(error.where or str(directory), error.what)), None, 0, 0)
    if not isinstance(source, QuantizedCheckpoint):
        layout = "dense" if isinstance(source, Checkpoint) else None
        return Stored(tuple(problems), layout, 0, 0)
    noted: dict[str, str] = {}
    try:
        noted = dict(_noted(directory))
    except CheckpointError as error:
        problems.append(Difference(error.where or str(directory), error.what))
    else:
        problems += [
            Difference(name, "the run quantized it, and it is stored as it was")
            for name in noted - source.modules.keys()
        ]
    found, uncompared = 0, 0
    for name in source.modules:
        if not noted.get(name):
            uncompared += 1
            continue
        found += 1
        try:
            same = source.read_quantized(name).sha256() == noted[name]
        except CheckpointError as error:
            problems.append(Difference(name, error.what))
            continue
        if not same:
            problems.append(Difference(name, "its codes or scales are not those of the run"))
    return Stored(tuple(problems), source.layout.name, found, uncompared)


def _noted(directory: Path) -> Iterator[tuple[str, str]]:
    """The hash of every module's codes in the records of the run."""
    for path in sorted((directory / FOLDER / "records").glob("*.json")):
        yield from _noted_in(path, str(path.relative_to(directory)))


def _noted_in(path: Path, name: str) -> list[tuple[str, str]]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return [(module["name"], module.get("sha256", "")) for module in record["modules"]]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the record cannot be used: {error}", where=name, remedy="restore the file") from error
