"""Token ids out of whatever a data loader yields.

Legend: N rows in all, B rows of a batch, L tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alphaquant.calibration.tokens import check_vocabulary
from alphaquant.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["loader_tokens"]

_KINDS = "token ids [B, L] or [L], a mapping with input_ids, or a tuple that begins with one of these"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def loader_tokens(loader: Iterable[Any], *, vocab_size: int, max_length: int) -> Tensor:
    """All rows that a data loader yields, int64 `[N, L]` on the CPU.

    Args:
        loader: yields token tensors `[B, L]` or `[L]`, mappings that hold them as `input_ids`, or tuples that begin
            with either. An `attention_mask` must be all ones, and all rows of one length.
        vocab_size: ids must be below it.
        max_length: the most tokens that a row may have.

    Raises:
        CalibrationError: it yields nothing or something else, padding, rows of several lengths or longer than the
            model takes, or ids outside the vocabulary.
    """
    rows: list[Tensor] = []
    for number, ids_BL in enumerate(_batches(loader)):
        where = f"dataloader, batch {number}"
        if rows and ids_BL.shape[1] != rows[0].shape[1]:
            raise CalibrationError(
                f"a row of {ids_BL.shape[1]} tokens, where those before have {rows[0].shape[1]}",
                where=where,
                remedy="join the texts and cut them into windows of one length",
            )
        check_vocabulary(where, ids_BL, vocab_size)
        rows.append(ids_BL)
    if not sum(map(len, rows)):
        raise CalibrationError("the dataloader yields nothing", where="dataloader", remedy=f"let it yield {_KINDS}")
    ids_NL = torch.cat(rows)
    if not 0 < ids_NL.shape[1] <= max_length:
        raise CalibrationError(
            f"rows have {ids_NL.shape[1]} tokens; the model takes 1 to {max_length}",
            where="dataloader",
            remedy="cut the rows to windows of at most so many tokens",
        )
    return ids_NL


def _batches(loader: Iterable[Any]) -> Iterator[Tensor]:
    if isinstance(loader, str | bytes | Mapping) or not isinstance(loader, Iterable):
        raise CalibrationError(
            f"the dataloader is a {type(loader).__name__}, which yields no batches",
            where="dataloader",
            remedy=f"give a list or a DataLoader that yields {_KINDS}",
        )
    for number, batch in enumerate(loader):
        yield _ids(batch, f"dataloader, batch {number}")


def _ids(batch: Any, where: str) -> Tensor:
    """The ids of one batch, int64 `[B, L]`."""
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor | Mapping):
        batch = batch[0]  # (inputs, targets), as GPTQ's own loaders have it
    mask = None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            keys = ", ".join(map(str, batch)) or "none"
            raise CalibrationError(
                f"a mapping without input_ids; its keys: {keys}", where=where, remedy=f"give {_KINDS}"
            )
        batch, mask = batch["input_ids"], batch.get("attention_mask")
    ids = _tensor(batch, "token ids", where)
    if ids.dtype not in _INTEGERS:
        dtype = str(ids.dtype).removeprefix("torch.")
        raise CalibrationError(f"token ids are {dtype}, not integers", where=where, remedy="give them as torch.long")
    if ids.ndim not in (1, 2):
        raise CalibrationError(f"token ids of shape {list(ids.shape)}", where=where, remedy=f"give {_KINDS}")
    if mask is not None:
        _require_no_padding(_tensor(mask, "attention_mask", where), ids, where)
    ids = ids.detach().to("cpu", torch.int64)
    return ids if ids.ndim == 2 else ids[None]


def _tensor(value: Any, what: str, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, list | tuple):
        raise CalibrationError(f"{what} are a {type(value).__name__}", where=where, remedy=f"give {_KINDS}")
    try:
        return torch.tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CalibrationError(
            f"{what} are no rectangle of integers: {error}", where=where, remedy=f"give {_KINDS}"
        ) from (error)


def _require_no_padding(mask: Tensor, ids: Tensor, where: str) -> None:
    if mask.shape != ids.shape:
        raise CalibrationError(
            f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}",
            where=where,
            remedy="give a mask of the shape of input_ids, or none",
        )
    num_hidden = int((mask != 1).sum())
    if num_hidden:
        raise CalibrationError(
            f"attention_mask hides {num_hidden} positions: padding would be calibrated on",
            where=where,
            remedy="join the texts and cut them into windows of one length, without padding",
        )
