"""``subspan bound``."""

from __future__ import annotations

import json
import math
from pathlib import Path

from subspan.commands.console import print_table, say
from subspan.commands.parsing import Arguments, Parser, parse
from subspan.errors import SubspanError
from subspan.files import refuse_what_is_no_file, write_atomically
from subspan.training.certificate import Certificate, certify
from subspan.training.schema import to_json

DESCRIPTION = """Bound the test error of a checkpoint, without looking at the test set.

A file of few bytes that errs on few of its training samples cannot err on many others: there are
too few such files for one of them to fit the samples by luck. With a probability of 1 - delta over
the draw of the samples, the error of every file at once is below the bound, so that it holds
however the file was chosen. docs/bound.md derives it and says what is taken on trust."""


def main(argv: Arguments) -> None:
    """Bound the test error of a checkpoint from its bytes and its training error."""
    parser = Parser("bound", DESCRIPTION)
    parser.add_argument("checkpoint", type=str, help="a file of subspan train")
    parser.add_argument(
        "--data",
        type=str | None,
        help="where the data of its training are; null: where they were. The samples are their "
        "training part with the validation part, and never the test part",
    )
    parser.add_argument(
        "--delta",
        type=float,
        default=0.05,
        help="the probability that the bound may be wrong, fixed before it is computed",
    )
    parser.add_argument(
        "--choices",
        type=int | float,
        default=1,
        help="how many networks or decoders might have been used after a look at the samples that "
        "no byte of the file tells apart, say versions of your own network's code; their number "
        "is paid for by its logarithm",
    )
    parser.add_argument(
        "--base_is_prior",
        action="store_true",
        help="say that weights which are not in the file (a pretrained base, or those of your own "
        "code) were made without these samples, so that they may count as known before",
    )
    parser.add_argument("--out", type=str | None, help="a JSON file for the record")
    given = parse(parser, argv)
    if given.out is not None:
        refuse_what_is_no_file(given.out)
        if Path(given.out).resolve() == Path(given.checkpoint).resolve():
            raise SubspanError(f"{given.out} is the checkpoint itself: give another file name")
    found = certify(
        given.checkpoint,
        given.data,
        delta=given.delta,
        choices=given.choices,
        base_is_prior=given.base_is_prior,
    )
    show(found)  # first, for the file may not be possible
    if given.out is not None:
        write_atomically(given.out, (json.dumps(to_json(found), indent=1) + "\n").encode())


def show(found: Certificate) -> None:
    """Print a certificate: each term, what it costs, and the bounds."""
    bits = found.size_bits + found.length_bits + found.choices_bits + found.confidence_bits
    nats = bits * math.log(2)
    wrong = f"{found.mistakes:,} of {found.samples:,}"
    print_table(
        ["term", "value", "bits", "meaning"],
        [
            ["file", f"{found.bytes:,} bytes", f"{found.size_bits:,}", "8 for every byte of it"],
            ["length", f"{found.bytes:,}", f"{found.length_bits:.1f}", "log2 L (L + 1)"],
            ["choices", f"{found.choices:,}", f"{found.choices_bits:.1f}", "not in the file"],
            ["confidence", f"{1 - found.delta:g}", f"{found.confidence_bits:.1f}", "log2 1/delta"],
            ["sum", "", f"{bits:,.1f}", f"{nats / found.samples:.4f} nats a sample"],
        ],
    )
    say(f"\nmistakes on the training samples: {wrong}, {100 * found.training_error:.2f} %")
    say(f"PAC-Bayes bound (Seeger, Maurer): {at_most(found.pac_bayes_bound)}")
    say(f"Occam's bound, exact tail:        {at_most(found.error_bound)}")
    say(f"\ntest error of {found.checkpoint}: at most {at_most(found.error_bound)},")
    say(f"with {100 * (1 - found.delta):g} % confidence in the draw of the samples, if")
    for sentence in found.assumptions:
        say(f"- {sentence}")
    if found.error_bound >= found.guessing:
        say(
            f"\nSo much says nothing, for a guess errs in {100 * found.guessing:.0f} %: it takes a "
            "file of fewer bytes, or more samples."
        )


def at_most(error: float) -> str:
    """Show an upper bound in per cent, rounded up."""
    return f"{math.ceil(10_000 * error - 1e-6) / 100:.2f} %"
