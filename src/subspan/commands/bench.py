"""``subspan bench``."""

from __future__ import annotations

from pathlib import Path

from subspan.commands.parsing import Arguments, add_out, make_parser, parse
from subspan.errors import SubspanError


def main(argv: Arguments) -> None:
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
    parser = make_parser("bench", main.__doc__, f"projections:\n{names}")
    defaults = lab_bench.Bench()
    words = list[str] | str
    parser.add_argument(
        "--parts",
        type=words,
        default=",".join(defaults.parts),
        help=f"what to measure, see above, {lists}",
    )
    parser.add_argument(
        "--methods", type=words | None, default=None, help=f"as below, {lists}; null: all"
    )
    parser.add_argument(
        "--sizes",
        type=words,
        default=",".join(defaults.sizes),
        help=f"D by d for products and memory, {lists}: 61706x1000,472610x4500",
    )
    parser.add_argument(
        "--nets",
        type=words,
        default=",".join(defaults.nets),
        help=f"networks whose training steps are timed, {lists}",
    )
    parser.add_argument("--dim", type=int, default=defaults.dim, help="d of the training steps")
    parser.add_argument(
        "--width",
        type=int,
        default=defaults.width,
        help="units of the five hidden layers of lowrank, and of the layer of sums",
    )
    parser.add_argument(
        "--ranks",
        type=list[int] | str | int,
        default=",".join(map(str, defaults.ranks)),
        help=f"of these layers, {lists}",
    )
    parser.add_argument(
        "--batch_size", type=int, default=defaults.batch_size, help="images in a step"
    )
    parser.add_argument(
        "--blocks",
        type=str,
        default=defaults.blocks,
        help="the network of blocks: how many, their width and their hidden width; 1x16x64 is tiny",
    )
    parser.add_argument(
        "--batches",
        type=list[int] | str | int,
        default=",".join(map(str, defaults.batches)),
        help=f"vectors in a step of blocks, {lists}",
    )
    parser.add_argument(
        "--decoder",
        type=float,
        default=defaults.decoder,
        help="weights of the decoder of transformer, which has as many and few more: 1e9",
    )
    parser.add_argument(
        "--dtype",
        type=str,
        default=defaults.dtype,
        help="of the decoder's weights, float32 or bfloat16",
    )
    parser.add_argument(
        "--tokens", type=int, default=defaults.tokens, help="in a step of the decoder"
    )
    parser.add_argument(
        "--large_dim", type=int, default=defaults.large_dim, help="d of blocks and transformer"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=defaults.seconds,
        help="to spend on each timing; never fewer than five rounds",
    )
    parser.add_argument("--device", type=str, default=defaults.device, help="auto, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print the record and no tables")
    add_out(parser, "runs/bench", overwrite="measure again, and replace what is there")
    given = parse(parser, argv)
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
