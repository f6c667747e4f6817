"""Where a run stands, from what it has written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alphaquant.errors import OutputError
from alphaquant.pipeline.manifest import MANIFEST, Manifest
from alphaquant.pipeline.staging import holder, staging_of

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["RunStatus", "run_status"]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Where a run stands.

    Attributes:
        state: `complete`, `running` or `stopped`.
        directory: where its files are.
        done: shards that are committed: one a layer, and one for embedding and head.
        total: shards that there will be.
        num_bytes: bytes of the committed shards.
        seconds: time spent on them, in all starts.
        since_commit: seconds since the last commit.
        starts: how often it was started.
        pid: the process that is at work, if one is.
        command: how it was started last.
    """

    state: str
    directory: str
    done: int
    total: int
    num_bytes: int
    seconds: float
    since_commit: float
    starts: int
    pid: int | None
    command: str

    @property
    def seconds_left(self) -> float | None:
        """What is left at the pace so far; None before the first commit and after the last."""
        return self.seconds / self.done * (self.total - self.done) if 0 < self.done < self.total else None


def run_status(path: Path) -> RunStatus:
    """Where the run that makes, or made, a directory stands.

    Raises:
        OutputError: there is none.
        CheckpointError: its manifest is damaged.
    """
    staging = staging_of(path)
    for directory in (staging, path):
        manifest = Manifest.read(directory)
        if manifest is None:
            continue
        pid = holder(staging)
        stopped = "stopped" if pid is None else "running"
        return RunStatus(
            state="complete" if directory is path else stopped,
            directory=str(directory),
            done=len(manifest.shards),
            total=manifest.num_shards,
            num_bytes=sum(shard.num_bytes for shard in manifest.shards),
            seconds=manifest.seconds.get("total", 0.0),
            since_commit=time.time() - (directory / MANIFEST).stat().st_mtime,
            starts=len(manifest.sessions),
            pid=pid,
            command=manifest.sessions[-1].get("command", "") if manifest.sessions else "",
        )
    raise OutputError(f"there is no run at {path}", where=str(staging), remedy="give the -o of `alphaquant quantize`")
