"""What the command shows: tables, sizes, progress, errors."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from alphaquant.report import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from rich.progress import Task

    from alphaquant.engines import Violation
    from alphaquant.errors import AlphaQuantError
    from alphaquant.evaluation import Quality
    from alphaquant.pipeline import KindSize
    from alphaquant.pipeline import Progress as Report

__all__ = [
    "err",
    "out",
    "print_comparison",
    "print_error",
    "print_notes",
    "print_quality",
    "print_result",
    "print_sizes",
    "print_violations",
    "progress_bar",
]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_UNLIMITED = 1000


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
    if report["events"]:
        out.print(f"events {len(report['events'])}, the first: {report['events'][0]}", soft_wrap=True)


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
            f"same top-1 for {100 * agreement.top1_agreement:.2f}%",
            soft_wrap=True,
        )


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


class _Remaining(ProgressColumn):
    """Time left, from the layers that are done; nothing before the first is."""

    def render(self, task: Task) -> Text:
        if not task.completed or task.total is None or task.elapsed is None:
            return Text("ETA –", style="dim")
        left = task.elapsed / task.completed * (task.total - task.completed)
        return Text(f"ETA {left / 60:.0f}:{left % 60:02.0f}", style="dim")


@contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[Report]:
    """A bar over layers with phase, tokens a second and time left; nothing where standard error is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[layer]}"),
        TextColumn("{task.fields[phase]:<10}"),
        TextColumn("{task.fields[rate]}"),
        _Remaining(),
    )
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as bar:
        task = bar.add_task(title, total=None, layer="", phase="", rate="")
        previous: tuple[int, float] | None = None

        def report(phase: str, layer: int, num_layers: int, tokens: int = 0) -> None:
            nonlocal previous
            now = time.monotonic()
            rate = ""
            if previous is not None and previous[0]:
                rate = f"{previous[0] / max(now - previous[1], 1e-9):,.0f} tokens/s"
            previous = (tokens, now)
            fields = {"layer": f"layer {layer + 1}/{num_layers}", "phase": phase, "rate": rate}
            bar.tasks[0].fields.update({name: text for name, text in fields.items() if text})
            bar.update(task, total=num_layers, completed=layer)

        yield report
