"""The command line: it dispatches. ``subspan COMMAND --help`` documents each command.

A command is a file of :mod:`subspan.commands`, which is imported when that command is asked for:
PyTorch takes seconds to import.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence

from subspan import __version__
from subspan.commands import output
from subspan.commands.words import take_option
from subspan.errors import Stopped, SubspanError, unknown

# By what people type: the file, and what the command is for.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "train one network by one method"),
    "sweep": ("sweep", "accuracy against the number of coordinates, and the intrinsic dimension"),
    "intrinsic": ("intrinsic", "the intrinsic dimension, from one training in which d grows"),
    "eval": ("evaluate", "test score of a checkpoint"),
    "bound": ("bound", "an upper bound on the test error, from the bytes of a checkpoint"),
    "inspect": ("inspect", "what a checkpoint says of itself"),
    "export": ("export", "merged weights of a checkpoint as a plain safetensors file"),
    "replay": ("replay", "the weights of any step, from the journal of a training"),
    "report": ("report", "pictures and a page of what train or sweep wrote"),
    "gallery": ("gallery", "one page of all experiments in a folder, published and measured"),
    "pareto": ("pareto", "accuracy against stored numbers and bytes, with the best of others"),
    "reproduce": ("reproduce", "run a published experiment, published and measured side by side"),
    "bench": ("bench", "time and memory of generated projections, against stored ones and Adam"),
    "doctor": ("doctor", "kernels, devices, the generator's known answers, versions"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 128 + n after signal n."""
    output.begin()
    try:
        return _run(list(sys.argv[1:] if argv is None else argv) or ["--help"])
    finally:
        output.finish()


def _run(arguments: list[str]) -> int:

    def end(code: int, message: object, before: str = "") -> int:
        print(f"{before}subspan {arguments[0]}: {message}", file=sys.stderr)
        return code

    if arguments[0] in ("-h", "--help", "help"):
        output.write(overview())
        return 0
    if arguments[0] == "--version":
        output.write(f"subspan {__version__}")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise unknown("command", arguments[0], COMMANDS)
        arguments = _import(arguments)
        module = importlib.import_module(f"subspan.commands.{COMMANDS[arguments[0]][0]}")
        module.main(arguments[1:])
    except SubspanError as error:
        return end(2, f"error: {error}")
    except OSError as error:  # a full disk, a folder without permission
        return end(1, f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if (size := re.search(r"allocate ([\d.]+ \w+)", str(error))) is None:
            raise
        made_smaller = "make what was asked for smaller"
        return end(1, f"error: there is no memory for another {size[1]}: {made_smaller}")
    except Stopped as stopped:
        return end(128 + stopped.signal, stopped, before="\n")
    except KeyboardInterrupt:
        return end(130, "interrupted; what was complete is kept", before="\n")
    return 0


def _import(arguments: list[str]) -> list[str]:
    """Import the modules of ``--import``, which may add to every registry; returns the rest.

    They stand in the environment, too, from which processes that are started for this command,
    workers of a sweep say, have them.
    """
    given, rest = take_option(arguments, "--import")
    if given:
        from subspan.training.own import load, remember

        for module in given:
            load(module)
        remember(given)
    return rest


def overview() -> str:
    """Return the text of ``subspan --help``."""
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


if __name__ == "__main__":
    sys.exit(main())
