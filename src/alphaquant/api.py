"""The verbs of the command as functions: the same steps, checks and defaults, from directory to directory.

A model is a checkpoint directory, or a hub id such as `allenai/OLMoE-1B-7B-0924`. Every function raises an
`AlphaQuantError` that says what is wrong, where, and the remedy; what it was to make is then not there, or whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from alphaquant.allocation import Budget, Means, Search, propose, to_fill
from alphaquant.checkpoint import open_model, resolve_model
from alphaquant.engines import profile_of
from alphaquant.errors import ConfigError, OutputError, PlanError
from alphaquant.gptq import GPTQConfig, as_plan
from alphaquant.gptq import export as export_modules
from alphaquant.numerics import give_back_freed_memory
from alphaquant.pipeline import (
    Calibration,
    Serving,
    check_output,
    check_single_file,
    export_checkpoint,
    json_log,
    keep_costs,
    measure_quality,
    parse_bytes,
    plan_sizes,
    prepare,
    quantize_checkpoint,
    save_single_file,
    silent,
    torch_device,
    turned,
)
from alphaquant.pipeline import evaluate_tasks as run_tasks
from alphaquant.plan import Plan
from alphaquant.report import write_comparison, write_report
from alphaquant.solver import Method, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from alphaquant.allocation import ErrorTable, Proposal, Request
    from alphaquant.checkpoint import Checkpoint
    from alphaquant.engines import Violation
    from alphaquant.evaluation import Quality
    from alphaquant.gptq import QuantizedModule
    from alphaquant.pipeline import KindSize, Metric, Prepared, Progress, QuantizeResult
    from alphaquant.plan import ResolvedPlan

__all__ = ["PlannedModel", "evaluate", "evaluate_tasks", "export", "plan", "quantize", "report"]


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """What a plan makes of a model.

    Attributes:
        resolved: `schemes` by checkpoint name (None is left as it is), `warnings`, `notes`, `explain(name)`, `plan`.
        sizes: for each kind and format the modules, weights and bytes before and after.
        violations: what the engine would not take; empty where none was named.
        changes: what was raised for the engine, or is known of a plan that was found, in words.
        proposal: of a plan that was found its size, predicted cost and what was measured, as JSON; else None.
    """

    resolved: ResolvedPlan
    sizes: list[KindSize]
    violations: list[Violation]
    changes: tuple[str, ...]
    proposal: dict[str, Any] | None = None

    @property
    def plan(self) -> Plan:
        """The plan itself, which `quantize` takes; `to_json()` is its file."""
        return self.resolved.plan


def plan(
    model: str | Path,
    config: Plan | Mapping[str, Any] | str | Path | None = None,
    *,
    bits: float | None = None,
    size: str | int | None = None,
    max_kl: float | None = None,
    search: Search | None = None,
    calibration: Calibration | None = None,
    serving: Serving | str | None = None,
    legalize: bool = False,
    layout: str | None = None,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
) -> PlannedModel:
    """Resolve a plan on a model, or find one for a budget: which module gets which format; what an engine says to it.

    Args:
        model: checkpoint directory, or hub id.
        config: a plan, as an object, a mapping, a JSON file, or shorthand such as `int4:g128`. With a budget its
            overrides fix the modules that they name.
        bits: budget: average stored bits a weight, of what can be quantized.
        size: budget: bytes of all tensors, or text such as `4GiB`.
        max_kl: budget: nats a token of divergence from the original.
        search: with a budget: how the plan is found, of which formats, within which limits.
        calibration: with a budget: tokens to measure on; None: 128 windows of 2,048 tokens of WikiText-2.
        serving: where the result is to be served: an engine's name (`vllm`, `transformers`, `any`), or with its GPUs.
        legalize: raise what the engine wants to share a format.
        layout: hold it against the engine in this layout; None: in the best of them.
        device: with a budget: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: with a budget: `auto`, `bf16`, `fp16` or `fp32`.
        progress: is told what happens.

    Raises:
        AlphaQuantError: model, engine, plan or budget are not possible.
    """
    target = _serving(serving, legalize=legalize)
    tokens = calibration or Calibration()
    request = _request(_Asked(bits, size, max_kl), search, target, layout, tokens.seed, legalize=legalize)
    if request is None:
        prepared, changes = _prepare(open_model(model), config, target if legalize else None)
        proposal = None
    else:
        means = Means(tokens, Recipe(), torch_device(device), dtype, tokens.seed, progress)
        prepared, proposal, changes, _ = _propose(model, config, request, means)
    violations = [] if target is None else target.violations(prepared, layout)
    return PlannedModel(prepared.resolved, plan_sizes(prepared), violations, changes, proposal)


def quantize(
    model: str | Path,
    out: str | Path,
    config: Plan | Mapping[str, Any] | str | Path | None = None,
    *,
    bits: float | None = None,
    size: str | int | None = None,
    search: Search | None = None,
    gptq_config: GPTQConfig | None = None,
    calibration: Calibration | None = None,
    rotate: str = "none",
    layout: str | None = None,
    serving: Serving | str | None = None,
    legalize: bool = False,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    fresh: bool = False,
    max_memory: str | int | None = None,
    strict: bool = False,
    log_json: str | Path | None = None,
    progress: Progress = silent,
) -> QuantizeResult:
    """Quantize a checkpoint into a directory that engines load, with GPTQ (Frantar et al., arXiv:2210.17323).

    Args:
        model: checkpoint directory, or hub id.
        out: directory to make. A call that was stopped goes on when it is made again.
        config: a plan, as an object, a mapping, a JSON file, or shorthand such as `int4:g128`. With a budget its
            overrides fix the modules that they name.
        bits: budget for which a plan is found, as by `plan`: average stored bits a weight, of what can be quantized.
        size: budget: bytes of all tensors, or text such as `4GiB`.
        search: with a budget: how the plan is found, of which formats, within which limits.
        gptq_config: settings of the method.
        calibration: tokens to calibrate on; None: 128 windows of 2,048 tokens of WikiText-2, and none for rounding.
        rotate: the model is first rotated, exactly: `none`, `hadamard`, `block` (for MX formats), or `auto`, which
            measures, and wants a plan.
        layout: `compressed-tensors`, `humming` or `dense`; None: the most widely served one that holds the plan.
        serving: where the result is to be served, which the plan must suit: an engine's name, or with its GPUs.
        legalize: raise what the engine wants to share a format.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: of weights and activations while they are worked on: `auto`, `bf16`, `fp16` or `fp32`.
        overwrite: replace `out` if it holds something.
        fresh: drop what a stopped call has left, and start anew.
        max_memory: stay below this: bytes, or text such as `16GiB`; of the device where that is a GPU.
        strict: make an error of every fallback and of every sample left out.
        log_json: file to which a line of JSON is appended for every event.
        progress: is told what happens.

    Returns:
        The content of `alphaquant/report.json`, losses by kind and format, and the record of every module.

    Raises:
        AlphaQuantError: what is wrong with model, plan, text, device or output.
    """
    recipe = gptq_config or GPTQConfig()
    target, run_device = _serving(serving, legalize=legalize), torch_device(device)
    tokens = calibration or Calibration()
    request = _request(_Asked(bits, size), search, target, layout, tokens.seed, legalize=legalize)
    limit = parse_bytes(max_memory, "max_memory") if isinstance(max_memory, str) else max_memory
    if limit is not None:
        give_back_freed_memory()
    costs: ErrorTable | None = None
    used = calibration if recipe.method is Method.RTN else tokens
    turn = partial(
        turned, name=rotate, seed=tokens.seed, recipe=recipe, device=run_device, dtype=dtype, progress=progress
    )
    if request is None:
        prepared, _ = _prepare(resolve_model(model), config, target if legalize else None)
        prepared = turn(prepared, calibration=used)
    else:
        check_output(Path(out), resolve_model(model), overwrite=overwrite)
        means = Means(tokens, recipe, run_device, dtype, tokens.seed, progress)
        prepared, _, _, costs = _propose(model, config, request, means, turn)
    with json_log(None if log_json is None else Path(log_json)) as log:
        result = quantize_checkpoint(
            prepared,
            Path(out),
            recipe=recipe,
            calibration=used,
            layout=layout if target is None else target.layout(prepared, layout),
            device=run_device,
            dtype=dtype,
            overwrite=overwrite,
            fresh=fresh,
            strict=strict,
            max_memory=limit,
            progress=progress,
            log=log,
            command="alphaquant.quantize",
        )
    if costs is not None:
        keep_costs(Path(out), costs.to_json())
    return result


def evaluate(
    directory: str | Path,
    *,
    data: str = "wikitext2",
    seqlen: int = 2048,
    windows: int | None = None,
    against: str | Path | None = None,
    rtn: bool = False,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
) -> Quality:
    """Perplexity ± standard error of a checkpoint; with `against` also KL (nats a token) and top-1 agreement.

    What is measured of a directory that `quantize` made is kept in it, and `report` shows it.

    Args:
        directory: checkpoint directory, original or quantized, or hub id.
        data: `wikitext2`, `c4`, `bundled`, or a text, JSONL or token file.
        seqlen: tokens in a window.
        windows: at most so many of them.
        against: the original, to compare with token for token.
        rtn: with `against`: also measure plain rounding at the same plan, which is kept in the directory, too.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.
        progress: is told what happens.

    Raises:
        AlphaQuantError: what is wrong with checkpoint, text or device.
    """
    return measure_quality(
        resolve_model(directory),
        data=data,
        seqlen=seqlen,
        windows=windows,
        against=None if against is None else resolve_model(against),
        rtn=rtn,
        device=torch_device(device),
        dtype=dtype,
        progress=progress,
    ).found


def evaluate_tasks(
    directory: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    task_path: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str = "auto",
) -> list[Metric]:
    """Run tasks of lm-eval (`pip install 'alphaquant-moe[eval]'`) on a checkpoint.

    Args:
        directory: checkpoint directory, original or quantized, or hub id.
        tasks: names as lm-eval knows them.
        limit: at most so many examples of each task.
        fewshot: solved examples in each prompt; None: as many as the task says.
        task_path: directory of task files of your own.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto`, `bf16`, `fp16` or `fp32`.

    Returns:
        For each task and metric its `value` and, where the harness has one, its `stderr`.

    Raises:
        AlphaQuantError: lm-eval is missing or knows no such task, or what is wrong with the checkpoint.
    """
    if isinstance(tasks, str):
        raise ConfigError(f"tasks is {tasks!r}", remedy=f"give a list: {[part.strip() for part in tasks.split(',')]}")
    return run_tasks(
        resolve_model(directory),
        tasks,
        limit=limit,
        fewshot=fewshot,
        task_path=None if task_path is None else Path(task_path),
        device=torch_device(device),
        dtype=dtype,
    )


@overload
def export(source: str | Path, out: str | Path, *, layout: str = ..., overwrite: bool = ...) -> int: ...
@overload
def export(
    source: Mapping[str, QuantizedModule],
    out: str | Path,
    *,
    model: Any,
    original: str | Path | None = ...,
    layout: str | None = ...,
    overwrite: bool = ...,
) -> int: ...
def export(
    source: str | Path | Mapping[str, QuantizedModule],
    out: str | Path,
    *,
    model: Any = None,
    original: str | Path | None = None,
    layout: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a quantized directory in another layout, losslessly from its codes, or one that was made in memory.

    Args:
        source: directory that `quantize` made, or what `gptq_quantize_model` returned.
        out: directory to make, or of a directory also a `.pt` file for `torch.load(weights_only=True)`.
        model: of quantized modules, the model that they are of: what is not quantized comes from it.
        original: of quantized modules, the checkpoint directory that their model came from, for tokenizer and config.
        layout: `compressed-tensors`, `humming` or `dense`. By default a directory becomes dense, and modules get the
            most widely served one that holds them.
        overwrite: replace `out` if it holds something.

    Returns:
        Bytes of the weights that were written.

    Raises:
        AlphaQuantError: what is wrong; nothing is left on disk.
    """
    target = Path(out)
    if isinstance(source, Mapping):
        if model is None:
            raise ConfigError("modules without their model", where="export", remedy="give model=, which was quantized")
        return export_modules(source, target, model=model, original=original, layout=layout, overwrite=overwrite)
    if model is not None or original is not None:
        raise ConfigError("a directory with a model", where="export", remedy="give model= only with quantized modules")
    if target.suffix != ".pt":
        return export_checkpoint(Path(source), target, layout or "dense", overwrite=overwrite)
    if layout is not None:
        raise OutputError(
            f"layout {layout!r} with {target}: a .pt file keeps the layout of its directory",
            remedy="convert into a directory first, and export that one",
        )
    check_single_file(target, overwrite=overwrite)
    save_single_file(Path(source), target)
    return target.stat().st_size


def report(
    *directories: str | Path,
    output: str | Path | None = None,
    quality: Sequence[str | Path] = (),
    table: str | Path | None = None,
) -> list[Path]:
    """Draw what a run did, in report.html and report.md; of several runs comparison.html and comparison.md.

    Args:
        directories: what `quantize` made.
        output: directory to write to; None: the notes of the run, or of several runs the working directory.
        quality: of one run, more files of `alphaquant eval --json` to show.
        table: of one run, costs of all modules that `plan` wrote; None: those by which the run found its plan.

    Returns:
        The files that were written.

    Raises:
        CheckpointError: a directory is none of ours, or a file is missing or malformed.
        OutputError: the output cannot be written.
    """
    runs = [Path(directory) for directory in directories]
    target = None if output is None else Path(output)
    if len(runs) == 1:
        costs = None if table is None else Path(table)
        return write_report(runs[0], target, [Path(file) for file in quality], table=costs)
    if not runs or quality or table is not None:
        what = "quality files or a table with several directories: whose are they?" if runs else "no directory"
        raise OutputError(what, where="report", remedy="give the directory of a run, or several without these")
    return write_comparison(runs, target or Path())


def _serving(given: Serving | str | None, *, legalize: bool) -> Serving | None:
    if given is None and legalize:
        raise ConfigError("legalize was given without an engine", remedy="add serving='vllm'")
    return Serving(profile_of(given)) if isinstance(given, str) else given


def _prepare(
    model: Path | Checkpoint, config: Plan | Mapping[str, Any] | str | Path | None, legal_for: Serving | None
) -> tuple[Prepared, tuple[str, ...]]:
    if config is None:
        raise PlanError("there is no plan", remedy="give config, such as 'int4:g128', or a budget, such as bits=3.5")
    prepared = prepare(model, as_plan(config, name="config"))
    return (prepared, ()) if legal_for is None else legal_for.legalized(prepared)


class _Asked(NamedTuple):
    """What a plan is to be found for: one of these, or none."""

    bits: float | None
    size: str | int | None
    max_kl: float | None = None


def _request(
    asked: _Asked,
    search: Search | None,
    target: Serving | None,
    layout: str | None,
    seed: int,
    *,
    legalize: bool,
) -> Request | None:
    """What the budget asks for; None where there is none."""
    given = {name: value for name, value in asked._asdict().items() if value is not None}
    if not given:
        if search is not None:
            raise ConfigError("search was given without a budget", remedy="add bits=3.5, or size='4GiB'")
        return None
    if len(given) > 1:
        raise PlanError(f"{' and '.join(given)} were both given", remedy="give one of them")
    if legalize:
        raise ConfigError("legalize was given with a budget", remedy="leave it out: what is found suits the engine")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, str) if name == "size" else (int, float)):
            raise ConfigError(f"{name} is {value!r}", remedy=f"give a number{', or 4GiB' if name == 'size' else ''}")
    num_bytes = parse_bytes(asked.size, "size") if isinstance(asked.size, str) else asked.size
    budget = Budget(asked.bits, num_bytes, asked.max_kl)
    return (search or Search()).request(budget, serving=target, layout=layout, seed=seed)


def _propose(
    model: str | Path,
    config: Plan | Mapping[str, Any] | str | Path | None,
    request: Request,
    means: Means,
    turn: Callable[[Prepared], Prepared] = lambda prepared: prepared,
) -> Proposal:
    base = Plan() if config is None else as_plan(config, name="config")
    if config is not None and not base.overrides:
        what = "config has no overrides, and with a budget only they are kept"
        raise PlanError(what, where="config", remedy="leave config out, or name the modules that you decide yourself")
    return propose(request, turn(prepare(resolve_model(model), to_fill(base))), means)
