"""The verb that measures quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alphaquant.checkpoint import resolve_model
from alphaquant.cli.options import DeviceOpt, DType, DTypeOpt, JsonOpt, QuietOpt, print_json
from alphaquant.errors import ConfigError
from alphaquant.evaluation import Quality
from alphaquant.pipeline import (
    evaluate_checkpoint,
    evaluate_tasks,
    keep_quality,
    plan_of,
    prepare,
    quality_facts,
    rounded_quality,
    torch_device,
)
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
        found = evaluate_tasks(
            resolve_model(directory),
            names,
            limit=limit,
            fewshot=fewshot,
            task_path=task_path,
            device=run_device,
            dtype=dtype.value,
        )
        print_json({"tasks": [metric._asdict() for metric in found]}) if as_json else print_tasks(found)
        return
    for option, given in (("--limit", limit), ("--fewshot", fewshot), ("--task-path", task_path)):
        if given is not None:
            raise ConfigError(f"{option} was given without tasks", remedy="add --tasks NAME,NAME")
    if rtn and against is None:
        raise ConfigError("--rtn was given without an original", remedy="add --against MODEL")
    original = None if against is None else resolve_model(against)
    with progress_bar("evaluating", quiet=quiet or as_json) as progress:

        def measure(path: Path) -> Quality:
            return evaluate_checkpoint(
                path,
                data=data,
                seqlen=seqlen,
                max_windows=windows,
                against=original,
                device=run_device,
                dtype=dtype.value,
                progress=progress,
            )

        model = resolve_model(directory)
        plan = plan_of(model) if rtn else None
        results = {"": measure(model)}
        if plan is not None and original is not None:
            prepared = prepare(original, plan)
            results["rtn"] = rounded_quality(
                prepared, measure, device=str(run_device), dtype=dtype.value, progress=progress
            )
    facts = {name: quality_facts(quality) for name, quality in results.items()}
    for name, found_facts in facts.items():
        stem = "-".join(part for part in (Path(data).stem, name) if part)
        label = {"weights": "round to nearest" if name else "quantized", "data": data}
        keep_quality(model, stem, found_facts | label)
    if as_json:
        print_json(facts[""] | {name: found_facts for name, found_facts in facts.items() if name})
        return
    for name, quality in results.items():
        print_quality(f"{directory} rounded to nearest" if name else str(directory), quality)
