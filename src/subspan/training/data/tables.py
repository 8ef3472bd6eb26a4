"""Sets as tables: what ``datasets.load_dataset`` opens, which column is which, numbered labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspan.errors import SubspanError, unknown
from subspan.training.data import parts

# By what a column is: the names that it usually has, and its type, as :func:`kind` names it.
COLUMNS = {
    "image": (("image", "img"), "Image"),
    "label": (("label", "labels", "fine_label"), "ClassLabel"),
    "text": (("text", "sentence", "content", "review"), "string"),
}


def open_set(
    path: str, revision: str | None, what: str, expected: str
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Open a set, to be streamed: ``datasets`` then leaves no copy of it in a cache of its own.

    It is a folder, or a set on the Hub at a revision. For ``what`` and ``expected`` see
    :func:`readable`.

    Returns:
        The parts by name; the features of the columns by name, None where a format has none; and
        notes, on files that are no part of the set.
    """
    import datasets

    datasets.disable_progress_bars()
    with readable(path, what, expected):
        layout = {} if revision else parts.layout(Path(path))
        builder = datasets.load_dataset_builder(path, revision=revision, **layout)
        found = builder.as_streaming_dataset()
        features = next(iter(found.values())).features
        if features is None:  # a format without types, such as text
            features = dict.fromkeys(next(iter(next(iter(found.values()))), {}))
    if revision:
        return dict(found), dict(features), ()
    used = chain(*builder.config.data_files.values())
    return dict(found), dict(features), parts.say_left_out(Path(path), used)


@contextmanager
def readable(path: str, what: str, expected: str) -> Iterator[None]:
    """Turn what ``datasets`` and its readers raise, which is of many types, into one sentence.

    It says what samples were to be read, in a word, and which layouts are expected.
    """
    try:
        yield
    except SubspanError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise SubspanError(
            f"cannot read {path} as {what} ({cause}): expected {expected}"
        ) from error


def column(
    role: str, path: str, features: dict[str, Any], asked: str | None, remedy: str = ""
) -> str:
    """Return the column asked for; else the only one of the type; else one by its usual name.

    Where one column has the type and another the name, neither is plainly the one, and that is
    refused: the user names it by the option of its role, one of :data:`COLUMNS`.
    """
    usual, wanted = COLUMNS[role]
    if asked is not None:
        if asked not in features:
            raise unknown(f"{role} column of {path}", asked, features)
        return asked
    typed = [
        name for name, feature in features.items() if kind(feature) in (wanted, f"large_{wanted}")
    ]
    named = [name for name in usual if name in features]
    if len(typed) == 1 and set(named) <= set(typed):
        return typed[0]
    for name in named:
        if name in (typed or features):
            return name
    raise SubspanError(
        f"{path} has no column that is plainly the {role}: expected one {wanted}, "
        f"or one called {' or '.join(usual)}, found {', '.join(features)}: name the right one "
        f"with --{role}-column{remedy}"
    )


def check_texts(path: str, part: str, column: str, values: Iterable[Any]) -> None:
    """Refuse a column of texts with a row that has none, by its number."""
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise SubspanError(
                f"{path} must have a text in the column {column!r} of every row, got "
                f"{type(value).__name__} in row {number} of {part}: name the right column with "
                "--text-column, or leave that row out"
            )


def kind(feature: Any) -> str:
    """Name the type of a column: Image, ClassLabel, string, int64 and so on."""
    name = "no type" if feature is None else type(feature).__name__
    return str(feature.dtype) if name == "Value" else name


def encode(
    path: str, column: str, feature: Any, values: list[list[Any]]
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Each part's labels as int64 (N,), and the names of the classes.

    Where the column declares no names, the distinct values (integers or strings) are numbered in
    order. The values are those of the training part, and of the test part if there is one.

    Raises:
        SubspanError: they are no classes, or the training part has not two of them, or none of one
            that the test part has; or no two samples have the same, and there is no test part.
    """
    names = getattr(feature, "names", None)
    every = [value for part in values for value in part]
    types = {type(value) for value in every}
    if types not in ({int}, {bool}, {str}):
        found = ", ".join(sorted(kind.__name__ for kind in types))
        raise SubspanError(
            f"labels of {path} must all be integers or all strings, got {found}: name another "
            "column with --label-column, or leave out rows without a label"
        )
    if names:
        _refuse_other_names(Path(path), column, names)
    known = range(len(names)) if names else sorted(set(every))
    number = {value: i for i, value in enumerate(known)}
    if unlabelled := set(every) - set(number):
        raise SubspanError(
            f"labels of {path} must be in [0, {len(known)}), got {min(unlabelled)}: "
            "leave out rows without a label"
        )
    called = {value: names[value] if names else value for value in set(every)}
    trained = set(values[0])
    if len(trained) < 2:
        raise SubspanError(
            f"the training part of {path} must have two labels at least, got "
            f"{called[trained.pop()]} in the column {column!r}: name another with --label-column"
        )
    if len(values) == 1 and len(trained) == len(every):
        raise SubspanError(
            f"every sample of {path} has a label of its own in the column {column!r}, as if that "
            "told samples apart and not classes: name another with --label-column"
        )
    if new := sorted(set(values[-1]) - trained):
        raise SubspanError(
            f"the test part of {path} has labels that no sample of the training part has "
            f"({', '.join(str(called[value]) for value in new[:5])}): name classes alike in both, "
            "or leave those samples out"
        )
    encoded = [torch.tensor([number[value] for value in part]) for part in values]
    return encoded, tuple(map(str, names or known))


def _refuse_other_names(folder: Path, column: str, names: Sequence[str]) -> None:
    """Refuse parquet files that number classes otherwise: ``datasets`` takes the first one's."""
    import pyarrow.parquet

    for file in folder.rglob("[!.]*.parquet") if folder.is_dir() else ():
        told = (pyarrow.parquet.read_schema(file).metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(told).get("info", {}).get("features") or {}
        own = features.get(column, {}).get("names")
        if own is not None and own != list(names):
            raise SubspanError(
                f"{file} has the classes {', '.join(own[:5])} in the column {column!r}, and "
                f"other files of {folder} have {', '.join(names[:5])}: save all with the same "
                "classes, in the same order"
            )
