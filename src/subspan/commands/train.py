"""``subspan train``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace
from rich.progress import Progress, TaskID

from subspan import distributed
from subspan.commands import console
from subspan.commands.method_options import add_method_options, list_methods, read_method_options
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.commands.recipe import open_recipe
from subspan.commands.shared_options import add_log, add_out, trackers_given
from subspan.commands.task_options import add_training, list_tasks, read_training
from subspan.errors import Stopped, SubspanError
from subspan.training.config import Run
from subspan.training.folder import RunFolder
from subspan.training.methods import method
from subspan.training.prepare import complete_options
from subspan.training.records import CompleteRun, Epoch, RunRecord, changes, differences
from subspan.training.score import ACCURACY, Score
from subspan.training.train import train


def main(argv: Arguments) -> None:
    """Train one network by one method."""
    argv = open_recipe(argv)
    epilog = f"{list_methods('train', 'method')}\n\n{list_tasks('train')}"
    parser = Parser("train", main.__doc__, epilog)
    add_training(parser, argv)
    parser.add_fields(Run, without=("training", "options"), method="hash", lr=None)
    if "--resume" in argv:
        add_method_options(parser, argv, {})
    else:
        add_method_options(parser, argv, {"method": "hash"})
    add_log(parser)
    add_out(parser, "runs/train")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run that was begun in --out; no other option is needed. (The command "
        "that began it does the same, if it is given again.)",
    )
    given = parse(parser, argv)

    out, log = Path(given.out), trackers_given(given)
    if given.resume:
        run, trackers = _read_begun(parse(parser, argv, defaults=False), out)
        log = log or trackers
    else:
        how, training = method(given.method), read_training(given)
        options = complete_options(read_method_options(given), how, training)
        rates = how.tried_rates(options)
        lr = rates[len(rates) // 2] if given.lr is None else given.lr
        run = Run(training, given.method, options, lr, given.seed)
    with show_progress(run, resumed=given.resume) as progress:
        try:
            record = train(
                run,
                out,
                overwrite=given.overwrite,
                report=progress.epoch,
                on_step=progress.step,
                on_start=progress.start,
                log=log,
            )
        except Stopped as stopped:
            go_on = f"; to go on: subspan train --resume --out {out}"
            raise Stopped(f"{stopped}{go_on}", stopped.signal) from None
    show_result(record, out, complete_before=not progress.started)
    distributed.leave()


def _read_begun(given: Namespace, out: Path) -> tuple[Run, tuple[str, ...]]:
    """Read the run of a record, and its trackers; options that are given must be the record's."""
    record = RunRecord.read(out)
    if record is None:
        raise SubspanError(f"nothing was begun in {out}: it has no record.json")
    run = Run.from_dict(record.config)
    theirs = record.config | run.options
    apart = ("config", "log", "out", "overwrite", "recipe", "resume")
    ours = {name: value for name, value in given.items() if name not in apart}
    if different := differences(theirs, theirs | ours):
        raise SubspanError(
            f"{out} was begun with another configuration ({changes(different)}): leave that out "
            "to go on, or give another --out"
        )
    return run, tuple(record.log)


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
        """Show how many steps there are, and how many were made before."""
        self.started, self.score = True, score
        self.bar.update(self.task, total=steps, completed=done)
        before = f", going on after {done:,}" if done else ""
        if self.resumed and not done:
            before = ", from the first on: there is no state of it to go on from"
        how = f"{self.run.training.title}, {self.run.method}, lr {self.run.lr:g}"
        console.say(f"{how}: {steps:,} steps{before}")

    def step(self) -> None:
        """Count a step."""
        self.bar.advance(self.task)

    def epoch(self, row: Epoch) -> None:
        """Show an epoch."""
        training = self.run.training
        epochs = f"/{training.epochs}" if training.steps is None else ""
        console.say(
            f"epoch {row.epoch:>3}{epochs}  train loss {row.train_loss:.4f}  "
            f"validation loss {row.val_loss:.4f}  "
            f"{self.score.name} {self.score.show(row.val_score)}  "
            f"{row.seconds:.1f} s"
        )


@contextmanager
def show_progress(run: Run, *, resumed: bool = False) -> Iterator[TrainingProgress]:
    """Show the progress of a run; of its processes only the first says anything."""
    console.console.quiet = os.environ.get("RANK", "0") != "0"
    with console.progress("steps") as bar:
        yield TrainingProgress(bar, bar.add_task("training", total=None), run, resumed)


def show_result(record: CompleteRun, out: Path, *, complete_before: bool) -> None:
    """Show the result of a run, of this command or of one before."""
    if complete_before:
        console.say("complete already, not repeated")
    stored, weights, score = record.stored_parameters, record.weights, record.score
    fewer = f" for {weights:,} weights ({weights / stored:,.0f} times fewer)"
    console.say(
        f"test {score.name} {score.show(record.test_score)}, {stored:,} numbers stored"
        f"{fewer if stored < weights else ''}, {record.checkpoint_bytes:,} bytes, "
        f"{record.seconds_total:.1f} s"
    )
    for note in record.notes:
        console.say(f"note: {note}")
    files = RunFolder(out, writes=False)
    compact = f" and {files.compact}" if files.compact.exists() else ""
    console.say(f"model:  {files.model}{compact}\nrecord: {out / RunRecord.FILE}")
