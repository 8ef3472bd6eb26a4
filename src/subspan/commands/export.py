"""``subspan export``."""

from __future__ import annotations

from typing import Literal

from subspan.commands.console import say
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.commands.shared_options import add_checkpoint, add_net
from subspan.errors import SubspanError
from subspan.training.export import export, export_peft

Format = Literal["weights", "peft"]


def main(argv: Arguments) -> None:
    """Write a checkpoint as a plain safetensors file of its merged weights, or as a LoRA."""
    parser = Parser("export", main.__doc__)
    add_checkpoint(parser)
    parser.add_argument("out", type=str, help="the file to write; of a LoRA the folder")
    parser.add_argument(
        "--format",
        type=Format,
        default="weights",
        help="weights, or peft: a LoRA that PEFT loads, of any subspace the nearest one",
    )
    parser.add_argument("--rank", type=int | None, help="of the nearest LoRA, 8 if not given")
    add_net(parser)
    given = parse(parser, argv)
    if given.format == "peft":
        written = export_peft(given.checkpoint, given.out, given.rank, net=given.net)
        say(str(written))
        say(f"{given.out}: {written.bytes:,} bytes")
        return
    if given.rank is not None:
        raise SubspanError("--rank is that of a LoRA: give --format peft, too")
    say(f"{given.out}: {export(given.checkpoint, given.out, net=given.net):,} bytes")
