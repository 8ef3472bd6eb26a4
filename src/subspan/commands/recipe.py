"""Recipes: options that were found to work well together, by name.

A recipe is a YAML file in the folder ``recipes``. ``--recipe golf``, or ``recipe: golf`` in a file
of ``--config``, is ``--config`` with that file, before all other options, so that whatever is given
besides has the last word.
"""

from __future__ import annotations

from argparse import SUPPRESS
from pathlib import Path

from subspan.commands.parsing import Arguments, Parser, load_file
from subspan.commands.words import take_option
from subspan.errors import SubspanError, unknown

FOLDER = Path(__file__).parent / "recipes"


def recipes() -> dict[str, Path]:
    """Return the files of all recipes, by their names."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def add_recipe(parser: Parser) -> None:
    """Add ``--recipe``, which :func:`open_recipe` replaces; the help says what each is for."""
    told = [f"{name} ({_first_line(path)})" for name, path in recipes().items()]
    parser.add_argument(
        "--recipe",
        default=SUPPRESS,
        metavar="NAME",
        help=f"options that work well together: {', '.join(told)}; other options override them",
    )


def open_recipe(argv: Arguments) -> list[str]:
    """Put the options of a recipe, one at most, in place of its name, before all others."""
    names, rest = take_option(argv, "--recipe")
    in_files = [load_file(file).get("recipe") for file in take_option(rest, "--config")[0]]
    names += [str(name) for name in in_files if name is not None]
    if len(names) > 1:
        raise SubspanError(f"there can be one recipe, got {' and '.join(names)}")
    if not names:
        return rest
    if names[0] not in recipes():
        raise unknown("recipe", names[0], recipes())
    return ["--config", str(recipes()[names[0]]), *rest]


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").rstrip(".")
