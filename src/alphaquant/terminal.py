"""What the command shows: tables, sizes, progress, errors."""

from __future__ import annotations

import re
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from alphaquant.pipeline import peak_memory_bytes
from alphaquant.report import duration, human_bytes, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import Any

    from rich.progress import Task

    from alphaquant.allocation import Frontier
    from alphaquant.engines import Violation
    from alphaquant.errors import AlphaQuantError
    from alphaquant.evaluation import Quality
    from alphaquant.pipeline import Forecast, KindSize, Metric, RoutingReport, RunStatus
    from alphaquant.pipeline import Progress as Report
    from alphaquant.verification import Likeness, Stored

__all__ = [
    "Meter",
    "err",
    "out",
    "print_comparison",
    "print_error",
    "print_forecast",
    "print_frontier",
    "print_notes",
    "print_quality",
    "print_result",
    "print_routing",
    "print_sizes",
    "print_status",
    "print_tasks",
    "print_verified",
    "print_violations",
    "progress_bar",
]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_UNLIMITED = 1000
_MOST_KINDS = 8


def print_error(error: AlphaQuantError) -> None:
    """What is wrong, where, and the remedy, on standard error."""
    first, *rest = error.lines()
    err.print(Text.assemble(("error: ", "bold red"), first), soft_wrap=True)
    for line in rest:
        err.print(Text("  " + line), soft_wrap=True)


def print_notes(warnings: Iterable[str], notes: Iterable[str] = ()) -> None:
    """Warnings and notes, on standard error."""
    for text in warnings:
        err.print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)
    for text in notes:
        err.print(Text.assemble(("note: ", "cyan"), text), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table whose first two columns are text and the others numbers."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Show a table; only a terminal has a width that it must fit into."""
    console = out if out.is_terminal else Console(highlight=False, width=_UNLIMITED)
    console.print(table(columns, rows))


def print_sizes(sizes: Sequence[KindSize]) -> None:
    """What a plan makes of each kind of module."""
    rows = [
        (
            s.kind,
            s.scheme,
            f"{s.modules:,}",
            f"{s.weights:,}",
            f"{8 * s.after_bytes / s.weights:.2f}",
            human_bytes(s.before_bytes),
            human_bytes(s.after_bytes),
        )
        for s in sizes
    ]
    _print_table(("kind", "format", "modules", "weights", "bits", "before", "after"), rows)
    before, after = sum(s.before_bytes for s in sizes), sum(s.after_bytes for s in sizes)
    out.print(f"total {human_bytes(before)} → {human_bytes(after)} ({before / after:.2f}× smaller)")


def print_frontier(frontier: Frontier) -> None:
    """Size against loss."""
    rows = []
    for number, point in enumerate(frontier.points):
        measured = ["" if kl is None else f"{kl:.5f}" for kl in (point.measured, point.uniform)]
        mark = "◂ knee" if number == frontier.knee else ""
        rows.append((f"{point.bits:.3f}", mark, human_bytes(point.num_bytes), f"{point.predicted:.5g}", *measured))
    columns = ("bits", "", "size", "predicted", "measured KL", "uniform")
    _print_table(columns if frontier.points[0].measured is not None else columns[:4], [r[: len(columns)] for r in rows])


def print_forecast(forecast: Forecast) -> None:
    """Print what a run will take of memory and time."""
    memory = forecast.memory
    rows = [(part, f"{num_bytes / 2**20:,.0f} MiB") for part, num_bytes in memory.parts.items() if num_bytes >= 2**20]
    _print_table(("memory at the peak", ""), [*rows, ("together", f"{memory.peak_bytes / 2**20:,.0f} MiB")])
    seconds = [(phase, f"{value:,.0f} s") for phase, value in forecast.seconds.items()]
    _print_table(("time, roughly", ""), [*seconds, ("together", f"{sum(forecast.seconds.values()):,.0f} s")])
    print_notes((), memory.notes())


def print_violations(engine: str, violations: Sequence[Violation]) -> None:
    """What an engine would not take of a plan: module, rule, remedy."""
    if not violations:
        out.print(f"{engine} takes this plan")
        return
    out.print(f"{engine} would not take this plan, or get it silently wrong:")
    for v in violations:
        more = f" and {v.num_modules - 1:,} more" if v.num_modules > 1 else ""
        out.print(Text.assemble((f"{v.module}{more}", "bold")), soft_wrap=True)
        out.print(f"  rule    {v.rule}", soft_wrap=True)
        out.print(f"  remedy  {v.remedy}", soft_wrap=True)


def print_verified(directory: Path, stored: Stored, likeness: Likeness | None) -> None:
    """What a look at a directory found, and what an engine made of it."""
    for difference in stored.problems:
        out.print(Text.assemble((difference.where, "bold"), f": {difference.what}"), soft_wrap=True)
    if not stored.problems:
        held = (
            f"{stored.modules:,} modules hold the run's codes"
            if stored.layout != "dense"
            else "dense: no codes to hold"
        )
        older = f"; {stored.uncompared:,} have no hash to be held against" if stored.uncompared else ""
        out.print(f"{directory}: every file is as it was written; {held}{older}", soft_wrap=True)
    if likeness is None:
        return
    for note in likeness.notes:
        out.print(f"note: {note}", soft_wrap=True)
    logits = "" if likeness.logits is None else f", logits at most {likeness.logits:.1e} apart"
    out.print(
        f"{likeness.engine} beside the dense export: {100 * likeness.same_tokens:.0f}% of greedy texts the same, "
        f"{100 * likeness.agreement:.1f}% of likeliest tokens, log-probabilities {likeness.mean_difference:.4f} nats "
        f"apart on average{logits}: " + ("the same model" if likeness.is_same else "not the same model"),
        soft_wrap=True,
    )


def print_result(report: dict[str, Any]) -> None:
    """The closing table of a run: by kind, then size, audit, time and memory."""
    rows = [
        (
            row["kind"],
            row["scheme"],
            f"{row['modules']:,}",
            f"{row['bits_per_weight']:.2f}",
            f"{100 * row['relative_loss']:.3f}%",
            str(row["fallbacks"]),
        )
        for row in report["summary"]
    ]
    _print_table(("kind", "format", "modules", "bits", "loss", "events"), rows)
    sizes, audit, seconds = report["sizes"], report["audit"], report["seconds"]
    ratio = sizes["before_bytes"] / sizes["after_bytes"]
    bits = "" if sizes["bits_per_weight"] is None else f", {sizes['bits_per_weight']:.2f} bits a quantized weight"
    out.print(f"size   {human_bytes(sizes['before_bytes'])} → {human_bytes(sizes['after_bytes'])} ({ratio:.2f}×{bits})")
    out.print(f"audit  {audit['targeted']} targeted, {audit['quantized']} quantized, {audit['left']} left as they are")
    phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if phase != "total")
    out.print(f"time   {seconds['total']:.1f} s ({phases})", soft_wrap=True)
    out.print(f"memory {human_bytes(report['peak_memory_bytes'])} at its peak")
    coverage = (report["calibration"] or {}).get("coverage")
    if coverage is not None:
        least = f"least-used expert {coverage['before']['least']:.0f} → {coverage['after']['least']:.0f} tokens"
        tenth = f"lowest tenth {coverage['before']['lowest_tenth']:.0f} → {coverage['after']['lowest_tenth']:.0f}"
        out.print(f"experts {least}, {tenth}, by a choice among {coverage['drawn']} windows", soft_wrap=True)
    routers = report["routers"]
    if routers is not None:
        change = f"{routers['agreement_before']:.2%} → {routers['agreement_after']:.2%} of experts are the original's"
        out.print(f"routers {routers['kept']} of {routers['layers']} refitted, {change}", soft_wrap=True)
    tuning = report["tuning"]
    if tuning is not None:
        change = f"{tuning['loss_before']:.3%} → {tuning['loss_after']:.3%} error behind a layer"
        out.print(f"tuned  {tuning['kept']} of {tuning['halves']} half-layers, {change}", soft_wrap=True)
    if report["events"]:
        kinds = Counter(re.sub(r"\d+", "…", event["event"]) for event in report["events"])
        out.print(f"events {len(report['events'])}", soft_wrap=True)
        for kind, count in kinds.most_common(_MOST_KINDS):
            out.print(f"       {count} × {kind}", soft_wrap=True)
        if len(kinds) > _MOST_KINDS:
            out.print(f"       and {len(kinds) - _MOST_KINDS} kinds more: --verbose lists all", soft_wrap=True)


def print_status(status: RunStatus) -> None:
    """Where a run stands."""
    by = "" if status.pid is None else f" (process {status.pid})"
    out.print(f"{status.state}{by}: {status.done} of {status.total} shards in {status.directory}", soft_wrap=True)
    left = "" if status.seconds_left is None else f", about {duration(status.seconds_left)} left"
    starts = f"{status.starts} start{'s' if status.starts > 1 else ''}"
    out.print(f"{human_bytes(status.num_bytes)} in {duration(status.seconds)}{left}; {starts}")
    out.print(f"last commit {duration(status.since_commit)} ago")
    if status.command:
        verb = "go on with" if status.state == "stopped" else "command"
        out.print(f"{verb}: {status.command}", soft_wrap=True)


def print_routing(report: RoutingReport) -> None:
    """A row for each MoE layer, then every starved and dead expert by name."""
    rows = []
    for layer in report.layers:
        record = layer.record
        rows.append(
            (
                str(layer.layer),
                f"top-{layer.top_k} of {len(record.tokens)}",
                f"{record.entropy:.3f}",
                f"{min(record.load):.2f}",
                f"{max(record.load):.2f}",
                f"{100 * layer.covered:.0f}%",
                str(len(record.starved)),
                str(len(record.dead)),
                *([] if layer.gate is None else [f"{layer.gate:.3f}"]),
            )
        )
    columns = ("layer", "experts", "entropy", "least", "most", "covered", "starved", "dead", "gate")
    _print_table(columns[: len(rows[0])], rows)
    facts = report.calibration
    out.print(
        f"on {facts['num_samples'] * facts['seqlen']:,} tokens of {facts['source']}; entropy of the load: 1 if even; "
        "least, most: load relative to the fair share; covered: experts with as many effective samples as inputs",
        soft_wrap=True,
    )
    for what, style in (("starved", "yellow"), ("dead", "red")):
        for layer in report.layers:
            experts = layer.record.starved if what == "starved" else layer.record.dead
            if experts:
                names = ", ".join(map(str, experts))
                out.print(Text.assemble((f"{what}  ", style), f"layer {layer.layer}: {names}"), soft_wrap=True)


def print_quality(name: str, quality: Quality) -> None:
    """Perplexity, and agreement with the original where it was measured."""
    out.print(
        f"{name}: perplexity {quality.perplexity:.4f} ± {quality.stderr:.4f} "
        f"({quality.tokens:,} tokens in {quality.windows} windows)",
        soft_wrap=True,
    )
    agreement = quality.agreement
    if agreement is not None:
        change = 100 * (quality.perplexity / agreement.original_perplexity - 1)
        out.print(
            f"original {agreement.original_perplexity:.4f} ({change:+.2f}%), "
            f"KL {agreement.kl:.5f} ± {agreement.kl_stderr:.5f} nats a token, "
            f"same top-1 for {100 * agreement.top1_agreement:.2f}%"
            + ("" if agreement.router is None else f", same experts for {100 * agreement.router:.2f}%"),
            soft_wrap=True,
        )


def print_tasks(metrics: Sequence[Metric]) -> None:
    """Figures of tasks, each with its standard error."""
    rows = [(m.task, m.metric, f"{m.value:.4f}", "" if m.stderr is None else f"± {m.stderr:.4f}") for m in metrics]
    _print_table(("task", "metric", "value", ""), rows)


def print_comparison(original: float, results: dict[str, Quality]) -> None:
    """Perplexities side by side."""
    rows = [("original", "", f"{original:.3f}", "", "", "")]
    for name, quality in results.items():
        agreement = quality.agreement
        rows.append(
            (
                name,
                "",
                f"{quality.perplexity:.3f}",
                f"{100 * (quality.perplexity / original - 1):+.2f}%",
                "" if agreement is None else f"{agreement.kl:.4f}",
                "" if agreement is None else f"{100 * agreement.top1_agreement:.1f}%",
            )
        )
    out.print(table(("weights", "", "perplexity", "change", "KL", "same top-1"), rows))


class Meter:
    """What can be told of a pass over the layers from the calls so far; a layer number that falls begins another pass.

    Args:
        now: seconds of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._layer = self._first = self._num_layers = self._tokens = 0
        self._begun = self._entered = self._since = now()
        self.rate: float | None = None
        """Tokens a second of the last phase that worked through tokens and is over."""

    def begin(self, layer: int, num_layers: int, tokens: int) -> None:
        """A phase begins, and so the one before it is over."""
        now = self._now()
        if self._tokens:
            self.rate = self._tokens / max(now - self._since, 1e-9)
        if layer < self._layer or num_layers != self._num_layers:
            self._begun, self._first, self._entered = now, layer, now
        elif layer > self._layer:
            self._entered = now
        self._layer, self._num_layers, self._tokens, self._since = layer, num_layers, tokens, now

    def remaining(self) -> float | None:
        """Seconds to the end of this pass, by the mean of the layers that it has finished; None before the first."""
        done = self._layer - self._first
        if done <= 0:
            return None
        left = (self._entered - self._begun) / done * (self._num_layers - self._layer)
        return max(0.0, left - (self._now() - self._entered))


class _Remaining(ProgressColumn):
    """Time left of this pass."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def render(self, task: Task) -> Text:  # noqa: ARG002  (rich's signature)
        left = self._meter.remaining()
        if left is None:
            return Text("ETA –", style="dim")
        seconds = round(left)
        hours = f"{seconds // 3600}:" if seconds >= 3600 else ""
        return Text(f"ETA {hours}{seconds % 3600 // 60:{'02d' if hours else 'd'}}:{seconds % 60:02d}", style="dim")


class _Memory(ProgressColumn):
    """Most memory that the process had so far."""

    def render(self, task: Task) -> Text:  # noqa: ARG002  (rich's signature)
        return Text(f"peak {human_bytes(peak_memory_bytes())}", style="dim")


@contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[Report]:
    """A bar over layers with phase, tokens a second, time left and memory; nothing where there is no terminal."""
    meter = Meter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=14),
        TextColumn("{task.fields[layer]}"),
        TextColumn("{task.fields[phase]:<9}"),
        TextColumn("{task.fields[rate]}"),
        _Remaining(meter),
        _Memory(),
    )
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as bar:
        task = bar.add_task(title, total=None, layer="", phase="", rate="")

        def report(phase: str, layer: int, num_layers: int, tokens: int = 0) -> None:
            meter.begin(layer, num_layers, tokens)
            rate = "" if meter.rate is None else f"{short(meter.rate).replace(' ', '')} tok/s"
            bar.update(
                task, total=num_layers, completed=layer, layer=f"{layer + 1}/{num_layers}", phase=phase, rate=rate
            )

        yield report
