"""``subspan sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subspan.commands.parsing import (
    Arguments,
    add_jobs,
    add_log,
    add_options,
    add_out,
    instance,
    list_methods,
    make_parser,
    options_given,
    parse,
    show_sweep,
    trackers_given,
)
from subspan.errors import SubspanError


def main(argv: Arguments) -> None:
    """Accuracy against the number of coordinates, and the intrinsic dimension."""
    from dataclasses import replace

    from subspan import report
    from subspan.commands import console
    from subspan.experiments.many import sweep_parts
    from subspan.files import readable
    from subspan.sweeps.smaller import beside
    from subspan.sweeps.sweep import total_runs
    from subspan.training import config

    parser = make_parser("sweep", main.__doc__, list_methods())
    parser.add_class_arguments(config.Training, as_group=False)
    lists = "separated by commas, or a YAML list"
    parser.add_argument(
        "--methods", type=list[str] | str, default="hash", help=f"names as below, {lists}"
    )
    parser.add_argument(
        "--dims",
        type=list[str | int] | str | int,
        default="10,30,100,300,1000,3000",
        help=f"numbers of coordinates, {lists}; 600+250 gives those of each compartment; of dlrt "
        "tolerances, 0.05,0.1,0.2, of dlrt-ratio shares, of prodsum atoms (p)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many: 0, 1, …")
    parser.add_argument(
        "--lrs",
        type=dict[str, Any] | list[str | float] | str | float | None,
        default=None,
        help=f"learning rates to choose from at every d, on the validation part, {lists}; or "
        "those of each method, {rbd: [1, 2], fpd: 4}; null: the methods' own",
    )
    parser.add_argument(
        "--baseline", type=str | None, default="full", help="what the others are held against"
    )
    parser.add_argument(
        "--baseline_lrs",
        type=list[str | float] | str | float | None,
        default=None,
        help="the same, of the baseline",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.9, help="share of the baseline's score for d_int"
    )
    parser.add_argument(
        "--nets",
        type=list[str] | str | None,
        default=None,
        help=f"networks to compare at equal d, in place of --net, {lists}: each has a folder and "
        "its curves, and there is one picture of all",
    )
    parser.add_argument(
        "--small",
        type=list[str] | str | None,
        default=None,
        help=f"smaller networks to hold projections against, by name, {lists}: all their weights "
        "are trained; auto: the largest of the same kind that have at most d weights, at every d",
    )
    add_options(parser, without=("dim",))
    add_jobs(parser)
    add_log(parser)
    add_out(parser, "runs/sweep")
    given = parse(parser, argv)

    settings = config.Sweep(
        training=instance(config.Training, given),
        methods=config.split(given.methods, "methods"),
        dims=config.split(given.dims, "dims"),
        seeds=given.seeds,
        lrs=() if given.lrs is None else config.rates(given.lrs, "lrs"),
        options=options_given(given),
        threshold=given.threshold,
        baseline=given.baseline,
        baseline_lrs=()
        if given.baseline_lrs is None
        else config.floats(given.baseline_lrs, "baseline_lrs"),
    )
    nets = [settings.training.net] if given.nets is None else config.split(given.nets, "nets")
    parts = {}
    for net in nets:
        part = replace(settings, training=replace(settings.training, net=net))
        if given.small == "auto":
            part = replace(part, small=beside(part))
        elif given.small is not None:
            part = replace(part, small=config.split(given.small, "small"))
        parts["" if given.nets is None else readable(str(net))] = part
    if len(parts) < len(nets):
        raise SubspanError(f"nets names one network twice: {', '.join(map(str, nets))}")
    out = Path(given.out)
    with console.runs(sum(map(total_runs, parts.values()))) as progress:
        results = sweep_parts(
            parts,
            out,
            jobs=given.jobs,
            overwrite=given.overwrite,
            on_run=progress,
            backend=given.backend,
            ray_address=given.ray_address,
            say=console.say,
            log=trackers_given(given),
        )
    for name, result in results.items():
        if name:
            console.say(f"\n{name}")
        show_sweep(result, [out / name / file for file in ("curve.png", "report.html")])
    if given.nets is not None:
        picture, _ = report.write_comparison(out, {name: out / name for name in parts})
        console.say(f"\npicture of all: {picture}")
