"""Models by hub id: in the cache that huggingface_hub keeps, fetched where they are not."""

from __future__ import annotations

import re
from pathlib import Path

from alphaquant.checkpoint.reader import INDEX, read_weight_map
from alphaquant.checkpoint.shard import unreadable
from alphaquant.errors import CheckpointError

__all__ = ["SIDE_FILES", "resolve_model"]

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

_CODE = "configuration_*.py"  # never run here: engines that serve the result ask for it
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Subfolders hold other formats of the same weights, and so do Mistral's consolidated files.
_OTHER_WEIGHTS = ("*/*", "consolidated*", "adapter_model*")


def resolve_model(path_or_id: str | Path) -> Path:
    """The local directory of a model: an existing directory as it is, a hub id (``org/name``) by the hub's cache.

    What the cache lacks is fetched: configuration, tokenizer, and the shards that the index names; nothing else. With
    HF_HUB_OFFLINE=1 the cache alone is looked at.

    Raises:
        CheckpointError: there is no such directory, and it is no hub id or cannot be fetched.
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
    hub_id = str(path_or_id)
    if not _HUB_ID.fullmatch(hub_id):
        raise CheckpointError(
            f"no model directory {hub_id!r}",
            where=str(path),
            remedy="give an existing directory, or a hub id such as org/name",
        )
    try:
        return _fetch(hub_id)
    except CheckpointError:
        raise
    except Exception as error:  # offline, gated, missing, disk full: the remedy is the same
        raise CheckpointError(
            f"no local directory {hub_id!r}, and it cannot be had from the hub: {' '.join(str(error).split())}",
            where=hub_id,
            remedy="give the path of a local model directory, or check the id, the network and `hf auth login`",
        ) from error


def _fetch(hub_id: str) -> Path:
    """The snapshot in the hub's cache, with all that is needed of it."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow to import; not needed for a local model)

    directory = Path(snapshot_download(hub_id, allow_patterns=["config.json", INDEX, *SIDE_FILES, _CODE]))
    index = directory / INDEX
    shards = sorted(set(read_weight_map(index).values())) if index.is_file() else ["*.safetensors"]
    # by the commit that was found: weights and configuration are of one state even if the hub changes in between
    snapshot_download(hub_id, revision=directory.name, allow_patterns=shards, ignore_patterns=list(_OTHER_WEIGHTS))
    return directory
