"""The verb that measures quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alphaquant.checkpoint import resolve_model
from alphaquant.cli.options import DeviceOpt, DType, DTypeOpt, JsonOpt, QuietOpt, print_json
from alphaquant.errors import ConfigError
from alphaquant.pipeline import evaluate_tasks, measure_quality, quality_facts, torch_device
from alphaquant.terminal import print_quality, print_tasks, progress_bar

__all__ = ["evaluate"]


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint directory, original or quantized.")],
    *,
    data: Annotated[str, typer.Option(help="wikitext2, c4, bundled, or a text, JSONL or token file.")] = "wikitext2",
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(min=1, help="At most so many windows; all by default.")] = None,
    against: Annotated[Path | None, typer.Option(help="Original to compare with, token for token.")] = None,
    rtn: Annotated[bool, typer.Option("--rtn", help="With --against: also plain rounding at the same plan.")] = False,
    tasks: Annotated[str | None, typer.Option(help="Run tasks of lm-eval instead: arc_easy,hellaswag …")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: at most so many examples of each.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="With --tasks: solved examples in each prompt.")] = None,
    task_path: Annotated[Path | None, typer.Option(help="With --tasks: directory of task files of your own.")] = None,
    device: DeviceOpt = "auto",
    dtype: DTypeOpt = DType.AUTO,
    quiet: QuietOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure perplexity ± standard error; with --against also KL and top-1 agreement.

    What is measured of a directory that `quantize` made is kept in it, and `alphaquant report` shows it.
    """
    run_device = torch_device(device)
    if tasks is not None:
        names = [name for name in (part.strip() for part in tasks.split(",")) if name]
        metrics = evaluate_tasks(
            resolve_model(directory),
            names,
            limit=limit,
            fewshot=fewshot,
            task_path=task_path,
            device=run_device,
            dtype=dtype.value,
        )
        print_json({"tasks": [metric._asdict() for metric in metrics]}) if as_json else print_tasks(metrics)
        return
    for option, given in (("--limit", limit), ("--fewshot", fewshot), ("--task-path", task_path)):
        if given is not None:
            raise ConfigError(f"{option} was given without tasks", remedy="add --tasks NAME,NAME")
    if rtn and against is None:
        raise ConfigError("--rtn was given without an original", remedy="add --against MODEL")
    with progress_bar("evaluating", quiet=quiet or as_json) as progress:
        found = measure_quality(
            resolve_model(directory),
            data=data,
            seqlen=seqlen,
            windows=windows,
            against=None if against is None else resolve_model(against),
            rtn=rtn,
            device=run_device,
            dtype=dtype.value,
            progress=progress,
        )
    if as_json:
        rounded = {} if found.rounded is None else {"rtn": quality_facts(found.rounded)}
        print_json(quality_facts(found.found) | rounded)
        return
    print_quality(str(directory), found.found)
    if found.rounded is not None:
        print_quality(f"{directory} rounded to nearest", found.rounded)
