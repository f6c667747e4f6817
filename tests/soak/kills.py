"""Kills runs, lets each go on, and holds what it leaves against a run that nobody killed.

    python tests/soak/kills.py                  at every touch of the disk, and at 40 random instants
    python tests/soak/kills.py --points 4 --instants 2

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
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alphaquant.pipeline import check_shards, run_status
from alphaquant.pipeline.manifest import Manifest
from alphaquant.pipeline.staging import staging_of
from alphaquant.solver import Effort, Recipe
from pipeline import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# what a run is not a function of: when, how long, in how many starts
_PASSING = ("report.json", "manifest.json")


class Job(NamedTuple):
    """A run that is killed: everything but where it writes."""

    model: Path
    text: Path

    def __call__(self, out: Path) -> None:
        tiny.quantize(self.model, out, tiny.SERVED_PLAN, self.text, num_samples=8, recipe=Recipe(effort=Effort.FAST))


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


def start(job: Job, out: Path, kill_at: int | None = None, counted: Path | None = None) -> int:
    """Fork a child that runs the job, and dies at its n-th point; returns its number."""
    child = os.fork()
    if child:
        return child
    seen: list[str] = []

    def reached(what: str) -> None:
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(what)

    try:
        with points(reached):
            job(out)
        if counted is not None:
            counted.write_text(json.dumps(seen))
        os._exit(0)
    except BaseException:  # noqa: BLE001  (a child must never return into its parent's code)
        traceback.print_exc()
        os._exit(1)


def wait(child: int) -> bool:
    """Whether a child ended well; False where it was killed.

    Raises:
        AssertionError: it failed by itself.
    """
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"a run failed with {status}"
    return status == 0


def result_of(out: Path) -> dict[str, bytes]:
    """The bytes of everything that a run is a function of nothing but its inputs for."""
    files = {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.name not in (*_PASSING, "lock")}


def committed(out: Path) -> int:
    """The shards that a killed run has committed."""
    manifest = Manifest.read(staging_of(out))
    return 0 if manifest is None else len(manifest.shards)


def go_on(job: Job, out: Path, expected: dict[str, bytes]) -> None:
    """Let a killed run end, and check that no layer was lost, no byte differs, and nothing is left behind.

    Raises:
        AssertionError: one of them.
    """
    if not out.exists():
        done = committed(out)
        assert wait(start(job, out)), "it was not killed this time"
        report = json.loads((out / "alphaquant/report.json").read_text())
        assert report["sessions"][-1]["from_shard"] == done, f"{done} shards were committed: {report['sessions']}"
        assert {path.name for path in out.parent.iterdir()} == {out.name}
    found = result_of(out)
    assert found.keys() == expected.keys()
    differing = [name for name in found if found[name] != expected[name]]
    assert not differing, f"other bytes: {differing}"
    assert check_shards(out) == []
    assert run_status(out).state == "complete"


def main(num_points: int | None, num_instants: int, seed: int = 0) -> dict[str, float]:
    """Kill at so many points, evenly spread (None: at all of them), and at so many random instants."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = Job(tiny.write_model(folder / "model"), tiny.write_text(folder / "text", 1000))
        begin = time.perf_counter()
        assert wait(start(job, folder / "whole/out", counted=folder / "points.json"))
        seconds = time.perf_counter() - begin
        expected = result_of(folder / "whole/out")
        seen = json.loads((folder / "points.json").read_text())
        chosen = range(len(seen)) if num_points is None else [k * len(seen) // num_points for k in range(num_points)]
        for point in chosen:
            out = folder / f"point-{point}" / "out"
            assert not wait(start(job, out, kill_at=point)), f"point {point} was not reached"
            go_on(job, out, expected)
            shutil.rmtree(out.parent)
        kills = len(chosen)
        for instant in range(num_instants):
            out = folder / f"instant-{instant}" / "out"
            wanted, struck = rng.choice((1, 1, 2, 3)), 0
            while struck < wanted and not (struck and out.exists()):
                child = start(job, out)
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
                if not wait(child):
                    struck += 1
                elif struck:
                    break
                else:  # it was done by then, being faster than the first run was: once more, and earlier
                    shutil.rmtree(out.parent)
                    seconds *= 0.8
            kills += struck
            go_on(job, out, expected)
            shutil.rmtree(out.parent)
    return {"points": len(seen), "kills": kills, "seconds": round(time.perf_counter() - begin, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, help="kills at so many touches of the disk; by default at each")
    parser.add_argument("--instants", type=int, default=40, help="kills at so many random instants")
    parser.add_argument("--seed", type=int, default=0, help="draws the instants")
    given = parser.parse_args()
    sys.stdout.write(json.dumps(main(given.points, given.instants, given.seed)) + "\n")
