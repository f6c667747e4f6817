"""Models by hub id: in the cache that huggingface_hub keeps, fetched where they are not."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from alphaquant.checkpoint.reader import INDEX, Checkpoint, read_weight_map
from alphaquant.checkpoint.shard import read_header, unreadable
from alphaquant.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from alphaquant.checkpoint.shard import Shard

__all__ = ["SIDE_FILES", "hub_id_of", "open_model", "resolve_model"]

_T = TypeVar("_T")

SIDE_FILES = (
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
"""Of tokenizer and generation: what goes along with the weights."""

_CARD = "README.md"  # for the license
_CODE = "configuration_*.py"  # never run here: engines that serve the result ask for it
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Subfolders hold other formats of the same weights, and so do Mistral's consolidated files.
_CONNECTIONS = 8
_BLOCK_BYTES = 1 << 17  # fetched at once: most headers are smaller
_OTHER_WEIGHTS = ("*/*", "consolidated*", "adapter_model*")


def resolve_model(path_or_id: str | Path) -> Path:
    """The local directory of a model: an existing directory as it is, a hub id (``org/name``) by the hub's cache.

    What the cache lacks is fetched: configuration, tokenizer, and the shards that the index names; nothing else. With
    HF_HUB_OFFLINE=1 the cache alone is looked at.

    Raises:
        CheckpointError: there is no such directory, and it is no hub id or cannot be fetched.
    """
    return _local(path_or_id) or _from_hub(str(path_or_id), _fetch)


def hub_id_of(path: str | Path) -> str | None:
    """The hub id of a directory in the hub's cache; None elsewhere."""
    cached = next((part for part in reversed(Path(path).parts) if part.startswith("models--")), None)
    return None if cached is None else cached.removeprefix("models--").replace("--", "/", 1)


def open_model(path_or_id: str | Path) -> Checkpoint:
    """A model to be looked at: of a hub id whose shards are not in the cache, their headers alone are fetched.

    Names, types and shapes of all tensors are then known, and none can be read.

    Raises:
        CheckpointError: as `resolve_model` and `Checkpoint.open` raise it.
    """
    directory = _local(path_or_id)
    return Checkpoint.open(directory) if directory is not None else _from_hub(str(path_or_id), _look)


def _local(path_or_id: str | Path) -> Path | None:
    """The directory, if there is one; None for a hub id.

    Raises:
        CheckpointError: it is neither.
    """
    path = Path(path_or_id).expanduser()
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except OSError as error:  # no right to look, or a name too long
        raise unreadable(path, error) from error
    if is_directory:
        return path
    if exists:
        raise CheckpointError(
            "the model is a file, not a directory",
            where=str(path),
            remedy="give the directory that holds config.json and the *.safetensors",
        )
    if not _HUB_ID.fullmatch(str(path_or_id)):
        raise CheckpointError(
            f"no model directory {str(path_or_id)!r}",
            where=str(path),
            remedy="give an existing directory, or a hub id such as org/name",
        )
    return None


def _from_hub(hub_id: str, how: Callable[[str], _T]) -> _T:
    try:
        return how(hub_id)
    except CheckpointError:
        raise
    except Exception as error:  # offline, gated, missing, disk full: the remedy is the same
        raise CheckpointError(
            f"no local directory {hub_id!r}, and it cannot be had from the hub: {' '.join(str(error).split())}",
            where=hub_id,
            remedy="give the path of a local model directory, or check the id, the network and `hf auth login`",
        ) from error


def _described(hub_id: str) -> tuple[Path, list[str] | None]:
    """The snapshot in the hub's cache with all but the weights, and the shards that its index names, if it has one."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow to import; not needed for a local model)

    directory = Path(snapshot_download(hub_id, allow_patterns=["config.json", INDEX, *SIDE_FILES, _CODE, _CARD]))
    index = directory / INDEX
    return directory, sorted(set(read_weight_map(index).values())) if index.is_file() else None


def _fetch(hub_id: str) -> Path:
    """The snapshot in the hub's cache, with all that is needed of it."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    directory, shards = _described(hub_id)
    # by the commit that was found: weights and configuration are of one state even if the hub changes in between
    snapshot_download(
        hub_id,
        revision=directory.name,
        allow_patterns=["*.safetensors"] if shards is None else shards,
        ignore_patterns=list(_OTHER_WEIGHTS),
    )
    return directory


def _look(hub_id: str) -> Checkpoint:
    """The checkpoint, from the cache as far as it holds shards, and from headers for the others."""
    from huggingface_hub import HfFileSystem  # noqa: PLC0415

    directory, shards = _described(hub_id)
    if shards is None and any(directory.glob("*.safetensors")):
        return Checkpoint.open(directory)
    hub, at = HfFileSystem(), f"{hub_id}@{directory.name}"
    if shards is None:
        found = (str(path).rpartition("/")[2] for path in hub.ls(at, detail=False))
        shards = [name for name in found if name.endswith(".safetensors") and not _is_other(name)]

    def header(name: str) -> Shard:
        with hub.open(f"{at}/{name}", block_size=_BLOCK_BYTES) as file:
            return read_header(file, file.size, directory / name)

    missing = [name for name in shards if not (directory / name).is_file()]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return Checkpoint.open(directory, dict(zip(missing, pool.map(header, missing), strict=True)))


def _is_other(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _OTHER_WEIGHTS)
