"""Which parts a set has: for training, for the test."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from subspan.errors import SubspanError

TEST_SPLITS = ("test", "validation", "valid", "val", "dev")

# The words by which ``datasets`` tells the parts of a folder.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_PART = re.compile(
    rf"(?:^|[-._ 0-9])({'|'.join(word for words in _WORDS.values() for word in words)})"
    r"(?=[-._ 0-9]|$)",
    re.IGNORECASE,
)


def layout(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Find the files of parts such as Train and TEST; nothing where ``load_dataset`` knows them.

    It knows the words in lower case alone, and would make one part of all, or leave some out.
    """
    patterns: dict[str, dict[str, None]] = {}
    unknown_to_it = False
    for file in sorted(folder.rglob("*")):
        pieces = file.relative_to(folder).parts
        if not file.is_file() or any(piece.startswith(".") for piece in pieces):
            continue
        words = [found[1] if (found := _PART.search(piece)) else "" for piece in pieces]
        if not any(words):
            if len(pieces) > 1 or file.suffix.lower() not in ("", ".md", ".txt"):
                return {}  # words of another meaning: a class may be called so
            continue
        depth = next(i for i, word in enumerate(words) if word)
        where = glob.escape("/".join(pieces[: depth + 1]))
        part = next(part for part, known in _WORDS.items() if words[depth].lower() in known)
        patterns.setdefault(part, {})[where if depth == len(pieces) - 1 else f"{where}/**"] = None
        unknown_to_it |= not words[depth].islower()
    if not unknown_to_it or "train" not in patterns:
        return {}
    return {"data_files": {part: list(where) for part, where in patterns.items()}}


def say_left_out(folder: Path, used: Iterable[str]) -> tuple[str, ...]:
    """Say which files are no part of a set, as a note: ``datasets`` passes over them in silence.

    It reads files of one format, that of most of them, and where names tell parts, those files
    alone: the ``used`` ones.
    """
    own, left = {Path(file) for file in used}, []
    for file in sorted(folder.rglob("*")):
        hidden = any(piece[0] in "._" for piece in file.relative_to(folder).parts)
        document = file.suffix.lower() in ("", ".md")
        if file not in own and not hidden and not document and file.is_file():
            left.append(str(file.relative_to(folder)))
    if not left:
        return ()
    named = ", ".join(left[:3]).encode(errors="replace").decode() + ", …" * (len(left) > 3)
    be = "files are" if len(left) > 1 else "file is"
    return (f"{len(left):,} {be} no part of the set, and left out: {named}",)


def choose(
    path: str, names: list[str], samples: str = "images"
) -> tuple[str, str | None, tuple[str, ...]]:
    """Which part is for training, which for the test (None: none is), and what to say of it."""
    known = {name.lower(): name for name in reversed(names)} | {name: name for name in names}
    if "train" not in known and len(names) > 1:
        raise SubspanError(
            f"{path} must have a part 'train', or one part only, found {', '.join(names)}"
        )
    train = known.get("train", names[0])
    test = next((name for name in TEST_SPLITS if known.get(name, train) != train), None)
    if test is None:
        note = f"no test part: 1/6 of the {samples}, the same for every seed of a run, serve as it"
        return train, None, (note,)
    if test != "test":
        return train, known[test], (f"no test part: the part {known[test]!r} serves as it",)
    return train, known[test], ()
