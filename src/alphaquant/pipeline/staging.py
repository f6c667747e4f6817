"""The directory beside an output in which it is made: locked, kept while it holds work, moved to its name at the end.

So a directory of the final name is always whole, and a run that is stopped goes on from what its staging directory
holds. The lock is the system's: it goes with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from alphaquant.checkpoint import sync_directory
from alphaquant.errors import AlphaQuantError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["FOLDER", "check_output", "check_writable", "holder", "is_untidy", "staged", "staging_of", "tidy"]

FOLDER = "alphaquant"
_LOCK = f"{FOLDER}/lock"
_PATIENCE = 0.05  # seconds; `holder` takes the lock for an instant


def check_output(path: Path, source: Path | None, *, overwrite: bool) -> None:
    """Refuse an output path that cannot or should not be written, before any work is done.

    `source` is the model's own directory, where it has one.

    Raises:
        OutputError: it holds something else, is the source itself, or cannot be written.
    """
    try:
        target, model = path.resolve(), source and source.resolve()
        if model is not None and (target == model or target in model.parents or model in target.parents):
            raise OutputError(f"{path} is, holds or lies in the model itself", remedy="choose another output")
        if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(
                f"{path} already exists and is not empty", remedy="choose another output, or pass --overwrite"
            )
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links, a directory that may not be read
        raise OutputError(f"{path} cannot be written: {error}", remedy="choose another output") from error
    check_writable(path)


def check_writable(path: Path) -> None:
    """Refuse a path at which neither a file nor a directory can be made, before any work is done.

    Raises:
        OutputError: names the directory that is in the way.
    """
    try:
        parent = next(p for p in path.resolve().parents if p.exists())
        path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise OutputError(f"{path} cannot be written: {error}", remedy="choose another output") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "may not be written to" if parent.is_dir() else "is no directory"
        raise OutputError(f"{path} cannot be written: {parent} {why}", remedy="choose another output")


def staging_of(path: Path) -> Path:
    """Where an output is made."""
    target = path.resolve()
    return target.with_name(f".{target.name}.partial")


def holder(staging: Path) -> int | None:
    """The process that is working in a staging directory on this machine; None where there is none."""
    with suppress(OSError), (staging / _LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _pid(file)
    return None


@contextmanager
def staged(
    path: Path, *, is_kept: Callable[[Path], bool], moves: Callable[[], bool] = lambda: True, fresh: bool = False
) -> Iterator[Path]:
    """A locked directory that becomes `path` when the block ends well and `moves` says so.

    Where it does not, the directory stays if `is_kept` says that it holds work, and vanishes with all that was made
    for it if not. What an earlier run left in it is there; `fresh` drops that.

    Raises:
        OutputError: another process works in it, or it cannot be made or moved.
    """
    target, staging = path.resolve(), staging_of(path)
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        lock = _locked(staging, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be made: {error.strerror}", remedy="choose another -o") from error
    with lock:
        try:
            if fresh:
                _empty(staging)
            yield staging
            if moves():
                _publish(staging, target)
            elif not is_kept(staging):
                shutil.rmtree(staging, ignore_errors=True)
        except BaseException as error:
            if is_kept(staging):
                if isinstance(error, AlphaQuantError):
                    error.kept = f"what was done is kept in {staging}: the same command goes on, --fresh starts anew"
                raise
            shutil.rmtree(staging, ignore_errors=True)
            with suppress(OSError):  # someone else may have put something there by now
                for parent in new_parents:
                    parent.rmdir()
            raise


def _locked(staging: Path, path: Path) -> TextIO:
    """The lock file of a staging directory, which is made if need be."""
    for patience in (_PATIENCE, _PATIENCE, None):
        (staging / FOLDER).mkdir(parents=True, exist_ok=True)
        file = (staging / _LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the run that held it may have moved or dropped the directory meanwhile
            if os.path.samestat(os.fstat(file.fileno()), (staging / _LOCK).stat()):
                break
        except BlockingIOError:
            if patience is None:
                raise _occupied(file, staging, path) from None
        except FileNotFoundError:
            pass
        file.close()
        time.sleep(patience or 0)
    else:
        raise OutputError(f"{path} is being made and moved", remedy="try again")
    sync_directory(staging.parent)
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    file.flush()
    return file


def _occupied(file: TextIO, staging: Path, path: Path) -> OutputError:
    pid = _pid(file)
    file.close()
    return OutputError(
        f"another run is making {path}" + (f": process {pid}" if pid is not None else ""),
        where=str(staging),
        remedy="wait for it, stop it, or choose another output",
    )


def _pid(file: TextIO) -> int | None:
    try:
        file.seek(0)
        pid = json.loads(file.read(1000))["pid"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # just being written
        return None
    return pid if isinstance(pid, int) else None


def _empty(staging: Path) -> None:
    """Remove everything but the lock."""
    try:
        for entry in [*staging.iterdir(), *(staging / FOLDER).iterdir()]:
            if entry.name in (FOLDER, "lock"):
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except OSError as error:
        raise OutputError(
            f"the unfinished run cannot be dropped: {error.strerror}", where=str(staging), remedy="remove it by hand"
        ) from error


def _publish(staging: Path, target: Path) -> None:
    """Move the finished directory to its name; what was there before goes only after that worked."""
    old = _old(target)
    try:
        if target.exists():
            _remove(old)
            target.rename(old)
        try:
            staging.rename(target)
        except BaseException:
            if not target.exists() and old.exists():
                old.rename(target)
            raise
        sync_directory(target.parent)
        tidy(target)
    except OSError as error:
        raise OutputError(
            f"the result cannot be moved to {target}: {error.strerror}", remedy="choose another output"
        ) from error


def tidy(target: Path) -> None:
    """Remove what is of no use beside and in a finished directory; the lock last, which says that there was something.

    What was there before may be of this run, or of one that was killed between two moves.
    """
    _remove(_old(target))
    (target / _LOCK).unlink(missing_ok=True)


def is_untidy(target: Path) -> bool:
    """Whether the run that made a directory was killed between moving and tidying it."""
    return (target.resolve() / _LOCK).exists()


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
