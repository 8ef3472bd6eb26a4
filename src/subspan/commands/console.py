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

from subspan.training.records import grouped
from subspan.training.score import ACCURACY, Score

if TYPE_CHECKING:
    from subspan.commands.doctor import Finding
    from subspan.sweeps.job import Outcome
    from subspan.sweeps.result import SweepRecord
    from subspan.training.config import Run
    from subspan.training.records import CompleteRun, Epoch

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

    def epoch(self, row: Epoch) -> None:
        """One epoch is done."""
        epochs = self.run.training.epochs
        say(
            f"epoch {row.epoch:>3}/{epochs}  train loss {row.train_loss:.4f}  "
            f"validation loss {row.val_loss:.4f}  "
            f"{self.score.name} {self.score.show(row.val_score)}  "
            f"{row.seconds:.1f} s"
        )


@contextmanager
def training(run: Run, *, resumed: bool = False) -> Iterator[TrainingProgress]:
    """Progress of one run; the processes of one run after the first are silent."""
    import os

    console.quiet = os.environ.get("RANK", "0") != "0"
    with _progress("steps") as bar:
        yield TrainingProgress(bar, bar.add_task("training", total=None), run, resumed)


def trained(record: CompleteRun, out: Path, *, anew: bool) -> None:
    """What a run came to, one that was complete before or one that was trained anew."""
    if not anew:
        say("complete already, not repeated")
    stored, weights, score = record.stored_parameters, record.weights, record.score
    fewer = f" for {weights:,} weights ({weights / stored:,.0f} times fewer)"
    say(
        f"test {score.name} {score.show(record.test_score)}, {stored:,} numbers stored"
        f"{fewer if stored < weights else ''}, {record.checkpoint_bytes:,} bytes, "
        f"{record.seconds_total:.1f} s"
    )
    for note in record.notes:
        say(f"note: {note}")
    say(f"model:  {out / 'model.safetensors'}\nrecord: {out / 'record.json'}")


@contextmanager
def runs(total: int) -> Iterator[Any]:
    """Progress of a sweep: a bar of runs, and a line per run."""
    with _progress("runs") as bar:
        task = bar.add_task("sweep", total=total)
        shown = set[str]()  # errors whose traceback was shown, which many runs may have

        def done(outcome: Outcome, left: int) -> None:
            name, record = outcome.job.name, outcome.record
            if record is not None:
                score = record.score.show(record.val_score)
                say(f"{name}: validation {score}, {record.seconds_total:.1f} s")
            else:
                if outcome.traceback and outcome.error not in shown:
                    shown.add(outcome.error)
                    say(outcome.traceback.rstrip())
                say(f"{name} failed: {outcome.error}", style="red")
            bar.update(task, completed=total - left)

        yield done


def swept(result: SweepRecord, files: Sequence[Path]) -> None:
    """What a sweep came to: its table, intrinsic dimensions, failures, and where the picture is.

    Scores are means over seeds ± their standard deviation.
    """
    score = result.score
    judged = f"test {score.name}{score.unit}"
    table = _table("method", "d", "lr", judged, "seeds", "stored", "bytes", "s / run")
    for row in result.points:
        table.add_row(
            row.small or row.method,
            f"{row.dim:,}",
            f"{row.lr:g}",
            score.summary(row.test_score),
            str(len(row.test_score)),
            f"{row.stored_parameters:,}",
            f"{row.checkpoint_bytes:,}",
            f"{statistics.fmean(row.seconds_total):.1f}",
        )
    console.print(table)
    for name, found in result.d_int.items():
        low, high = found.low, found.high
        interval = f" [{low:.0f}, {high:.0f}]" if low is not None and high is not None else ""
        note = f" ({found.note})" if found.note else ""
        value = found.note if found.value is None else f"{found.value:.0f}{interval}{note}"
        share = f"{100 * found.threshold:g} % of the baseline"
        say(f"intrinsic dimension of {name}, {share}: {value}")
    for failure in result.failed:
        say(f"failed: {failure.run}: {failure.error}", style="red")
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
    """The tables of a benchmark, and where its picture is.

    Times are medians ± half their interquartile range. No product can be faster than the bytes move
    that it must touch: those of P that exist, and both vectors.
    """
    copy = record["machine"]["copy_bytes_per_second"]
    say(f"{record['machine']['device']}; a copy moves {copy / 1e9:.1f} GB/s")
    for (out_dim, in_dim), rows in grouped(record.get("products", ()), "out_dim", "in_dim"):
        say(f"\nproducts at D = {out_dim:,}, d = {in_dim:,}")
        base = next((row for row in rows if row["projection"] == "stored-dense"), {})
        table = _table(
            "projection",
            "bytes of P",
            "P w ms",
            "× stored",
            "× its bytes",
            "Pᵀ g ms",
            "× stored",
            "× its bytes",
        )
        for row in rows:
            cells = [f"{row['bytes_of_p']:,}"] if "bytes_of_p" in row else [row["skipped"]]
            for key in ("forward", "backward") if "forward" in row else ():
                whole = base.get(key)
                limit = (row["bytes_of_p"] + 4 * (out_dim + in_dim)) / copy
                cells += [_milliseconds(row[key]), _ratio(row[key], whole) if whole else ""]
                cells.append(f"{row[key]['median'] / limit:.3g}")
            table.add_row(row["projection"], *cells)
        console.print(table)
    for part, title, against in (
        ("steps", "training step", "adam"),
        ("optimizers", "step in redrawn bases", "sgd"),
    ):
        for (net,), rows in grouped(record.get(part, ()), "net"):
            first = rows[0]
            say(
                f"\n{title} of {net}, {first['weights']:,} weights, d = {first['dim']:,}, "
                f"batch of {first['batch_size']}"
            )
            table = _table("trained by", "step ms", f"× {against}")
            for row in rows:
                if "step" in row:
                    cells = [_milliseconds(row["step"]), _ratio(row["step"], first["step"])]
                else:
                    cells = [row["skipped"]]
                table.add_row(row["projection"], *cells)
            console.print(table)
    if record.get("memory"):
        say("\npeak memory of two steps: θ₀, θ, gradient, optimizer, P and all temporaries")
        table = _table("D", "d", "trained by", "bytes", "× 4·D")
        for row in record["memory"]:
            peak = row.get("peak_bytes")
            cells = (
                [row["skipped"]]
                if peak is None
                else [f"{peak:,}", f"{peak / (4 * row['out_dim']):.2f}"]
            )
            table.add_row(f"{row['out_dim']:,}", f"{row['in_dim']:,}", row["projection"], *cells)
        console.print(table)
    for (width,), rows in grouped(record.get("lowrank", ()), "width"):
        dense = rows[0]
        say(f"\nfive hidden layers of {width:,}, batch of {dense['batch_size']}, SGD inside")
        table = _table(
            "rank",
            "step ms",
            "× dense",
            "ranks may change ms",
            "× dense",
            "inference ms",
            "× dense",
            "peak bytes",
            "× dense",
        )
        for row in rows:
            cells = [f"{row['rank']:,}" if row["rank"] else "dense"]
            for key, of in (("step", "step"), ("adaptive", "step"), ("inference", "inference")):
                there = key in row
                cells += (
                    [_milliseconds(row[key]), _ratio(row[key], dense[of])] if there else ["", ""]
                )
            cells += [f"{row['peak_bytes']:,}", f"{row['peak_bytes'] / dense['peak_bytes']:.3g}"]
            table.add_row(*cells)
        console.print(table)
    for (what,), rows in grouped(record.get("sums", ()), "what"):
        dense = rows[0]
        say(f"\n{what}, batch of {dense['batch_size']}")
        table = _table("made of", "numbers", "bytes stored", "bytes of M", "ms", "× dense")
        for row in rows:
            counts = [f"{row[key]:,}" for key in ("numbers", "bytes_stored", "bytes_of_m")]
            cells = [*counts, _milliseconds(row["step"]), _ratio(row["step"], dense["step"])]
            table.add_row(row["projection"], *cells)
        console.print(table)
    for (net, name), rows in grouped(record.get("laboratory", ()), "net", "method"):
        bare = rows[0]
        say(f"\nepoch of {net}, {name}: {bare['images']:,} images, batch of {bare['batch_size']}")
        table = _table("loop", "epoch ms", "× bare")
        for row in rows:
            table.add_row(
                row["projection"], _milliseconds(row["step"]), _ratio(row["step"], bare["step"])
            )
        console.print(table)
    for (blocks, batch, allocator), rows in grouped(
        record.get("blocks", ()), "blocks", "batch_size", "allocator"
    ):
        _large(f"blocks {blocks}, batch of {batch}, memory {allocator}", rows)
    for (dtype, tokens), rows in grouped(record.get("transformer", ()), "dtype", "tokens"):
        _large(f"a decoder in {dtype}, {tokens} tokens", rows)
    for path in files:
        say(f"{'picture' if path.suffix == '.png' else 'record'}: {path}")


def _large(what: str, rows: Sequence[dict[str, Any]]) -> None:
    """The table of a large network: each way to train it, with its time, memory and loss."""
    first = rows[0]
    say(f"\n{what}: {first['weights']:,} weights, d = {first['dim']:,}")
    known = next((row for row in rows if "peak_bytes" in row), None)
    if known is not None:
        say(
            f"θ₀ takes {known['weight_bytes'] / 1e6:,.1f} MB, its largest tensor "
            f"{known['largest_bytes'] / 1e6:,.1f} MB, the libraries "
            f"{known['library_bytes'] / 1e6:,.0f} MB or so; the peaks are beyond these"
        )
    allowed = any("allowed_bytes" in row for row in rows)
    table = _table(
        "trained by",
        "numbers",
        "step ms",
        "× full",
        "peak MB",
        "× θ₀",
        *["× (3 × largest + activations)"] * allowed,
        "loss",
        "after",
    )
    for row in rows:
        if "skipped" in row:
            table.add_row(row["projection"], row["skipped"])
            continue
        cells = [f"{row['numbers']:,}", _milliseconds(row["step"])]
        cells.append(_ratio(row["step"], first["step"]) if "step" in first else "")
        cells.append(f"{row['peak_bytes'] / 1e6:,.1f}")
        cells.append(f"{row['peak_bytes'] / row['weight_bytes']:.3f}")
        if allowed:
            cells.append(f"{row['peak_bytes'] / row['allowed_bytes']:.2f}")
        cells += [f"{loss:.5g}" for loss in row["losses"]]
        table.add_row(row["projection"], *cells)
    console.print(table)


def _table(*names: str) -> Table:
    return Table(
        *(Column(name, no_wrap=True) for name in names),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


def _milliseconds(timing: dict[str, float]) -> str:
    spread = (timing["high"] - timing["low"]) / 2
    return f"{1e3 * timing['median']:.3f} ± {1e3 * spread:.3f}"


def _ratio(timing: dict[str, float], base: dict[str, float]) -> str:
    return f"{timing['median'] / base['median']:.3g}"


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
