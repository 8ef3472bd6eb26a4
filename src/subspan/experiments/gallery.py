"""One page of many experiments: what each is, published and measured side by side, its picture.

As Markdown with links to the pictures, for a repository that keeps them; or as HTML that has them
inside, for a folder of runs. The same records give the same page.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from subspan.errors import SubspanError
from subspan.experiments.exhibits import exhibits
from subspan.files import refuse_what_is_no_file, write_atomically
from subspan.report.families import FAMILIES, OTHERS
from subspan.report.page import cell, embedded, template


def write(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    lead: Sequence[str] = (),
    strict: bool = True,
) -> Path:
    """Write a page of all experiments in a folder.

    Args:
        folder: it holds a folder for each experiment, as ``results`` and ``runs`` do.
        file: the page, ``….md`` or ``….html``; links are relative to it.
        lead: sentences for the top, such as what could not be run.
        strict: whether a damaged record is an error; else it is said at the top.

    Returns:
        The file.

    Raises:
        SubspanError: for a file that is neither, a folder without experiments, or a damaged
            record; nothing is written then.
    """
    folder, file = Path(folder), Path(file)
    refuse_what_is_no_file(file)
    write_atomically(file, text(folder, file, lead=lead, strict=strict).encode())
    return file


def text(folder: Path, file: Path, *, lead: Sequence[str] = (), strict: bool = True) -> str:
    """Return the page that :func:`write` writes."""
    if file.suffix not in (".md", ".html"):
        raise SubspanError(f"a gallery is a file ….md or ….html, got {file.name}")
    folder, file = folder.resolve(), file.resolve()
    damaged = list[str]()
    found = exhibits(folder, None if strict else damaged)
    sections = [
        (family, own)
        for family in (*FAMILIES, OTHERS)
        if (own := [exhibit for exhibit in found if exhibit.family is family])
    ]

    def link(path: Path) -> str:
        return quote(Path(os.path.relpath(path, file.parent)).as_posix())

    here = os.path.commonpath([folder, file.parent])
    paths = [shlex.quote(os.path.relpath(path, here)) for path in (folder, file)]
    content: dict[str, Any] = {
        "sections": sections,
        "lead": [*lead, *damaged],
        "command": f"subspan gallery {' '.join(paths)}",
        "link": link,
        "cell": cell,
        "picture": _picture,
    }
    return template(f"gallery{file.suffix}", escape=file.suffix == ".html").render(content)


def _picture(png: Path) -> str:
    """Return a picture as an address that holds it: its vectors, where they lie beside it."""
    svg = png.with_suffix(".svg")
    return embedded((svg if svg.is_file() else png).read_bytes())
