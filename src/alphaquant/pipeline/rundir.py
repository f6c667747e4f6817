"""The output directory in the making: shards are committed one by one, then it is finished.

A commit is a shard, its record and the activations behind it, each whole on the disk before the manifest that names
them takes the place of the one before. What a killed run left half-made is written over.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from alphaquant.checkpoint import (
    SIDE_FILES,
    ShardInfo,
    Slot,
    copy_file,
    load_shard,
    write_bytes,
    write_index,
    write_json,
    write_shard,
    write_text,
)
from alphaquant.engines import nameless_scheme
from alphaquant.errors import AlphaQuantError, CheckpointError, OutputError
from alphaquant.layouts import module_table
from alphaquant.pipeline.card import CARD, card, heritage
from alphaquant.pipeline.manifest import MANIFEST, Manifest, check_files, file_sha256
from alphaquant.pipeline.staging import (
    FOLDER,
    check_output,
    check_writable,
    is_untidy,
    staged,
    staging_of,
    tidy,
)
from alphaquant.pipeline.stream import HeldStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.layouts import Layout
    from alphaquant.models import ModelSpec
    from alphaquant.pipeline.stream import Stream

__all__ = ["FOLDER", "RunDir", "check_output", "check_run_output", "check_writable"]

_STREAM = f"{FOLDER}/stream"


def check_run_output(
    path: Path,
    source: Path | None,
    *,
    overwrite: bool,
    fresh: bool,
    identity: Callable[[], dict[str, Any]] = dict,
) -> None:
    """As `check_output`, but what this very run has finished may be there; see `RunDir.find_ended`.

    Args:
        path: the directory to make.
        source: the model's own directory, where it has one.
        overwrite: what is there may be replaced.
        fresh: what is there is never taken for the result.
        identity: what is known so far of all that bears on the result.

    Raises:
        OutputError: it cannot be the output of this run.
    """
    ended = None if overwrite or fresh else _finished(path)
    check_output(path, source, overwrite=overwrite or ended is not None)
    if ended is not None:
        _require_same(path, ended, ended.identity | identity())


class RunDir:
    """A checkpoint directory in the making, or one that was made.

    Attributes:
        path: where its files are.
        manifest: what is known of them.
        has_ended: whether it was made by an earlier start of this run.
    """

    def __init__(self, path: Path, num_shards: int) -> None:
        self.path = path
        self.manifest = Manifest(num_shards)
        self.has_ended = False

    @classmethod
    @contextmanager
    def create(cls, path: Path, num_shards: int, *, resumes: bool = False, fresh: bool = False) -> Iterator[RunDir]:
        """A locked run directory that becomes `path` when the block ends well.

        Where it does not, the directory is kept for another run if something was committed, and vanishes if not.

        Args:
            path: the directory to make.
            num_shards: shards that it has when it is complete.
            resumes: what an unfinished run has left may be there; `start` goes on with it.
            fresh: drop what an unfinished run has left.

        Raises:
            OutputError: another run is making it, an unfinished one would be lost, or it cannot be made or moved.
        """
        staging = staging_of(path)
        if not resumes and _is_kept(staging):
            raise OutputError(
                f"an unfinished run of {path} would be lost",
                where=str(staging),
                remedy="end it with its own command first, remove it, or choose another output",
            )
        run = cls(staging, num_shards)
        with staged(path, is_kept=_is_kept, moves=lambda: not run.has_ended, fresh=fresh):
            yield run

    def find_ended(self, target: Path, identity: dict[str, Any], *, overwrite: bool) -> bool:
        """Whether the run ended already, and was killed at most while it tidied up, which is done now.

        To `overwrite` is to make it again, unless it was killed so.

        Args:
            target: the directory to make.
            identity: all that bears on the result, as JSON.
            overwrite: what is there may be replaced.

        Raises:
            OutputError: another run made what is there, or it is damaged.
        """
        manifest = _finished(target)
        if manifest is None or (overwrite and not is_untidy(target)):
            return False
        if overwrite and manifest.differences(identity):
            return False
        _require_same(target, manifest, identity)
        problems = check_files(target, manifest)
        if problems and overwrite:
            return False
        if problems:
            raise OutputError(
                f"the run has ended, and a file of it is damaged since: {problems[0].what}",
                where=str(target / problems[0].file),
                remedy="restore the file, or make all of it again with --overwrite",
            )
        tidy(target.resolve())
        self.path, self.manifest, self.has_ended = target, manifest, True
        return True

    def start(self, identity: dict[str, Any], session: dict[str, Any]) -> None:
        """Begin a run that can go on after it was stopped, or go on with the one that was.

        Args:
            identity: all that bears on the result, as JSON.
            session: what is recorded of this start, beside the shard from which it goes on.

        Raises:
            OutputError: the unfinished run is another, or its files are damaged.
        """
        found = Manifest.read(self.path)
        if found is not None and found.shards:
            found.require_same(identity, self.path)
            self.manifest = found
            problems = check_files(self.path, found)
            if problems:
                raise OutputError(
                    f"a file of the unfinished run is damaged: {problems[0].what}",
                    where=str(self.path / problems[0].file),
                    remedy="restore the file to go on; --fresh drops the run and starts anew",
                )
        self._tidy()
        sessions = [*self.manifest.sessions, session | {"from_shard": len(self.shards)}]
        self.manifest = replace(self.manifest, identity=identity, sessions=sessions)
        self.manifest.write(self.path)

    @property
    def shards(self) -> list[ShardInfo]:
        """The shards so far."""
        return self.manifest.shards

    @property
    def num_bytes(self) -> int:
        """The bytes of the shards so far."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def tensor_names(self) -> set[str]:
        """The tensors written so far."""
        return {name for shard in self.shards for name in shard.tensor_names}

    def add_shard(self, tensors: Mapping[str, Tensor]) -> ShardInfo:
        """Write the next shard."""
        name = f"model-{len(self.shards) + 1:05d}-of-{self.manifest.num_shards:05d}.safetensors"
        shard = write_shard(self.path / name, tensors, {"format": "pt"})
        self.manifest = self.manifest.with_shard(shard)
        return shard

    def copy_shard(self, source: Path, shard: ShardInfo) -> None:
        """Take the next shard over from another output as it is, with the hash of what was written there.

        Raises:
            CheckpointError: the file is missing, or is not as long as it was.
        """
        path = source / shard.name
        copy_file(path, self.path / shard.name)
        found = (self.path / shard.name).stat().st_size
        if found != shard.num_bytes:
            raise CheckpointError(
                f"the shard has {found} bytes, and {shard.num_bytes} were written",
                where=str(path),
                remedy="restore the file; `alphaquant verify` tells what else is damaged",
            )
        self.manifest = self.manifest.with_shard(shard)

    def write_note(self, name: str, content: Any) -> None:
        """Write a JSON file of ours, in the folder `alphaquant`."""
        target = self.path / FOLDER / name
        target.parent.mkdir(exist_ok=True)
        self._list(f"{FOLDER}/{name}", write_json(target, content))

    def read_note(self, name: str) -> dict[str, Any]:
        """A JSON file of ours, which `start` has found undamaged."""
        content: dict[str, Any] = json.loads((self.path / FOLDER / name).read_text(encoding="utf-8"))
        return content

    def commit(self, streams: Mapping[str, Stream], seconds: Mapping[str, float], **session: Any) -> None:
        """Make the last shard and the notes so far count: a run that is stopped goes on behind them.

        Args:
            streams: everything that the next layer takes from this one, by name, such as the activations.
            seconds: time by phase, of all sessions.
            session: what is added to the record of this start.
        """
        before = self.manifest.stream
        stream = None
        if streams:
            path = self.path / _STREAM / f"behind-{len(self.shards):05d}.safetensors"
            path.parent.mkdir(exist_ok=True)
            held = [s for s in streams.values() if isinstance(s, HeldStream)]

            def release() -> None:
                for one in held:
                    one.release()

            rows = {name: s.rows_NLD if isinstance(s, HeldStream) else s for name, s in streams.items()}
            stream = write_shard(path, rows, {}, release)
        *earlier, last = self.manifest.sessions
        self.manifest = replace(
            self.manifest, stream=stream, seconds=dict(seconds), sessions=[*earlier, last | session]
        )
        self.manifest.write(self.path)
        if before is not None:
            (self.path / _STREAM / before.name).unlink(missing_ok=True)

    def open_streams(self) -> dict[str, Slot]:
        """Where in the file of the last commit lies what it kept for the next layer.

        Raises:
            OutputError: the file is missing or damaged.
        """
        stream = self.manifest.stream
        if stream is None:
            return {}
        path = self.path / _STREAM / stream.name
        try:
            if file_sha256(path) == stream.sha256:
                return load_shard(path).slots
            why = "its content is not what was written"
        except (OSError, CheckpointError) as error:
            why = str(error)
        raise OutputError(
            f"the activations of the unfinished run cannot be used: {why}",
            where=str(path),
            remedy="restore the file to go on; --fresh drops the run and starts anew",
        )

    def finish(
        self,
        config: Mapping[str, Any],
        source: Path | None,
        spec: ModelSpec,
        layout: Layout,
        schemes: Mapping[str, Scheme | None],
    ) -> None:
        """Write what tells readers of the shards: index, manifest, module table, config.json and the model card.

        Tokenizer and generation settings of `source` are taken along, where there is one.
        """
        modules = {module.name: module for module in spec.modules()}
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        # named, so that no pattern for a layer's modules takes them for its own
        carried = {name.removesuffix(".weight"): None for name in sorted(self.tensor_names) if spec.is_carried(name)}
        named = {**schemes, **carried, **nameless_scheme(schemes, list(modules.values()), spec.family)}
        quantization = layout.quantization_config(named, {name: m.kind for name, m in modules.items()})
        if quantization is None:
            config |= {"dtype": str(spec.dtype).removeprefix("torch.")}
        else:
            config |= {"quantization_config": quantization}
            shapes = {name: (m.out_features, m.in_features) for name, m in modules.items()}
            self.write_note("modules.json", module_table(schemes, shapes, layout.name))
        weight_map = {name: shard.name for shard in self.shards for name in shard.tensor_names}
        index = "model.safetensors.index.json"
        self._list(index, write_index(self.path / index, weight_map, self.num_bytes))
        for name in (*SIDE_FILES, *_code_files(config, source)):
            if source is not None and (source / name).is_file():
                self._list(name, write_bytes(self.path / name, (source / name).read_bytes()))
        self._list("config.json", write_json(self.path / "config.json", config, allow_nan=True))
        text = card(self.path, config, spec, layout, schemes, self.num_bytes, heritage(source))
        self._list(CARD, write_text(self.path / CARD, text))
        self.manifest.write(self.path)
        shutil.rmtree(self.path / _STREAM, ignore_errors=True)

    def _tidy(self) -> None:
        """Remove what a killed run left half-made, and activations that are no longer needed."""
        kept = None if self.manifest.stream is None else self.manifest.stream.name
        stale = [path for path in (self.path / _STREAM).glob("*") if path.name != kept]
        for path in [*self.path.rglob("*.tmp"), *stale]:
            path.unlink(missing_ok=True)

    def _list(self, name: str, sha256: str) -> None:
        self.manifest = replace(self.manifest, files=self.manifest.files | {name: sha256})


def _code_files(config: Mapping[str, Any], source: Path | None) -> list[str]:
    """Code that engines ask for where config.json names classes of its own: carried along, never run here."""
    return [] if source is None or "auto_map" not in config else sorted(path.name for path in source.glob("*.py"))


def _finished(path: Path) -> Manifest | None:
    """The manifest of a directory that a run has finished; None where there is none."""
    try:
        manifest = Manifest.read(path) if path.is_dir() else None
    except (OSError, AlphaQuantError):  # whatever it is, it is no such directory
        return None
    return manifest if manifest is not None and manifest.is_complete else None


def _require_same(path: Path, ended: Manifest, identity: dict[str, Any]) -> None:
    differences = ended.differences(identity)
    if differences:
        raise OutputError(
            f"{path} already exists, of another run: {'; '.join(differences[:5])}",
            remedy="choose another output, or pass --overwrite",
        )


def _is_kept(staging: Path) -> bool:
    """Whether a directory holds work of a run that can go on."""
    try:
        manifest = Manifest.read(staging)
    except AlphaQuantError:
        return (staging / MANIFEST).exists()  # damaged: not ours to drop
    return manifest is not None and bool(manifest.identity) and bool(manifest.shards)
