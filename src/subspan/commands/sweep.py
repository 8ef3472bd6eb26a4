"""``subspan sweep``, and the progress and the results of sweeps on the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from subspan import report
from subspan.commands import console
from subspan.commands.method_options import add_method_options, list_methods, read_method_options
from subspan.commands.parsing import LISTED, Arguments, Parser, parse, read_fields
from subspan.commands.recipe import open_recipe
from subspan.commands.shared_options import add_running, read_running
from subspan.commands.task_options import add_training, list_tasks, read_training
from subspan.errors import SubspanError
from subspan.experiments.many import sweep_parts
from subspan.files import readable
from subspan.sweeps.intrinsic import has_shares
from subspan.sweeps.job import Outcome
from subspan.sweeps.result import SweepRecord
from subspan.sweeps.smaller import beside
from subspan.sweeps.sweep import total_runs
from subspan.training.config import Sweep, split


def main(argv: Arguments) -> None:
    """Accuracy against the number of coordinates, and the intrinsic dimension.

    Options that take several values take them separated by commas, or as a YAML list.
    """
    argv = open_recipe(argv)
    epilog = f"{list_methods('sweep', 'methods')}\n\n{list_tasks('sweep')}"
    parser = Parser("sweep", main.__doc__, epilog)
    add_training(parser, argv)
    parser.add_fields(
        Sweep, without=("training", "options", "processes"), dims="10,30,100,300,1000,3000"
    )
    parser.add_argument(
        "--nets",
        type=LISTED,
        help="networks to compare at equal d, in place of --net: each has a folder and its curves, "
        "and there is one picture of all",
    )
    add_method_options(parser, argv, {"methods": "hash"}, without=("dim",))
    add_running(parser, "runs/sweep")
    given = parse(parser, argv)

    training = read_training(given)
    settings = read_fields(Sweep, given, training=training, options=read_method_options(given))
    nets = [training.net] if given.nets is None else split(given.nets, "nets")
    parts = {}
    for net in nets:
        part = replace(settings, training=replace(training, net=net))
        if settings.small == ("auto",):
            part = replace(part, small=beside(replace(part, small=())))
        parts["" if given.nets is None else readable(str(net))] = part
    if len(parts) < len(nets):
        raise SubspanError(f"nets names one network twice: {', '.join(map(str, nets))}")
    running, out = read_running(given), Path(given.out)
    with show_runs(sum(map(total_runs, parts.values()))) as on_run:
        results = sweep_parts(parts, out, replace(running, on_run=on_run))
    for name, result in results.items():
        if name:
            console.say(f"\n{name}")
        show_sweep(result, [out / name / file for file in ("curve.png", "report.html")])
    if given.nets is not None:
        picture, _ = report.write_comparison(out, results)
        console.say(f"\npicture of all: {picture}")


@contextmanager
def show_runs(total: int) -> Iterator[Callable[[Outcome, int], None]]:
    """Show the progress of a sweep: a bar of runs, and a line per run."""
    with console.progress("runs") as bar:
        task = bar.add_task("sweep", total=total)
        shown = set[str]()  # errors whose traceback was shown, which many runs may have

        def on_run(outcome: Outcome, left: int) -> None:
            name, record = outcome.job.name, outcome.record
            if record is not None:
                score = record.score.show(record.val_score)
                console.say(f"{name}: validation {score}, {record.seconds_total:.1f} s")
            else:
                if outcome.traceback and outcome.error not in shown:
                    shown.add(outcome.error)
                    console.say(outcome.traceback.rstrip())
                console.say(f"{name} failed: {outcome.error}", style="red")
            bar.update(task, completed=total - left)

        yield on_run


def show_sweep(result: SweepRecord, files: Sequence[Path]) -> None:
    """Show the table of a sweep, intrinsic dimensions, failures, and where the picture is.

    Scores are means over seeds ± their standard deviation. If no run succeeded that is an error.
    """
    score = result.score
    head = any(point.head_parameters for point in result.points)
    judged = f"test {score.name}{score.unit}"
    console.print_table(
        ("method", "d", *["head"] * head, "lr", judged, "seeds", "stored", "bytes", "s / run"),
        [
            (
                point.small or point.method,
                f"{point.dim:,}",
                *[f"{point.head_parameters:,}"] * head,
                f"{point.lr:g}",
                score.summary(point.test_score),
                str(len(point.test_score)),
                f"{point.stored_parameters:,}",
                "–" if point.checkpoint_bytes is None else f"{point.checkpoint_bytes:,}",
                f"{statistics.fmean(point.seconds_total):.1f}",
            )
            for point in result.points
        ],
    )
    for name, dimension in result.d_int.items():
        value, note, low, high = dimension.value, dimension.note, dimension.low, dimension.high
        interval = f" [{low:.0f}, {high:.0f}]" if low is not None and high is not None else ""
        said = note if value is None else f"{value:.0f}{interval}{f' ({note})' if note else ''}"
        share = f"{100 * dimension.threshold:g} % of the baseline"
        console.say(f"intrinsic dimension of {name}, {share}: {said}")
    if result.baseline and not has_shares(result.baseline.test_score, score):
        zero = f"the baseline is no better than {score.zero:g}"
        console.say(f"no intrinsic dimension: {zero}, and there is nothing to take a share of")
    for failure in result.failed:
        console.say(f"failed: {failure.run}: {failure.error}", style="red")
    for path in files:
        if path.name in ("curve.png", "report.html"):
            kind = "picture" if path.suffix == ".png" else "report"
            console.say(f"{kind}: {path}")
    if not result.points:
        raise SubspanError(f"all runs failed, {len(result.failed)} of them: see above")
