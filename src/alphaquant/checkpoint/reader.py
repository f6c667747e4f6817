"""Lazy, read-only access to a checkpoint directory: config.json and safetensors."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from alphaquant.checkpoint.shard import (
    DAMAGED,
    MAX_HEADER_BYTES,
    Shard,
    Slot,
    TensorInfo,
    load_shard,
    read_into,
    read_slot,
    unreadable,
)
from alphaquant.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["INDEX", "Checkpoint", "read_safetensors", "read_weight_map"]

INDEX = "model.safetensors.index.json"

_NONE: Mapping[str, Shard] = MappingProxyType({})
_MAX_CONFIG_BYTES = 10_000_000
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # pages of each shard that tell two models apart


class Checkpoint:
    """A model directory, opened with `Checkpoint.open`: config and tensors, read on demand, from any thread.

    Attributes:
        path: the directory.
        config: the parsed config.json.
    """

    def __init__(self, path: Path, config: dict[str, Any], slots: dict[str, Slot], digest: str) -> None:
        self.path = path
        self.config = config
        self._slots = dict(sorted(slots.items()))
        self._digest = digest

    @classmethod
    def open(cls, path: str | Path, elsewhere: Mapping[str, Shard] = _NONE) -> Checkpoint:
        """Open a directory and check config.json, the index and the header of each shard.

        Args:
            path: the directory.
            elsewhere: shards by file name that are not in it, and whose headers are known: nothing of them is read.

        Raises:
            CheckpointError: the directory, its config, its index or a shard is missing or broken, or the weights
                are pickled.
        """
        try:
            return cls._open(Path(path), elsewhere)
        except OSError as error:  # a directory that may not be searched
            raise unreadable(Path(path), error) from error

    @classmethod
    def _open(cls, directory: Path, elsewhere: Mapping[str, Shard]) -> Checkpoint:
        if not directory.is_dir():
            what = "the checkpoint is not a directory" if directory.exists() else "the checkpoint does not exist"
            raise CheckpointError(
                what, where=str(directory), remedy="give the directory that holds config.json and the *.safetensors"
            )
        config_path = directory / "config.json"
        if not config_path.is_file():
            raise CheckpointError(
                "no config.json in the checkpoint directory",
                where=str(directory),
                remedy="give a directory that save_pretrained wrote, or copy the model's config.json to it",
            )
        config, config_bytes = _read_json_object(config_path, _MAX_CONFIG_BYTES)
        shards, slots = _load_weights(directory, elsewhere)
        identity = [
            hashlib.sha256(config_bytes).hexdigest(),
            [[shard.path.name, shard.num_bytes, shard.header_sha256] for shard in shards],
        ]
        return cls(directory, config, slots, hashlib.sha256(json.dumps(identity).encode()).hexdigest())

    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and size of one tensor, without reading it.

        Raises:
            CheckpointError: the checkpoint holds no such tensor.
        """
        return self._slot(name).info

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it.

        Raises:
            CheckpointError: the checkpoint holds no such tensor.
        """
        return self._slot(name).info.shape

    def read(self, name: str) -> Tensor:
        """Read one tensor, in its stored dtype, to the CPU.

        Raises:
            CheckpointError: the checkpoint holds no such tensor, or its file cannot be read any more.
        """
        return read_slot(self._slot(name))

    def read_into(self, name: str, out: Tensor) -> None:
        """Read one tensor into ``out``: a tensor or a slice such as ``stacked[e]``, of any dtype and device.

        Raises:
            CheckpointError: the checkpoint holds no such tensor, its shape is another, or its file cannot be read
                any more.
        """
        slot = self._slot(name)
        if tuple(out.shape) != slot.info.shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(slot.info.shape)}, but {list(out.shape)} is expected",
                where=str(slot.path),
                remedy="check that config.json belongs to these weights",
            )
        read_into(slot, out)

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(slot.info.num_bytes for slot in self._slots.values())

    def header_digest(self) -> str:
        """A cheap identity: sha256 over config.json and the name, size and header of each shard."""
        return self._digest

    def sample_digest(self) -> str:
        """A cheap identity of the weights themselves: sha256 over pages of each shard, evenly spread.

        Two models of one architecture often have the same headers.

        Raises:
            CheckpointError: a shard cannot be read any more.
        """
        digest = hashlib.sha256()
        for path in sorted({slot.path for slot in self._slots.values()}):
            digest.update(_sample(path))
        return digest.hexdigest()

    def _slot(self, name: str) -> Slot:
        if name in self._slots:
            return self._slots[name]
        close = difflib.get_close_matches(name, self._slots, n=3)
        raise CheckpointError(
            f"the checkpoint holds no tensor {name!r}",
            where=str(self.path),
            remedy=f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else "check that config.json belongs to these weights",
        )


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of one safetensors file.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    return {name: read_slot(slot) for name, slot in load_shard(Path(path)).slots.items()}


def _sample(path: Path) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            starts = (page * num_bytes // _SAMPLES for page in range(_SAMPLES))
            return b"".join(os.pread(file.fileno(), _SAMPLE_BYTES, start) for start in starts)
    except OSError as error:
        raise unreadable(path, error) from error


def _load_weights(directory: Path, elsewhere: Mapping[str, Shard]) -> tuple[list[Shard], dict[str, Slot]]:
    index = directory / INDEX
    if index.is_file():
        return _load_indexed(index, elsewhere)
    single = directory / "model.safetensors"
    paths = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not paths and not elsewhere:
        raise _no_weights(directory)
    shards = [*(load_shard(_inside(path)) for path in paths), *elsewhere.values()]
    slots: dict[str, Slot] = {}
    for shard in shards:
        for name, slot in shard.slots.items():
            if name in slots:
                raise CheckpointError(
                    f"tensor {name!r} is in two files, {slots[name].path.name} and {shard.path.name}",
                    where=str(directory),
                    remedy="remove the file that does not belong to the model, or add model.safetensors.index.json",
                )
            slots[name] = slot
    return shards, slots


def read_weight_map(index: Path) -> dict[str, str]:
    """For every tensor the plain name of its shard.

    Raises:
        CheckpointError: the index is missing or malformed.
    """
    weight_map = _read_json_object(index, MAX_HEADER_BYTES)[0].get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "the index has no weight_map from tensor names to files", where=str(index), remedy=DAMAGED
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", file):
            raise CheckpointError(
                f"the index puts tensor {name!r} in {file!r}, which is no plain name of a *.safetensors file",
                where=str(index),
                remedy="shards lie beside the index and are named without a path: correct the index",
            )
    return weight_map


def _load_indexed(index: Path, elsewhere: Mapping[str, Shard]) -> tuple[list[Shard], dict[str, Slot]]:
    weight_map = read_weight_map(index)
    shards = dict(elsewhere)
    for file in sorted(set(weight_map.values()) - elsewhere.keys()):
        if not (index.parent / file).is_file():
            raise CheckpointError(
                f"the index names the shard {file!r}, which is not there",
                where=str(index),
                remedy="download the missing shard, or the whole model, again",
            )
        shards[file] = load_shard(_inside(index.parent / file))
    slots: dict[str, Slot] = {}
    for name, file in weight_map.items():
        if name not in shards[file].slots:
            raise CheckpointError(
                f"the index puts tensor {name!r} in {file!r}, which does not hold it", where=str(index), remedy=DAMAGED
            )
        slots[name] = shards[file].slots[name]
    return list(shards.values()), slots


def _inside(path: Path) -> Path:
    """A shard that lies in its directory; a link may lead within it, or to the blobs of the hub's cache.

    Raises:
        CheckpointError: it leads elsewhere: a checkpoint from a stranger could so pass on what is not its own.
    """
    directory = path.parent.resolve()
    roots = [directory]
    if directory.parent.name == "snapshots":
        roots.append(directory.parent.parent / "blobs")
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a link to nowhere, or in a circle
        raise CheckpointError(
            f"{path.name} cannot be read: it is a link to nowhere", where=str(path), remedy=DAMAGED
        ) from error
    if not any(root in target.parents for root in roots):
        raise CheckpointError(
            f"{path.name} is a link out of the checkpoint directory, to {target}",
            where=str(path),
            remedy="where you trust it, give the directory that it leads to, or put a copy in the place of the link",
        )
    return path


def _no_weights(directory: Path) -> CheckpointError:
    pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in directory.glob(f"*.{suffix}"))
    if pickles:
        return CheckpointError(
            f"the weights are pickled ({pickles[0]}), and unpickling runs code of the file: refused",
            where=str(directory),
            remedy="load the model with transformers where you trust it, and save it with "
            "save_pretrained(DIR, safe_serialization=True)",
        )
    return CheckpointError(
        "no *.safetensors in the checkpoint directory",
        where=str(directory),
        remedy="give the directory that holds the weights, or finish the download",
    )


def _read_json_object(path: Path, max_bytes: int) -> tuple[dict[str, Any], bytes]:
    try:
        num_bytes = path.stat().st_size
        if num_bytes > max_bytes:
            raise CheckpointError(
                f"{path.name} has {num_bytes} bytes, more than the {max_bytes} allowed",
                where=str(path),
                remedy="this is no such file of a model: get the right one",
            )
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        value = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8 errors
        raise CheckpointError(f"{path.name} is not valid JSON: {error}", where=str(path), remedy=DAMAGED) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path.name} holds a JSON {type(value).__name__}, not an object", where=str(path), remedy=DAMAGED
        )
    return value, raw
