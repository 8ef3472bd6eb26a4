"""``subspan intrinsic``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from subspan import report
from subspan.commands.parsing import Arguments, Parser, parse, read_fields, take
from subspan.commands.recipe import open_recipe
from subspan.commands.shared_options import add_running, read_running
from subspan.commands.sweep import show_runs, show_sweep
from subspan.commands.task_options import add_training, list_tasks, read_training
from subspan.sweeps.growth import METHOD, Growth, GrowthPlan
from subspan.sweeps.plan import carry_out
from subspan.training.methods import method

HIDDEN = ("dim", "stages", "until", "bits")  # what this command says itself, and what has no use
EPILOG = """\
how it works:
  First all weights are trained, in --epochs. Then, for every seed, one training passes through
  the --dims: it begins with the first d, and after --stage-epochs it goes on from the very same
  weights with the next one, since the subspace of d lies inside that of a multiple of d. The test
  score at the end of every stage is a point of the curve, and the intrinsic dimension is where the
  mean curve first reaches the --threshold. One stage later the training ends.

how far to trust it:
  A stage is short, so that the curve lies a little below that of separate trainings, and the
  dimension comes out larger, by 10 and 15 % for two networks on MNIST and by 3 % for one on
  CIFAR-10 with 8 --stage-epochs: more of these bring it nearer, and so does an --lr that suits the
  network; the higher validation scores tell it. The interval is one over seeds; with one seed
  there is none. 'subspan sweep' trains each d for itself, at several rates.

example:
  subspan intrinsic --net mlp --data digits --dims 5,10,20,40,80,160 --seeds 3 --out runs/d-int
"""


def main(argv: Arguments) -> None:
    """The intrinsic dimension of a network and a task, from one training in which d grows.

    Options that take several values take them separated by commas, or as a YAML list. The same
    command given again goes on where it was interrupted.
    """
    argv = open_recipe(argv)
    parser = Parser("intrinsic", main.__doc__, f"{EPILOG}\n{list_tasks('intrinsic')}")
    add_training(parser, argv)
    parser.add_fields(Growth, without=("training", "options"))
    own = [o for o in method(METHOD).options if o.name not in HIDDEN]
    for option in own:
        parser.add_option(option)
    add_running(parser, "runs/intrinsic")
    given = parse(parser, argv)

    options = take(given, [option.name for option in own])
    config = read_fields(Growth, given, training=read_training(given), options=options)
    running, out = read_running(given), Path(given.out)
    plan = GrowthPlan(config)
    with show_runs(plan.total) as on_run:
        result = carry_out(plan, out, replace(running, on_run=on_run))
    show_sweep(result, report.write(out))
