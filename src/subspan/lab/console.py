"""What people see on the terminal while they wait, and at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from subspan.lab.config import Run
    from subspan.lab.doctor import Finding
    from subspan.lab.sweep import Outcome

console = Console(highlight=False)


def _progress(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
        transient=True,
    )  # fmt: skip


@dataclass
class TrainingProgress:
    """A bar of steps, and a line per epoch."""

    bar: Progress
    task: TaskID
    epochs: int

    def start(self, steps: int) -> None:
        """The number of steps is known."""
        self.bar.update(self.task, total=steps)

    def step(self) -> None:
        """One step is done."""
        self.bar.advance(self.task)

    def epoch(self, row: dict[str, Any]) -> None:
        """One epoch is done."""
        console.print(
            f"epoch {row['epoch']:>3}/{self.epochs}  train loss {row['train_loss']:.4f}  "
            f"validation loss {row['val_loss']:.4f}  accuracy {100 * row['val_accuracy']:.2f} %  "
            f"{row['seconds']:.1f} s"
        )


@contextmanager
def training(run: Run) -> Iterator[TrainingProgress]:
    """Progress of one run; the processes of one run after the first are silent."""
    import os

    console.quiet = os.environ.get("RANK", "0") != "0"
    with _progress("steps") as bar:
        task = bar.add_task(f"{run.training.net} on {run.training.data}, {run.method}", total=None)
        yield TrainingProgress(bar, task, run.training.epochs)


def trained(record: dict[str, Any], out: Path) -> None:
    """What a run came to."""
    stored, weights = record["stored_parameters"], record["weights"]
    console.print(
        f"test accuracy {100 * record['test_accuracy']:.2f} %, "
        f"{stored:,} numbers stored for {weights:,} weights ({weights / stored:,.0f} times fewer), "
        f"{record['checkpoint_bytes']:,} bytes, {record['seconds_total']:.1f} s"
        if stored < weights
        else f"test accuracy {100 * record['test_accuracy']:.2f} %, {stored:,} numbers stored, "
        f"{record['checkpoint_bytes']:,} bytes, {record['seconds_total']:.1f} s"
    )
    for note in record.get("notes", ()):
        console.print(f"note: {note}")
    console.print(f"model:  {out / 'model.safetensors'}\nrecord: {out / 'record.json'}", soft_wrap=True)


@contextmanager
def runs(total: int) -> Iterator[Any]:
    """Progress of a sweep: a bar of runs, and a line per run."""
    with _progress("runs") as bar:
        task = bar.add_task("sweep", total=total)

        def done(outcome: Outcome, left: int) -> None:
            job, found = outcome
            if isinstance(found, dict):
                accuracy = f"validation {100 * found['val_accuracy']:.2f} %"
                console.print(f"{job.name}: {accuracy}, {found['seconds_total']:.1f} s")
            else:
                console.print(f"[red]{job.name} failed:[/red] {found}")
            bar.update(task, completed=total - left)

        yield done


def swept(result: dict[str, Any], files: Sequence[Path]) -> None:
    """The table of a sweep, its intrinsic dimensions, what failed, and where the picture is."""
    table = Table("method", "d", "lr", "test accuracy %", "seeds", "stored", "bytes", "s / run")
    baseline = result["baseline"]
    for row in ([baseline] if baseline else []) + result["rows"]:
        accuracies = [100 * a for a in row["test_accuracy"]]
        mean = sum(accuracies) / len(accuracies)
        spread = f" ({min(accuracies):.2f} … {max(accuracies):.2f})" if len(accuracies) > 1 else ""
        table.add_row(
            row["method"], f"{row['dim']:,}", f"{row['lr']:g}", f"{mean:.2f}{spread}",
            str(len(accuracies)), f"{row['stored_parameters']:,}", f"{row['checkpoint_bytes']:,}",
            f"{sum(row['seconds_total']) / len(accuracies):.1f}",
        )  # fmt: skip
    console.print(table)
    for name, found in result["d_int"].items():
        percent = round(100 * found["threshold"])
        value = "not reached" if found["value"] is None else f"{found['value']:.0f}"
        ends = [found["low"], found["high"]]
        interval = f" [{ends[0]:.0f}, {ends[1]:.0f}]" if None not in ends else ""
        note = f" ({found['note']})" if found["note"] else ""
        console.print(
            f"intrinsic dimension of {name}, {percent} % of the baseline: {value}{interval}{note}",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    for failure in result["failed"]:
        console.print(f"failed: {failure['run']}: {failure['error']}", markup=False, soft_wrap=True)
    for path in files:
        if path.name in ("curve.png", "report.html"):
            kind = "picture" if path.suffix == ".png" else "report"
            console.print(f"{kind}: {path}", soft_wrap=True)


def listing(rows: Iterable[tuple[str, str, str]]) -> None:
    """Names with a line and a source."""
    for name, title, source in rows:
        console.print(f"{name}\n    {title}\n    {source}", markup=False)


def facts(content: dict[str, Any]) -> None:
    """Names and values, nested ones indented."""
    console.print(_lines(content, ""), markup=False, soft_wrap=True)


def _lines(content: dict[str, Any], indent: str) -> str:
    lines = []
    for name, value in content.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", _lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {f'{value:,}' if type(value) is int else value}")
    return "\n".join(lines)


def diagnosis(findings: Iterable[Finding]) -> None:
    """The doctor's findings."""
    for finding in findings:
        mark = "[green]ok[/green]  " if finding.well else "[red]ILL[/red] "
        console.print(f"{mark}{finding.subject}: {finding.seen}", soft_wrap=True)
