"""The manifest of an output directory: what the run is a function of, and the hash of everything that it wrote.

A layer counts as done from the moment at which the manifest that names it is renamed into place.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from alphaquant.checkpoint import ShardInfo, write_json
from alphaquant.errors import CheckpointError, OutputError
from alphaquant.pipeline.staging import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MANIFEST", "Manifest", "Problem", "check_files", "check_shards", "file_sha256"]

MANIFEST = f"{FOLDER}/manifest.json"
_MAX_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What is known of an output directory.

    Attributes:
        num_shards: the shards that it has when it is complete.
        identity: all that bears on the result; empty for a directory that was converted from another.
        sessions: each start of the run: when, on what device, with how many threads, from which shard on.
        shards: the shards that are done, in order.
        files: sha256 of every other file, by its path in the directory.
        stream: the file of the activations behind the last shard; None in a complete directory.
        seconds: time by phase, of all sessions.
    """

    num_shards: int
    identity: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    shards: list[ShardInfo] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    stream: ShardInfo | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    version: int = 1

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The manifest of a directory; None where it has none.

        Raises:
            CheckpointError: it cannot be read, or is no manifest.
        """
        path = directory / MANIFEST
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise _unusable(path, f"it has more than {_MAX_BYTES} bytes")
            manifest = TypeAdapter(cls).validate_python(from_json(path.read_bytes()))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(path, error.strerror or str(error)) from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise _unusable(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except ValueError as error:
            raise _unusable(path, str(error)) from error
        for name in manifest.file_names:
            if not _is_inside(name):
                raise _unusable(path, f"{name!r} is no file of this directory")
        return manifest

    @property
    def file_names(self) -> list[str]:
        """Every file that it names, by path in the directory."""
        stream = [] if self.stream is None else [self.stream.name]
        return [*(shard.name for shard in self.shards), *stream, *self.files]

    def write(self, directory: Path) -> None:
        """Put it in place, whole.

        Raises:
            OutputError: it cannot be written.
        """
        write_json(directory / MANIFEST, asdict(self))

    def with_shard(self, shard: ShardInfo, **changes: Any) -> Manifest:
        """The manifest after one more shard."""
        return replace(self, shards=[*self.shards, shard], **changes)

    @property
    def is_complete(self) -> bool:
        """Whether it is of a run, and all its shards are there."""
        return bool(self.identity) and len(self.shards) == self.num_shards

    def differences(self, identity: dict[str, Any]) -> list[str]:
        """What the run is a function of, and what is something else in `identity`."""
        return _differences("", self.identity, identity)

    def require_same(self, identity: dict[str, Any], where: Path) -> None:
        """The unfinished run is a function of the same things.

        Raises:
            OutputError: names what differs.
        """
        differences = self.differences(identity)
        if differences:
            raise OutputError(
                f"the unfinished run was started otherwise: {'; '.join(differences[:5])}",
                where=str(where),
                remedy="give the options and files of that run to go on with it; --fresh drops it and starts anew",
            )


class Problem(NamedTuple):
    """A file of an output directory, by its path in it, and what is wrong with it."""

    file: str
    what: str


def check_shards(directory: Path) -> list[Problem]:
    """Hash every file that a run wrote and name those that are missing or differ; an empty list when all is well.

    Raises:
        CheckpointError: the directory has no manifest, or it cannot be read.
    """
    manifest = Manifest.read(directory)
    if manifest is None:
        raise CheckpointError(
            "there is no manifest", where=str(directory / MANIFEST), remedy="give a directory that alphaquant made"
        )
    done = len(manifest.shards)
    unfinished = [] if done == manifest.num_shards else [f"{done} of {manifest.num_shards} shards are done"]
    return [*(Problem(MANIFEST, what) for what in unfinished), *check_files(directory, manifest)]


def check_files(directory: Path, manifest: Manifest) -> list[Problem]:
    """Hash every file that a manifest names, of a run that may be unfinished; see `check_shards`."""
    problems = []
    for shard in manifest.shards:
        problems += _check_file(directory, shard.name, shard.sha256, shard.num_bytes)
    for name, sha256 in manifest.files.items():
        problems += _check_file(directory, name, sha256)
    return problems


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _check_file(directory: Path, name: str, sha256: str, num_bytes: int | None = None) -> list[Problem]:
    path = directory / name
    try:
        found = path.stat().st_size
        if num_bytes is not None and found != num_bytes:
            return [Problem(name, f"it has {found} bytes, and {num_bytes} were written")]
        if file_sha256(path) != sha256:
            return [Problem(name, "its content is not what was written")]
    except OSError as error:
        return [Problem(name, f"it cannot be read: {error.strerror or error}")]
    return []


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and bool(path.parts)


def _differences(name: str, there: Any, here: Any) -> list[str]:
    """Where two objects of JSON differ, by dotted name."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in sorted(there.keys() | here.keys()):
            found += _differences(f"{name}.{key}" if name else key, there.get(key), here.get(key))
        return found
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        return [line for index, (a, b) in pairs for line in _differences(f"{name}[{index}]", a, b)]
    return [] if there == here else [f"{name} was {_short(there)} and is {_short(here)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unusable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"the manifest cannot be used: {why}",
        where=str(path),
        remedy="restore the file; an unfinished run is dropped and started anew with --fresh",
    )
