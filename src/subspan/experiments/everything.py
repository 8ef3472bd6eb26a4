"""All published experiments, one after the other, and one page of what came of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from subspan.errors import SubspanError
from subspan.experiments import experiments, gallery

PAGE = "index.html"


def reproduce_all(out: Path, one: Callable[[str, Path], object]) -> tuple[Path | None, list[str]]:
    """Run every experiment into a folder of its own, and keep ``index.html`` up to date.

    One that cannot be run, for want of its data perhaps, or whose record is damaged, does not stop
    the others: the page says so. What is complete is not repeated. ``one`` runs an experiment, by
    its name and folder. Return the page, None if no experiment could be run; and a sentence for
    each that could not.
    """
    page, missing = None, list[str]()
    for name in experiments():
        try:
            one(name, out / name)
        except SubspanError as error:
            missing.append(f"{name} could not be run: {error}")
        if any((out / name).rglob("*.json")):
            page = gallery.write(out, out / PAGE, lead=missing, strict=False)
    if page is not None and missing:
        gallery.write(out, page, lead=missing, strict=False)
    return page, missing
