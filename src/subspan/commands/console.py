"""What people see on the terminal while they wait, and at the end."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
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
from rich.table import Column, Table

from subspan.training.score import ACCURACY, Score

if TYPE_CHECKING:
    from subspan.commands.doctor import Finding
    from subspan.sweeps.jobs import Outcome
    from subspan.training.config import Run

console = Console(highlight=False, markup=False, emoji=False)
if not console.is_terminal:
    console.width = 200  # a file has no columns that a table must fit into


def say(text: str, style: str | None = None) -> None:
    """Print lines as they are, however long: what reads them may be no terminal."""
    console.print(text, style=style, soft_wrap=True)


def _progress(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@dataclass
class TrainingProgress:
    """A bar of steps, and a line per epoch."""

    bar: Progress
    task: TaskID
    run: Run
    resumed: bool = False
    started: bool = False
    score: Score = ACCURACY

    def start(self, steps: int, done: int, score: Score) -> None:
        """The number of steps is known, how many were made before, and what is judged by."""
        self.started, self.score = True, score
        self.bar.update(self.task, total=steps, completed=done)
        before = f", going on after {done:,}" if done else ""
        if self.resumed and not done:
            before = ", from the first on: there is no state of it to go on from"
        how = f"{self.run.training.title}, {self.run.method}, lr {self.run.lr:g}"
        say(f"{how}: {steps:,} steps{before}")

    def step(self) -> None:
        """One step is done."""
        self.bar.advance(self.task)

    def epoch(self, row: dict[str, Any]) -> None:
        """One epoch is done."""
        epochs = self.run.training.epochs
        say(
            f"epoch {row['epoch']:>3}/{epochs}  train loss {row['train_loss']:.4f}  "
            f"validation loss {row['val_loss']:.4f}  "
            f"{self.score.name} {self.score.show(row['val_score'])}  "
            f"{row['seconds']:.1f} s"
        )


@contextmanager
def training(run: Run, *, resumed: bool = False) -> Iterator[TrainingProgress]:
    """Progress of one run; the processes of one run after the first are silent."""
    import os

    console.quiet = os.environ.get("RANK", "0") != "0"
    with _progress("steps") as bar:
        yield TrainingProgress(bar, bar.add_task("training", total=None), run, resumed)


def trained(record: dict[str, Any], out: Path, *, anew: bool) -> None:
    """What a run came to, one that was complete before or one that was trained anew."""
    if not anew:
        say("complete already, not repeated")
    stored, weights = record["stored_parameters"], record["weights"]
    score = Score.of(record)
    fewer = f" for {weights:,} weights ({weights / stored:,.0f} times fewer)"
    say(
        f"test {score.name} {score.show(record['test_score'])}, {stored:,} numbers stored"
        f"{fewer if stored < weights else ''}, {record['checkpoint_bytes']:,} bytes, "
        f"{record['seconds_total']:.1f} s"
    )
    for note in record.get("notes", []):
        say(f"note: {note}")
    say(f"model:  {out / 'model.safetensors'}\nrecord: {out / 'record.json'}")


@contextmanager
def runs(total: int) -> Iterator[Any]:
    """Progress of a sweep: a bar of runs, and a line per run."""
    with _progress("runs") as bar:
        task = bar.add_task("sweep", total=total)

        def done(outcome: Outcome, left: int) -> None:
            job, found = outcome
            if isinstance(found, dict):
                score = Score.of(found).show(found["val_score"])
                say(f"{job.name}: validation {score}, {found['seconds_total']:.1f} s")
            else:
                say(f"{job.name} failed: {found}", style="red")
            bar.update(task, completed=total - left)

        yield done


def swept(result: dict[str, Any], files: Sequence[Path]) -> None:
    """What a sweep came to: its table, intrinsic dimensions, failures, and where the picture is.

    Scores are means over seeds ± their standard deviation.
    """
    score = Score.of(result)
    judged = f"test {score.name}{score.unit}"
    table = _table("method", "d", "lr", judged, "seeds", "stored", "bytes", "s / run")
    baseline = result["baseline"]
    for row in ([baseline] if baseline else []) + result["rows"]:
        table.add_row(
            row.get("small") or row["method"],
            f"{row['dim']:,}",
            f"{row['lr']:g}",
            score.summary(row["test_score"]),
            str(len(row["test_score"])),
            f"{row['stored_parameters']:,}",
            f"{row['checkpoint_bytes']:,}",
            f"{statistics.fmean(row['seconds_total']):.1f}",
        )
    console.print(table)
    for name, found in result["d_int"].items():
        ends = [found["low"], found["high"]]
        interval = f" [{ends[0]:.0f}, {ends[1]:.0f}]" if None not in ends else ""
        note = f" ({found['note']})" if found["note"] else ""
        value = found["note"] if found["value"] is None else f"{found['value']:.0f}{interval}{note}"
        share = f"{100 * found['threshold']:g} % of the baseline"
        say(f"intrinsic dimension of {name}, {share}: {value}")
    for failure in result["failed"]:
        say(f"failed: {failure['run']}: {failure['error']}", style="red")
    for path in files:
        if path.name in ("curve.png", "report.html"):
            kind = "picture" if path.suffix == ".png" else "report"
            say(f"{kind}: {path}")


@contextmanager
def measuring(total: int) -> Iterator[Any]:
    """Progress of a benchmark: a bar, and a line for everything that is measured."""
    with _progress("measured") as bar:
        task = bar.add_task("bench", total=total)

        def done(what: str) -> None:
            say(f"measured: {what}")
            bar.advance(task)

        yield done
        if not bar.tasks[task].completed:
            say("complete already, not repeated: --overwrite measures again")


def benched(record: dict[str, Any], files: Sequence[Path]) -> None:
    """The tables of a benchmark, and where its picture is."""
    from subspan.bench.part import measured

    machine = record["machine"]
    say(f"{machine['device']}; a copy moves {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s")
    for part, rows in measured(record):
        for some in part.groups(rows):
            say(f"\n{part.heading(some)}")
            found = part.table(some, machine)
            table = _table(*found.columns)
            for line in found.rows:
                table.add_row(*line)
            console.print(table)
    for path in files:
        say(f"{'picture' if path.suffix == '.png' else 'record'}: {path}")


def _table(*names: str) -> Table:
    return Table(
        *(Column(name, no_wrap=True) for name in names),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


def listing(rows: Iterable[tuple[str, str, str]]) -> None:
    """Names with a line and a source."""
    for name, title, source in rows:
        say(f"{name}\n    {title}\n    {source}")


def facts(content: dict[str, Any]) -> None:
    """Names and values, nested ones indented."""
    say(_lines(content, ""))


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
        mark = "ok " if finding.well else "ILL"
        say(f"{mark} {finding.subject}: {finding.seen}", style=None if finding.well else "red")
