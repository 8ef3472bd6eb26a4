"""``subspan train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from subspan.commands.parsing import (
    Arguments,
    add_log,
    add_options,
    add_out,
    instance,
    list_methods,
    make_parser,
    options_given,
    parse,
    trackers_given,
)
from subspan.errors import Stopped, SubspanError

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from subspan.training.config import Run


def main(argv: Arguments) -> None:
    """Train one network by one method."""
    from subspan import distributed
    from subspan.commands import console
    from subspan.training.config import Run, Training
    from subspan.training.methods import method
    from subspan.training.train import train as run_training

    parser = make_parser("train", main.__doc__, list_methods())
    parser.add_class_arguments(Training, as_group=False)
    parser.add_argument("--method", type=str, default="hash", help="how, see the list below")
    parser.add_argument("--lr", type=float | None, default=None, help="null: the method's own")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    add_options(parser)
    add_log(parser)
    add_out(parser, "runs/train")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with what --out says was begun there; no other option is needed. (The command "
        "that began it does the same, if it is given again.)",
    )
    given = parse(parser, argv)

    out, log = Path(given.out), trackers_given(given)
    if given.resume:
        run, before = _begun(parser.parse_args(argv, defaults=False), out)
        log = log or before
    else:
        how = method(given.method)
        options = options_given(given)
        rates = how.rates(options)
        lr = rates[len(rates) // 2] if given.lr is None else given.lr
        run = Run(instance(Training, given), given.method, options, lr, given.seed)
    with console.training(run, resumed=given.resume) as progress:
        try:
            record = run_training(
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
    console.trained(record, out, anew=progress.started)
    distributed.leave()


def _begun(given: Namespace, out: Path) -> tuple[Run, tuple[str, ...]]:
    """The run of a record, and its trackers; options that are given must be the record's own."""
    from subspan.training.config import Run
    from subspan.training.records import RunRecord, changes, differences

    record = RunRecord.read(out)
    if record is None:
        raise SubspanError(f"nothing was begun in {out}: it has no record.json")
    run = Run.from_dict(record.config)
    theirs = record.config | run.options
    apart = ("config", "log", "out", "overwrite", "resume")
    ours = {name: value for name, value in given.items() if name not in apart}
    if different := differences(theirs, theirs | ours):
        raise SubspanError(
            f"{out} was begun with another configuration ({changes(different)}): leave that out "
            "to go on, or give another --out"
        )
    return run, tuple(record.log)
