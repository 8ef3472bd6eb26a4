"""``subspan bench``, and the progress and the tables of benchmarks on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from subspan.bench import FILE, Bench, bench, candidates, picture, total
from subspan.bench.part import measured, parts
from subspan.commands import console
from subspan.commands.parsing import Arguments, Parser, parse, read_fields
from subspan.commands.shared_options import add_out


def main(argv: Arguments) -> None:
    """Measure what generating P costs on this machine.

    Everything is measured in turns, and given as a ratio. Parts that --parts does not name by
    default are measured only if they are named. Options that take several values take them
    separated by commas, or as a YAML list.
    """
    lines = [f"  {name:12} {part.help}" for name, part in parts().items()]
    names = [f"  {name}" for name in candidates.names()]
    parser = Parser("bench", main.__doc__, "\n".join(["parts:", *lines, "", "methods:", *names]))
    parser.add_fields(Bench)
    parser.add_argument("--json", action="store_true", help="print the record and no tables")
    add_out(parser, "runs/bench", overwrite="measure again, and replace what is there")
    given = parse(parser, argv)

    settings, out = read_fields(Bench, given), Path(given.out)
    if given.json:
        record = bench(settings, out, overwrite=given.overwrite)
        picture.write(record, out)
        console.say(json.dumps(record, indent=1, ensure_ascii=False))
        return
    with show_progress(total(settings)) as done:
        record = bench(settings, out, overwrite=given.overwrite, done=done)
    files = [file for file in picture.write(record, out) if file.suffix == ".png"]
    show_bench(record, [out / FILE, *files])


@contextmanager
def show_progress(count: int) -> Iterator[Callable[[str], None]]:
    """Show the progress of a benchmark: a bar, and a line for everything that is measured."""
    with console.progress("measured") as bar:
        task = bar.add_task("bench", total=count)

        def done(line: str) -> None:
            console.say(f"measured: {line}")
            bar.advance(task)

        yield done
        if not bar.tasks[task].completed:
            console.say("complete already, not repeated: --overwrite measures again")


def show_bench(record: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Show the tables of a benchmark, and where its picture is."""
    machine = record["machine"]
    copied = machine["copy_bytes_per_second"] / 1e9
    console.say(f"{machine['device']}; a copy moves {copied:.1f} GB/s")
    for part, rows in measured(record):
        for some in part.groups(rows):
            console.say(f"\n{part.make_heading(some)}")
            table = part.table(some, machine)
            console.print_table(table.columns, table.rows)
    for path in files:
        console.say(f"{'picture' if path.suffix == '.png' else 'record'}: {path}")
