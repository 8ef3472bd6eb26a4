"""``subspan reproduce``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from subspan.bench import total as bench_total
from subspan.commands import console
from subspan.commands.bench import show_bench, show_progress
from subspan.commands.method_options import options_in
from subspan.commands.parsing import LISTED, Arguments, Parser, parse
from subspan.commands.shared_options import add_running, read_running
from subspan.commands.sweep import show_runs, show_sweep
from subspan.errors import SubspanError
from subspan.experiments import ALL, Benchmark, Experiment, experiment, experiments, reproduce
from subspan.experiments.everything import reproduce_all
from subspan.files import readable
from subspan.sweeps.running import Running
from subspan.sweeps.sweep import total_runs
from subspan.training.config import split


def main(argv: Arguments) -> None:
    """Run a published experiment, or all, and show published and measured side by side.

    An experiment of your own is a YAML file: docs/add-an-experiment.md.
    """
    listing = "\n".join(f"  {name}: {e.title}" for name, e in experiments().items())
    parser = Parser("reproduce", main.__doc__, f"experiments:\n{listing}")
    parser.add_argument(
        "name",
        nargs="?",
        type=str | None,
        default=options_in(argv).get("name"),  # of --config, which none would replace
        help="one of the experiments below; a YAML file of your own, FILE.yaml; all: those below "
        "one after the other, and one page of them all",
    )
    parser.add_argument("--list", action="store_true", help="list the experiments and end")
    parser.add_argument(
        "--budget",
        type=Literal["quick", "full"],
        default="quick",
        help="quick ends within ten minutes on two cores; full is nearer to the published recipe, "
        "with three seeds",
    )
    parser.add_argument(
        "--data",
        type=str | None,
        help="a data set in place of the published one, as fashion_mnist in place of mnist",
    )
    parser.add_argument(
        "--only",
        type=LISTED,
        help="parts of the experiment, separated by commas; the others are left for another time",
    )
    add_running(parser, None)
    given = parse(parser, argv)

    if given.list or given.name is None:
        for e in experiments().values():
            console.say(f"{e.name}\n    {e.title}\n    {e.source}")
        return
    running = read_running(given)
    other = f"-{Path(given.data).name}" if given.data else ""
    if given.name != ALL:
        chosen = experiment(given.name)
        out = given.out or f"runs/{readable(chosen.name)}{other}-{given.budget}"
        _reproduced(chosen, Path(out), given, running)
        return
    if given.data is not None:
        raise SubspanError("all experiments have data of their own: leave --data out")
    if given.only is not None:
        raise SubspanError("parts are those of one experiment: leave --only out")

    def one(name: str, folder: Path) -> None:
        console.say(f"\n{name}: {experiments()[name].title}")
        _reproduced(experiment(name), folder, given, running)

    out = Path(given.out or f"runs/{ALL}-{given.budget}")
    page, missing = reproduce_all(out, one)
    for sentence in missing:
        console.say(sentence, style="red")
    if page is None:
        raise SubspanError("no experiment could be run: see above")
    console.say(f"\npage of all: {page}")


def _reproduced(
    chosen: Experiment | Benchmark, out: Path, given: Namespace, running: Running
) -> None:
    """Run one experiment and show what came of it."""
    how: dict[str, Any] = {
        "budget": given.budget,
        "data": given.data,
        "only": () if given.only is None else split(given.only, "only"),
    }
    if isinstance(chosen, Benchmark):
        with show_progress(bench_total(chosen.bench(given.budget))) as done:
            [record] = reproduce(chosen, out, running, done=done, **how).values()
        show_bench(record, [out / "bench.json", out / "bench.png"])
        console.say(f"published: {chosen.source}")
        return
    # Where all are run, those whose runs are timed go one at a time.
    if chosen.timed and given.name == ALL:
        running = replace(running, jobs=1)
    parts = chosen.parts(given.budget, how["only"])
    with show_runs(sum(map(total_runs, parts.values()))) as on_run:
        results = reproduce(chosen, out, replace(running, on_run=on_run), **how)
    for part, result in results.items():
        if part:
            console.say(f"\n{part}")
        folder = out / part
        show_sweep(result, [*sorted(folder.glob("curve.*")), folder / "report.html"])
    if len(results) > 1:
        console.say(f"\npicture of all: {out / 'summary.png'}")
