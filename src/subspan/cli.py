"""The command line: arguments only. ``subspan COMMAND --help`` documents each command.

PyTorch takes seconds to import, so a command's parser is made, and what it needs imported, only
when that command is asked for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subspan import __version__
from subspan.errors import Stopped, SubspanError, unknown

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from subspan.training.config import Run

Arguments = Sequence[str]


def main(argv: Arguments | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 128 + n after signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"subspan {__version__}")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise unknown("command", arguments[0], COMMANDS)
        arguments = _import(arguments)
        COMMANDS[arguments[0]][0](arguments[1:])
    except SubspanError as error:
        print(f"subspan {arguments[0]}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without permission
        print(f"subspan {arguments[0]}: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"\nsubspan {arguments[0]}: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(f"\nsubspan {arguments[0]}: interrupted; what was complete is kept", file=sys.stderr)
        return 130
    return 0


def _import(arguments: list[str]) -> list[str]:
    """Import the modules of ``--import``, which may add to every registry; returns the rest.

    They stand in the environment, too, from which processes that are started for this command,
    workers of a sweep say, have them.
    """
    given, rest, words = [], [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--import":
            given.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    if given:
        from subspan.training.own import load, remember

        for module in given:
            load(module)
        remember(given)
    return rest


def overview() -> str:
    """What ``subspan --help`` says."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: subspan COMMAND [OPTIONS]",
            "",
            "Train any PyTorch network through far fewer numbers than it has weights, and store it",
            "as those numbers and a seed.",
            "",
            "commands:",
            *lines,
            "",
            "examples:",
            "  subspan train --net mlp --data digits --method hash --dim 300 --out runs/first",
            "  subspan sweep --net mlp --data digits --dims 10,30,100,300,1000 --out runs/curve",
            "",
            "'subspan COMMAND --help' explains a command; --config reads its options from YAML.",
        ]
    )


# ---- train and sweep -----------------------------------------------------------------------------


def train(argv: Arguments) -> None:
    """Train one network by one method."""
    from subspan import distributed
    from subspan.commands import console
    from subspan.training.config import Run, Training
    from subspan.training.methods import method
    from subspan.training.train import train as run_training

    parser = _parser("train", train.__doc__, _methods_help())
    parser.add_class_arguments(Training, as_group=False)
    parser.add_argument("--method", type=str, default="hash", help="how, see the list below")
    parser.add_argument("--lr", type=float | None, default=None, help="null: the method's own")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    _add_options(parser)
    _add_log(parser)
    _add_out(parser, "runs/train")
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with what --out says was begun there; no other option is needed. (The command "
        "that began it does the same, if it is given again.)",
    )  # fmt: skip
    given = _parse(parser, argv)

    out, log = Path(given.out), _trackers(given)
    if given.resume:
        run, before = _begun(parser.parse_args(argv, defaults=False), out)
        log = log or before
    else:
        how = method(given.method)
        options = _options(given)
        rates = how.rates(options)
        lr = rates[len(rates) // 2] if given.lr is None else given.lr
        run = Run(_instance(Training, given), given.method, options, lr, given.seed)
    with console.training(run, resumed=given.resume) as progress:
        try:
            record = run_training(
                run, out, overwrite=given.overwrite, report=progress.epoch,
                on_step=progress.step, on_start=progress.start, log=log,
            )  # fmt: skip
        except Stopped as stopped:
            go_on = f"; to go on: subspan train --resume --out {out}"
            raise Stopped(f"{stopped}{go_on}", stopped.signal) from None
    console.trained(record, out, anew=progress.started)
    distributed.leave()


def _begun(given: Namespace, out: Path) -> tuple[Run, tuple[str, ...]]:
    """The run of a record, and its trackers; options that are given must be the record's own."""
    from subspan.training.config import Run
    from subspan.training.records import changes, differences, read_json

    record = read_json(out / "record.json")
    if record is None:
        raise SubspanError(f"nothing was begun in {out}: it has no record.json")
    run = Run.from_dict(record["config"])
    theirs = record["config"] | run.options
    apart = ("config", "log", "out", "overwrite", "resume")
    ours = {name: value for name, value in given.items() if name not in apart}
    if different := differences(theirs, theirs | ours):
        raise SubspanError(
            f"{out} was begun with another configuration ({changes(different)}): leave that out "
            "to go on, or give another --out"
        )
    return run, tuple(record.get("log") or ())


def sweep(argv: Arguments) -> None:
    """Accuracy against the number of coordinates, and the intrinsic dimension."""
    from dataclasses import replace

    from subspan import report
    from subspan.commands import console
    from subspan.experiments.many import sweep_parts
    from subspan.files import readable
    from subspan.sweeps.smaller import beside
    from subspan.sweeps.sweep import total_runs
    from subspan.training import config

    parser = _parser("sweep", sweep.__doc__, _methods_help())
    parser.add_class_arguments(config.Training, as_group=False)
    lists = "separated by commas, or a YAML list"
    parser.add_argument(
        "--methods", type=list[str] | str, default="hash", help=f"names as below, {lists}"
    )
    parser.add_argument(
        "--dims", type=list[str | int] | str | int, default="10,30,100,300,1000,3000",
        help=f"numbers of coordinates, {lists}; 600+250 gives those of each compartment; of dlrt "
        "tolerances, 0.05,0.1,0.2, of dlrt-ratio shares, of prodsum atoms (p)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="how many: 0, 1, …")
    parser.add_argument(
        "--lrs", type=dict[str, Any] | list[str | float] | str | float | None, default=None,
        help=f"learning rates to choose from at every d, on the validation part, {lists}; or "
        "those of each method, {rbd: [1, 2], fpd: 4}; null: the methods' own",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", type=str | None, default="full", help="what the others are held against"
    )  # fmt: skip
    parser.add_argument(
        "--baseline_lrs", type=list[str | float] | str | float | None, default=None,
        help="the same, of the baseline",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, default=0.9, help="share of the baseline's score for d_int"
    )
    parser.add_argument(
        "--nets", type=list[str] | str | None, default=None,
        help=f"networks to compare at equal d, in place of --net, {lists}: each has a folder and "
        "its curves, and there is one picture of all",
    )  # fmt: skip
    parser.add_argument(
        "--small", type=list[str] | str | None, default=None,
        help=f"smaller networks to hold projections against, by name, {lists}: all their weights "
        "are trained; auto: the largest of the same kind that have at most d weights, at every d",
    )  # fmt: skip
    _add_options(parser, without=("dim",))
    _add_jobs(parser)
    _add_log(parser)
    _add_out(parser, "runs/sweep")
    given = _parse(parser, argv)

    settings = config.Sweep(
        training=_instance(config.Training, given),
        methods=config.split(given.methods, "methods"),
        dims=config.split(given.dims, "dims"),
        seeds=given.seeds,
        lrs=() if given.lrs is None else config.rates(given.lrs, "lrs"),
        options=_options(given),
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
            parts, out, jobs=given.jobs, overwrite=given.overwrite, on_run=progress,
            backend=given.backend, ray_address=given.ray_address, say=console.say,
            log=_trackers(given),
        )  # fmt: skip
    for name, result in results.items():
        if name:
            console.say(f"\n{name}")
        _swept(result, [out / name / file for file in ("curve.png", "report.html")])
    if given.nets is not None:
        picture, _ = report.write_comparison(out, {name: out / name for name in parts})
        console.say(f"\npicture of all: {picture}")


def reproduce(argv: Arguments) -> None:
    """Run a published experiment, or all, and show published and measured side by side."""
    from subspan.commands import console
    from subspan.experiments import experiments
    from subspan.experiments.everything import reproduce_all

    listing = "\n".join(f"  {name}: {e.title}" for name, e in experiments().items())
    parser = _parser("reproduce", reproduce.__doc__, f"experiments:\n{listing}")
    parser.add_argument(
        "name", nargs="?", default=None,
        help="one of the experiments below; all: one after the other, and one page of them all",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the experiments and end")
    parser.add_argument(
        "--budget", type=Literal["quick", "full"], default="quick",
        help="quick ends within ten minutes on two cores; full is nearer to the published recipe, "
        "with three seeds",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=str | None, default=None,
        help="a data set in place of the published one, as fashion_mnist in place of mnist",
    )  # fmt: skip
    _add_jobs(parser)
    _add_log(parser)
    _add_out(parser, None)
    given = _parse(parser, argv)

    if given.list or given.name is None:
        console.listing([(e.name, e.title, e.source) for e in experiments().values()])
        return
    other = f"-{Path(given.data).name}" if given.data else ""
    out = Path(given.out or f"runs/{given.name}{other}-{given.budget}")
    if given.name != "all":
        _reproduced(given.name, out, given)
        return
    if given.data is not None:
        raise SubspanError("all experiments have data of their own: leave --data out")

    def one(name: str, folder: Path) -> None:
        console.say(f"\n{name}: {experiments()[name].title}")
        _reproduced(name, folder, given)

    page, missing = reproduce_all(out, one)
    for sentence in missing:
        console.say(sentence, style="red")
    if page is None:
        raise SubspanError("no experiment could be run: see above")
    console.say(f"\npage of all: {page}")


def _reproduced(name: str, out: Path, given: Namespace) -> None:
    """Run one experiment and show what came of it."""
    from subspan.bench import total as bench_total
    from subspan.commands import console
    from subspan.experiments import Timing, experiment
    from subspan.experiments import reproduce as run_experiment
    from subspan.sweeps.sweep import total_runs

    chosen = experiment(name)
    how = {
        "budget": given.budget, "data": given.data, "overwrite": given.overwrite,
        "backend": given.backend, "ray_address": given.ray_address, "log": _trackers(given),
    }  # fmt: skip
    if isinstance(chosen, Timing):
        with console.measuring(bench_total(chosen.bench(given.budget))) as done:
            [record] = run_experiment(name, out, done=done, **how).values()
        console.benched(record, [out / "bench.json", out / "bench.png"])
        console.say(f"published: {chosen.source}")
        return
    # Where all are run, those whose runs are timed go one at a time.
    jobs = 1 if chosen.timed and given.name == "all" else given.jobs
    parts = chosen.parts(given.budget)
    with console.runs(sum(map(total_runs, parts.values()))) as progress:
        results = run_experiment(
            name, out, jobs=jobs, on_run=progress, say=console.say, **how
        )  # fmt: skip
    for part, result in results.items():
        if part:
            console.say(f"\n{part}")
        folder = out / part
        _swept(result, [*sorted(folder.glob("curve.*")), folder / "report.html"])
    if len(results) > 1:
        console.say(f"\npicture of all: {out / 'summary.png'}")


def bench(argv: Arguments) -> None:
    """What generating P costs on this machine.

    ``products``: P w and Pᵀ g; ``steps``: training in a fixed subspace; ``memory``: the peaks of
    that; ``optimizers``: training in bases that are redrawn at every step; ``lowrank``: five
    layers of low rank against dense ones; ``sums``: products of sums, a layer and LeNet. Only if
    they are named: ``laboratory``, an epoch of subspan train, as it is and in a subspace, against
    an epoch of a bare loop over the same batches; ``blocks``, a large network of dense blocks (24
    of 1024 → 4096 → 1024, 201 million weights: minutes, and up to 8 GB), and ``transformer``, a
    decoder: peak memory beyond the weights and the time of a step, for all weights trained with
    Adam (full), for none (frozen), for d numbers (subspan), the same with activation checkpointing,
    and for LoRA of rank 8 if PEFT is installed. Each runs in a process of its own.

    Everything is measured in turns, and given as a ratio: products against a matrix that is
    stored, steps and memory against plain Adam (or SGD) on all weights.
    """
    import json

    from subspan import bench as lab_bench
    from subspan.bench import candidates, picture
    from subspan.commands import console
    from subspan.training import config
    from subspan.training.config import split

    lists = "separated by commas, or a YAML list"
    names = "\n".join(f"  {name}" for name in candidates.names())
    parser = _parser("bench", bench.__doc__, f"projections:\n{names}")
    defaults = lab_bench.Bench()
    words = list[str] | str
    parser.add_argument(
        "--parts", type=words, default=",".join(defaults.parts),
        help=f"what to measure, see above, {lists}",
    )  # fmt: skip
    parser.add_argument(
        "--methods", type=words | None, default=None, help=f"as below, {lists}; null: all"
    )
    parser.add_argument(
        "--sizes", type=words, default=",".join(defaults.sizes),
        help=f"D by d for products and memory, {lists}: 61706x1000,472610x4500",
    )  # fmt: skip
    parser.add_argument(
        "--nets", type=words, default=",".join(defaults.nets),
        help=f"networks whose training steps are timed, {lists}",
    )  # fmt: skip
    parser.add_argument("--dim", type=int, default=defaults.dim, help="d of the training steps")
    parser.add_argument(
        "--width", type=int, default=defaults.width,
        help="units of the five hidden layers of lowrank, and of the layer of sums",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=list[int] | str | int, default=",".join(map(str, defaults.ranks)),
        help=f"of these layers, {lists}",
    )  # fmt: skip
    parser.add_argument(
        "--batch_size", type=int, default=defaults.batch_size, help="images in a step"
    )
    parser.add_argument(
        "--blocks", type=str, default=defaults.blocks,
        help="the network of blocks: how many, their width and their hidden width; 1x16x64 is tiny",
    )  # fmt: skip
    parser.add_argument(
        "--batches", type=list[int] | str | int, default=",".join(map(str, defaults.batches)),
        help=f"vectors in a step of blocks, {lists}",
    )  # fmt: skip
    parser.add_argument(
        "--decoder", type=float, default=defaults.decoder,
        help="weights of the decoder of transformer, which has as many and few more: 1e9",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", type=str, default=defaults.dtype,
        help="of the decoder's weights, float32 or bfloat16",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=defaults.tokens, help="in a step of the decoder"
    )
    parser.add_argument(
        "--large_dim", type=int, default=defaults.large_dim, help="d of blocks and transformer"
    )
    parser.add_argument(
        "--seconds", type=float, default=defaults.seconds,
        help="to spend on each timing; never fewer than five rounds",
    )  # fmt: skip
    parser.add_argument("--device", type=str, default=defaults.device, help="auto, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print the record and no tables")
    _add_out(parser, "runs/bench", overwrite="measure again, and replace what is there")
    given = _parse(parser, argv)
    if not float(given.decoder).is_integer():
        raise SubspanError(f"decoder must be a whole number of weights, got {given.decoder:g}")

    settings = lab_bench.Bench(
        parts=split(given.parts, "parts"),
        methods=() if given.methods is None else split(given.methods, "methods"),
        sizes=split(given.sizes, "sizes"),
        nets=split(given.nets, "nets"),
        dim=given.dim,
        width=given.width,
        ranks=tuple(int(rank) for rank in config.floats(given.ranks, "ranks")),
        batch_size=given.batch_size,
        blocks=given.blocks,
        batches=tuple(int(batch) for batch in config.floats(given.batches, "batches")),
        decoder=int(given.decoder),
        dtype=given.dtype,
        tokens=given.tokens,
        large_dim=given.large_dim,
        seconds=given.seconds,
        device=given.device,
    )
    out = Path(given.out)
    if given.json:
        record = lab_bench.bench(settings, out, overwrite=given.overwrite)
        picture.write(record, out)
        print(json.dumps(record, indent=1, ensure_ascii=False))
        return
    with console.measuring(lab_bench.total(settings)) as done:
        record = lab_bench.bench(settings, out, overwrite=given.overwrite, done=done)
    files = [file for file in picture.write(record, out) if file.suffix == ".png"]
    console.benched(record, [out / lab_bench.FILE, *files])


# ---- one checkpoint, one folder, this machine ----------------------------------------------------


def evaluate(argv: Arguments) -> None:
    """Test score of a checkpoint, rebuilt from its file."""
    from subspan.commands import console
    from subspan.training.config import DECODING
    from subspan.training.evaluate import evaluate_checkpoint

    parser = _parser("eval", evaluate.__doc__)
    parser.add_argument("checkpoint", type=str, help="a model.safetensors of subspan train")
    parser.add_argument(
        "--data", type=str | None, default=None, help="the data set; null: that of its training"
    )  # fmt: skip
    for name in DECODING:
        parser.add_argument(
            f"--{name}", type=int | str | None if name == "resize" else str | None, default=None,
            help="of the data set; null: as in its training",
        )  # fmt: skip
    given = _parse(parser, argv)
    decoding = {name: given[name] for name in DECODING}
    console.facts(evaluate_checkpoint(given.checkpoint, given.data, **decoding))


def inspect(argv: Arguments) -> None:
    """What a checkpoint says of itself."""
    from subspan.checkpoint import inspect as header
    from subspan.commands import console

    parser = _parser("inspect", inspect.__doc__)
    parser.add_argument("checkpoint", type=str, help="a file that subspan saved")
    console.facts(header(_parse(parser, argv).checkpoint))


def export(argv: Arguments) -> None:
    """Write the merged weights of a checkpoint as a plain safetensors file."""
    from subspan.training.export import export as write_weights

    parser = _parser("export", export.__doc__)
    parser.add_argument("checkpoint", type=str, help="a model.safetensors of subspan train")
    parser.add_argument("out", type=str, help="the file to write")
    given = _parse(parser, argv)
    print(f"{given.out}: {write_weights(given.checkpoint, given.out):,} bytes")


def replay(argv: Arguments) -> None:
    """Rebuild the weights of any step from the journal of a training in random bases.

    ``subspan train --method rbd --journal true`` writes one beside its record.
    """
    from subspan.training.replay import replay as rebuild_weights

    parser = _parser("replay", replay.__doc__)
    parser.add_argument("journal", type=str, help="the file")
    parser.add_argument(
        "--step", type=int | None, default=None, help="how many steps to make; null: all"
    )
    parser.add_argument("--out", type=str, default="weights.safetensors", help="the file to write")
    parser.add_argument(
        "--base", type=str | None, default=None,
        help="a safetensors file of the initial weights, for a journal of your own training",
    )  # fmt: skip
    given = _parse(parser, argv)
    steps, size = rebuild_weights(given.journal, given.out, step=given.step, base=given.base)
    print(f"{given.out}: the weights after {steps:,} steps, {size:,} bytes")


def report(argv: Arguments) -> None:
    """Draw the pictures and the page of a folder that train or sweep wrote."""
    from subspan.report import write

    parser = _parser("report", report.__doc__)
    parser.add_argument("folder", type=str, help="with a sweep.json or a record.json")
    for path in write(Path(_parse(parser, argv).folder)):
        print(path)


def gallery(argv: Arguments) -> None:
    """Write one page of all experiments in a folder: published and measured, and the pictures.

    The folder holds a folder for each of them, as runs does after some subspan reproduce. A page
    FILE.html has the pictures inside, FILE.md links to them.
    """
    from subspan.experiments.gallery import write

    parser = _parser("gallery", gallery.__doc__)
    parser.add_argument("folder", type=str, help="with the experiments' folders")
    parser.add_argument("file", type=str, help="the page to write: ….html or ….md")
    given = _parse(parser, argv)
    print(write(Path(given.folder), Path(given.file)))


def doctor(argv: Arguments) -> None:
    """What works on this machine: kernels, devices, the generator's known answers, versions."""
    from subspan.commands import console
    from subspan.commands.doctor import examine

    _parse(_parser("doctor", doctor.__doc__), argv)
    findings = examine()
    console.diagnosis(findings)
    if ill := [finding.subject for finding in findings if not finding.well]:
        raise SubspanError(f"not well: {', '.join(ill)}")


COMMANDS: dict[str, tuple[Callable[[Arguments], None], str]] = {
    "train": (train, "train one network by one method"),
    "sweep": (sweep, "accuracy against the number of coordinates, and the intrinsic dimension"),
    "eval": (evaluate, "test score of a checkpoint"),
    "inspect": (inspect, "what a checkpoint says of itself"),
    "export": (export, "merged weights of a checkpoint as a plain safetensors file"),
    "replay": (replay, "the weights of any step, from the journal of a training"),
    "report": (report, "pictures and a page of what train or sweep wrote"),
    "gallery": (gallery, "one page of all experiments in a folder, published and measured"),
    "reproduce": (reproduce, "run a published experiment, published and measured side by side"),
    "bench": (bench, "time and memory of generated projections, against stored ones and Adam"),
    "doctor": (doctor, "kernels, devices, the generator's known answers, versions"),
}


# ---- shared by the parsers -----------------------------------------------------------------------


def _parser(command: str, description: str | None, epilog: str = "") -> ArgumentParser:
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
        """The usual help, with the epilog's lines as they are."""

    parser = ArgumentParser(
        prog=f"subspan {command}", description=description, epilog=epilog,
        formatter_class=Formatter, exit_on_error=False, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_argument(
        "--import", dest="imports", type=str | None, metavar="MODULE",
        help="import a module of yours first, which adds projections, methods, kinds of atoms or "
        "experiments; may be given several times",
    )  # fmt: skip
    return parser


def _parse(parser: ArgumentParser, argv: Arguments) -> Namespace:
    """Parse; every option is known by its name with dashes, too."""
    from argparse import ArgumentError

    from subspan.training.options_file import check_file, check_value

    for action in parser._actions:
        if "--print_config" in action.option_strings:  # jsonargparse looks for this very word
            continue
        dashed = [name.replace("_", "-") for name in action.option_strings if "_" in name]
        action.option_strings = [*dashed, *action.option_strings]
        parser._option_string_actions.update(dict.fromkeys(dashed, action))
    known = set(parser.get_defaults().keys()) - {"config"}
    for option, word in zip(["", *argv], argv, strict=False):
        name, _, value = word.partition("=") if word.startswith("--") else (option, "", word)
        if name == "--config" and value:
            check_file(value, known, parser.prog)
        else:
            check_value(name, value)
    try:
        return parser.parse_args(argv)
    except ArgumentError as error:
        raise _refusal(str(error), parser) from error


def _refusal(message: str, parser: ArgumentParser) -> SubspanError:
    """The parser's message, of many lines and types of Python, as a sentence."""
    if found := re.fullmatch(r"unrecognized arguments: ([^\s=]+).*", message):
        flags = [name for name in parser._option_string_actions if re.fullmatch(r"--[a-z-]+", name)]
        return unknown(f"argument of {parser.prog}", found[1], flags)
    key = re.match(r'Parser key "(\w+)":\s*', message)
    value = re.search(r".*(?:Given|Got) value: (.*)\Z", message, re.DOTALL)
    if key and value:
        names = {"float": "a number", "int": "an integer", "NoneType": "null", "str": "a text"}
        types = re.findall(r"Expected an? (?:<class '|typing\.)?(\w+(?:\[.*\])?)", message)
        kinds = " or ".join(names.get(kind, kind.replace("Literal", "one of ")) for kind in types)
        message = f"{key[1]} must be {kinds}, got {value[1]}"
    elif key:
        message = f"--{key[1]}: {message[key.end() :]}"
    return SubspanError(f"{' '.join(message.split())}; see {parser.prog} --help")


def _methods_help() -> str:
    from subspan.training.methods import methods

    lines = [f"  {name:16} {how.help}" for name, how in sorted(methods().items())]
    return "\n".join(["methods:", *lines])


def _add_options(parser: ArgumentParser, without: Sequence[str] = ()) -> None:
    """The options of all methods; each run is told only those that were given."""
    from subspan.training.methods import methods

    owners: dict[str, dict[str, list[str]]] = {}  # by name and by what it means to them
    options = {}
    for how in methods().values():
        for option in how.options:
            if option.name not in without:
                owners.setdefault(option.name, {}).setdefault(option.help, []).append(how.name)
                options[option.name] = option
    group = parser.add_argument_group("options of methods")
    for name, option in options.items():
        meanings = [
            text + (f" ({', '.join(some)})" if len(some) < 4 else "")
            for text, some in sorted(owners[name].items(), key=lambda item: -len(item[1]))
        ]
        group.add_argument(
            f"--{name}", type=option.type | None, default=None, help="; ".join(meanings)
        )


def _options(given: Namespace) -> dict[str, Any]:
    """The methods' options that were given."""
    from subspan.training.methods import methods

    names = {option.name for how in methods().values() for option in how.options}
    return {n: given[n] for n in sorted(names) if given.get(n) is not None}


def _instance(cls: type, given: Namespace) -> Any:
    from dataclasses import fields

    return cls(**{field.name: given[field.name] for field in fields(cls)})


def _swept(result: dict[str, Any], files: Sequence[Path]) -> None:
    """Show a sweep; one without a good run has failed."""
    from subspan.commands import console

    console.swept(result, files)
    if not result["rows"] and not result["baseline"]:
        raise SubspanError(f"all runs failed, {len(result['failed'])} of them: see above")


def _add_out(
    parser: ArgumentParser, default: str | None, *,
    overwrite: str = "replace what another configuration left there",
) -> None:  # fmt: skip
    kind = str if default else str | None
    parser.add_argument("--out", type=kind, default=default, help="the folder for what is written")
    parser.add_argument("--overwrite", action="store_true", help=overwrite)


def _add_log(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--log", "--log_with", type=list[str] | str | None, default=None,
        help="trackers that are told every epoch, separated by commas, or a YAML list: "
        "tensorboard, wandb, trackio, …; those that can keep their files beside the record. "
        "(torchrun takes --log for an option of its own: under it, say --log-with)",
    )  # fmt: skip


def _trackers(given: Namespace) -> tuple[str, ...]:
    from subspan.training.config import split

    return () if given.log is None else split(given.log, "log")


def _add_jobs(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=int, default=-1,
        help="runs at a time; -1: one per core, or one where they take the GPU of this machine; "
        "of a Ray cluster, one per core, or per GPU where it has any",
    )  # fmt: skip
    parser.add_argument(
        "--backend", type=Literal["loky", "ray"], default="loky",
        help="loky: processes of this machine; ray: those of a Ray cluster (pip install "
        "'subspan[ray]'). All its machines must see --out, and the data, under the same path. The "
        "same command given on several machines that share --out divides the runs without Ray",
    )  # fmt: skip
    parser.add_argument(
        "--ray_address", type=str | None, default=None,
        help="host:port of a cluster's head; null starts Ray on this machine alone",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
