"""Kills runs, lets each go on, and holds what it leaves against a run that nobody killed.

    python tests/soak/kills.py                  at every touch of the disk, and at 40 random instants
    python tests/soak/kills.py --points 4 --instants 2
    python tests/soak/kills.py --processes 2    of a team, now the one and now the other

A child is forked for every run, so that a kill costs no import. It dies by SIGKILL: by its own hand before or after the
n-th write, sync, rename or removal, or by its parent's hand at some instant.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alphaquant.pipeline import check_shards, run_status, stream
from alphaquant.pipeline.manifest import Manifest
from alphaquant.pipeline.staging import staging_of
from alphaquant.solver import Effort, Recipe
from pipeline import tiny
from soak.forks import result_of, start, wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from alphaquant.pipeline.distributed import Team


class Job(NamedTuple):
    """A run that is killed: everything but where it writes."""

    model: Path
    text: Path

    def __call__(self, out: Path, team: Team) -> None:
        tiny.quantize(
            self.model, out, tiny.SERVED_PLAN, self.text, num_samples=8, recipe=Recipe(effort=Effort.FAST), team=team
        )


@contextmanager
def points(reached: Callable[[str], None]) -> Iterator[None]:
    """Call `reached` at every moment between two changes of the disk that a process makes."""
    originals = [(Path, name, getattr(Path, name)) for name in ("open", "replace", "rename", "unlink")]
    originals += [(os, "fsync", os.fsync), (shutil, "rmtree", shutil.rmtree)]

    def watched(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args, **options):  # a function, so that it becomes a method of Path
            if name == "open" and "w" not in (args[1:2] or ("",))[0]:
                return original(*args, **options)
            if name != "fsync":  # what comes before it was reached already
                reached(f"before {name} {args[0]}")
            result = original(*args, **options)
            reached(f"after {name} {args[0]}")
            return result

        return call

    for owner, name, original in originals:
        setattr(owner, name, watched(name, original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


class Runs(NamedTuple):
    """How runs of a job are started: by so many processes."""

    job: Job
    processes: int

    def start(self, out: Path, kill_at: int | None = None, counted: Path | None = None) -> list[int]:
        """Start a run whose first process, which writes, dies at its n-th point."""

        def work(team: Team) -> None:
            seen: list[str] = []

            def reached(what: str) -> None:
                if len(seen) == kill_at and team.rank == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen.append(what)

            # few tokens a chunk, so that there are turns to take
            stream.CHUNK_TOKENS = 64
            with points(reached):
                self.job(out, team)
            if counted is not None and team.rank == 0:
                counted.write_text(json.dumps(seen))

        return start(work, self.processes)

    def ends(self, out: Path, kill_at: int | None = None, counted: Path | None = None) -> bool:
        """Whether a run ends well; False where it was killed."""
        return not any(wait(self.start(out, kill_at, counted)))


def committed(out: Path) -> int:
    """The shards that a killed run has committed."""
    manifest = Manifest.read(staging_of(out))
    return 0 if manifest is None else len(manifest.shards)


def go_on(runs: Runs, out: Path, expected: dict[str, bytes]) -> None:
    """Let a killed run end, and check that no layer was lost, no byte differs, and nothing is left behind.

    Raises:
        AssertionError: one of them.
    """
    is_whole = out.exists()
    done = 0 if is_whole else committed(out)
    before = (out / "alphaquant/report.json").read_bytes() if is_whole else b""
    assert runs.ends(out), "it was not killed this time"
    after = (out / "alphaquant/report.json").read_bytes()
    if is_whole:
        assert after == before, "it was made again"
    else:
        sessions = json.loads(after)["sessions"]
        assert sessions[-1]["from_shard"] == done, f"{done} shards were committed: {sessions}"
    assert {path.name for path in out.parent.iterdir()} == {out.name}
    assert not (out / "alphaquant/lock").exists()
    found = result_of(out)
    assert found.keys() == expected.keys()
    differing = [name for name in found if found[name] != expected[name]]
    assert not differing, f"other bytes: {differing}"
    assert check_shards(out) == []
    assert run_status(out).state == "complete"


def main(num_points: int | None, num_instants: int, seed: int = 0, processes: int = 1) -> dict[str, float]:
    """Kill at so many points, evenly spread (None: at all of them), and at so many random instants."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs = Runs(Job(tiny.write_model(folder / "model"), tiny.write_text(folder / "text", 1000)), processes)
        # a team is held against one process, and may go on as another number of them
        successors = [runs._replace(processes=number) for number in range(1, processes + 1)]
        begin = time.perf_counter()
        assert successors[0].ends(folder / "whole/out", counted=folder / "points.json")
        seconds = time.perf_counter() - begin
        expected = result_of(folder / "whole/out")
        seen = json.loads((folder / "points.json").read_text())
        chosen = range(len(seen)) if num_points is None else [k * len(seen) // num_points for k in range(num_points)]
        for point in chosen:
            out = folder / f"point-{point}" / "out"
            assert not runs.ends(out, kill_at=point), f"point {point} was not reached"
            go_on(successors[point % processes], out, expected)
            shutil.rmtree(out.parent)
        kills = len(chosen)
        for instant in range(num_instants):
            out = folder / f"instant-{instant}" / "out"
            wanted, struck = rng.choice((1, 1, 2, 3)), 0
            while struck < wanted and not (struck and out.exists()):
                children = runs.start(out)
                time.sleep(rng.uniform(0, seconds))
                os.kill(rng.choice(children), signal.SIGKILL)
                if any(wait(children)):
                    struck += 1
                elif struck:
                    break
                else:  # it was done by then, being faster than the first run was: once more, and earlier
                    shutil.rmtree(out.parent)
                    seconds *= 0.8
            kills += struck
            go_on(successors[instant % processes], out, expected)
            shutil.rmtree(out.parent)
    return {"points": len(seen), "kills": kills, "seconds": round(time.perf_counter() - begin, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, help="kills at so many touches of the disk; by default at each")
    parser.add_argument("--instants", type=int, default=40, help="kills at so many random instants")
    parser.add_argument("--seed", type=int, default=0, help="draws the instants")
    parser.add_argument("--processes", type=int, default=1, help="processes of a run")
    given = parser.parse_args()
    sys.stdout.write(json.dumps(main(given.points, given.instants, given.seed, given.processes)) + "\n")
