"""The verb that measures quality."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from alphaquant.checkpoint import resolve_model
from alphaquant.cli.options import DeviceOpt, DType, DTypeOpt, JsonOpt, QuietOpt, print_json, torch_device
from alphaquant.pipeline import evaluate_checkpoint
from alphaquant.terminal import print_quality, progress_bar

__all__ = ["evaluate"]


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint directory, original or quantized.")],
    *,
    data: Annotated[str, typer.Option(help="wikitext2, c4, bundled, or a text, JSONL or token file.")] = "wikitext2",
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="At most so many windows; all by default.")] = None,
    against: Annotated[Path | None, typer.Option(help="Original to compare with, token for token.")] = None,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = DType.AUTO,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure perplexity ± standard error; with --against also KL and top-1 agreement."""
    with progress_bar("evaluating", quiet=quiet or as_json) as progress:
        quality = evaluate_checkpoint(
            resolve_model(directory),
            data=data,
            seqlen=seqlen,
            max_windows=windows,
            against=None if against is None else resolve_model(against),
            device=torch_device(device),
            dtype=dtype.value,
            progress=progress,
        )
    if as_json:
        facts = asdict(quality)
        agreement = facts.pop("agreement")
        print_json(facts | (agreement or {}))
    else:
        print_quality(str(directory), quality)
