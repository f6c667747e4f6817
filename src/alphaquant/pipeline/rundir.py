"""The output directory: written beside its final name, and moved there only when it is complete.

So a directory of the final name is always whole, and a run that fails leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from alphaquant.checkpoint import ShardInfo, write_bytes, write_index, write_json, write_shard
from alphaquant.errors import OutputError
from alphaquant.layouts import module_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from alphaquant.formats import Scheme
    from alphaquant.layouts import Layout
    from alphaquant.models import ModelSpec

__all__ = ["FOLDER", "RunDir", "check_output", "check_writable"]

FOLDER = "alphaquant"
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def check_output(path: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output path that cannot or should not be written, before any work is done.

    Raises:
        OutputError: it holds something else, is the source itself, or cannot be written.
    """
    try:
        target, model = path.resolve(), source.resolve()
        if target == model or target in model.parents or model in target.parents:
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


class RunDir:
    """A checkpoint directory in the making: shards are added one by one, then it is finished."""

    def __init__(self, path: Path, num_shards: int) -> None:
        self.path = path
        self._num_shards = num_shards
        self._weight_map: dict[str, str] = {}
        self.shards: list[ShardInfo] = []

    @classmethod
    @contextmanager
    def create(cls, path: Path, num_shards: int) -> Iterator[RunDir]:
        """A run directory that becomes `path` when the block ends well, and vanishes when it does not.

        Raises:
            OutputError: the directory cannot be made or moved.
        """
        target = path.resolve()
        staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
        new_parents = [parent for parent in target.parents if not parent.exists()]
        try:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / FOLDER).mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{path} cannot be made: {error.strerror}", remedy="choose another -o") from error
        try:
            yield cls(staging, num_shards)
            _replace(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            with suppress(OSError):  # someone else may have put something there by now
                for parent in new_parents:
                    parent.rmdir()
            raise

    @property
    def num_bytes(self) -> int:
        """The bytes of the shards so far."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def tensor_names(self) -> set[str]:
        """The tensors written so far."""
        return set(self._weight_map)

    def add_shard(self, tensors: Mapping[str, Tensor]) -> ShardInfo:
        """Write the next shard."""
        name = f"model-{len(self.shards) + 1:05d}-of-{self._num_shards:05d}.safetensors"
        shard = write_shard(self.path / name, tensors, {"format": "pt"})
        self.shards.append(shard)
        self._weight_map.update(dict.fromkeys(shard.tensor_names, name))
        return shard

    def write_note(self, name: str, content: Any) -> None:
        """Write a JSON file of ours, in the folder `alphaquant`."""
        target = self.path / FOLDER / name
        target.parent.mkdir(exist_ok=True)
        write_json(target, content)

    def finish(
        self,
        config: Mapping[str, Any],
        source: Path,
        spec: ModelSpec,
        layout: Layout,
        schemes: Mapping[str, Scheme | None],
    ) -> None:
        """Write what tells readers of the shards: index, manifest, module table and config.json.

        Tokenizer and generation settings of `source` are taken along.
        """
        modules = {module.name: module for module in spec.modules()}
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        quantization = layout.quantization_config(schemes, {name: m.kind for name, m in modules.items()})
        if quantization is None:
            config |= {"dtype": str(spec.dtype).removeprefix("torch.")}
        else:
            config |= {"quantization_config": quantization}
            shapes = {name: (m.out_features, m.in_features) for name, m in modules.items()}
            self.write_note("modules.json", module_table(schemes, shapes, layout.name))
        self.write_note("manifest.json", {"version": 1, "shards": [asdict(shard) for shard in self.shards]})
        total = sum(shard.num_bytes for shard in self.shards)
        write_index(self.path / "model.safetensors.index.json", self._weight_map, total)
        for name in _SIDE_FILES:
            if (source / name).is_file():
                write_bytes(self.path / name, (source / name).read_bytes())
        write_json(self.path / "config.json", config, allow_nan=True)


def _replace(staging: Path, target: Path) -> None:
    """Move the finished directory to its name; what was there before goes only after that worked."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        if not target.exists():
            staging.rename(target)
            return
        target.rename(old)
        try:
            staging.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    except OSError as error:
        raise OutputError(
            f"the result cannot be moved to {target}: {error.strerror}", remedy="choose another output"
        ) from error
