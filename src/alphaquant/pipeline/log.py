"""A log of a run for machines: one line of JSON an event, on the disk before the run goes on."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

from alphaquant.errors import AlphaQuantError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Log", "json_log", "unlogged"]


class Log(Protocol):
    """Told what happens in a run."""

    def __call__(self, event: str, **facts: Any) -> None:
        """Called when it has happened; facts are JSON."""


def unlogged(event: str, **facts: Any) -> None:
    """Log nothing."""


@contextmanager
def json_log(path: Path | None) -> Iterator[Log]:
    """A log that appends to a file, so that the starts of one run follow each other; None logs nothing.

    An error of ours is the last event.

    Raises:
        OutputError: the file cannot be opened.
    """
    if path is None:
        yield unlogged
        return
    try:
        # unbuffered and at the end, so that several processes can write to one file
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise OutputError(
            f"the log cannot be written: {error.strerror}", where=str(path), remedy="give another file to --log-json"
        ) from error

    def log(event: str, **facts: Any) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, "pid": os.getpid(), **facts}
        try:
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise OutputError(
                f"the log cannot be written: {error.strerror}", where=str(path), remedy="free space, and go on"
            ) from error

    with file:
        try:
            yield log
        except AlphaQuantError as error:
            log("error", what=error.what, where=error.where, remedy=error.remedy, kept=error.kept)
            raise
