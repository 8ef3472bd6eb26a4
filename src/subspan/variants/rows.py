"""Rows of a batch: arguments of some of them, and results put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from subspan.errors import SubspanError

Shape = tuple[int, ...]
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, type(None))


def check_rows(value: Any, rows: int, where: str) -> int:
    """Count the tensors of an argument that have rows, all of them ``rows`` many.

    Raises:
        SubspanError: for a tensor of another length, and for what may have rows and is no tensor.
    """
    if isinstance(value, Tensor):
        if value.dim() and len(value) != rows:
            raise SubspanError(
                f"{where} has shape {tuple(value.shape)} and there are {rows} names: the first "
                "dimension of every tensor must be the batch, and each row has a name"
            )
        return int(value.dim() > 0)
    if isinstance(value, Mapping):
        return sum(check_rows(item, rows, f"{where}[{key!r}]") for key, item in value.items())
    if isinstance(value, list | tuple) and not any(isinstance(item, str) for item in value):
        count = sum(check_rows(item, rows, f"{where}[{i}]") for i, item in enumerate(value))
        if isinstance(value, list) and len(value) == rows > 1 and not count:
            raise SubspanError(
                f"{where} is a list of as many values as there are rows: give a tensor if each is "
                "for its row, or a tuple if all are for all rows"
            )
        return count
    if not isinstance(value, _PLAIN):
        raise SubspanError(
            f"{where} is a {type(value).__name__}, whose rows cannot be told apart: give tensors"
        )
    return 0


def take_rows(value: Any, index: Tensor) -> Any:
    """Return some rows of every tensor of an argument that :func:`check_rows` has accepted."""
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device)) if value.dim() else value
    if isinstance(value, Mapping):
        return {key: take_rows(item, index) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _like(value, [take_rows(item, index) for item in value])
    return value


def check_result(
    result: Any, rows: int, run: Callable[[int], Any], known: set[tuple[str, Shape]]
) -> None:
    """Refuse a result in which a tensor has no row for each row of the batch.

    A table of all rows by all rows (the similarities of CLIP) has as many, but the rows of a larger
    batch are longer then: where a tensor may be one, ``run`` runs so many rows, too. ``known`` are
    those that have turned out to be no tables; it is added to.
    """
    found = _shapes(result, "the result")
    for where, shape in found:
        if shape[:1] != (rows,):
            raise _refuse_shapes(where, [shape], [rows])
    if {(where, shape) for where, shape in found if rows in shape[1:]} <= known:
        return
    for (where, shape), (_, other) in zip(found, _shapes(run(rows + 1), ""), strict=True):
        if shape[1:] != other[1:]:
            raise _refuse_shapes(where, [shape, other], [rows, rows + 1])
        known.add((where, shape))


def _shapes(value: Any, where: str) -> list[tuple[str, Shape]]:
    """List the shapes of all tensors of a result, with their places."""
    if isinstance(value, Tensor):
        return [(where, tuple(value.shape))]
    items: dict[str, Any] = {}
    if dataclasses.is_dataclass(value):
        items = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        items = {str(key): item for key, item in value.items()}
    elif isinstance(value, list | tuple):
        items = {f"{where}[{i}]": item for i, item in enumerate(value)}
    return [each for name, item in items.items() for each in _shapes(item, name)]


def _refuse_shapes(where: str, shapes: Sequence[Shape], counts: Sequence[int]) -> SubspanError:
    """Make the refusal of a tensor that has not a row of one shape for each row of a batch."""
    return SubspanError(
        f"{where} has shapes {list(shapes)} for batches of {list(counts)} rows, and cannot be put "
        "together: ask for results with a row for each row (no labels=, say, since a loss is one "
        "number)"
    )


def join_rows(
    results: Sequence[Any], counts: Sequence[int], order: Tensor, where: str = "the result"
) -> Any:
    """Put the results of several batches together, row by row; refuse what has no rows.

    ``order`` says for each row of the whole where it is among those of all batches.
    """
    first = results[0]
    if any(type(result) is not type(first) for result in results):
        raise SubspanError(f"{where} has another type for some rows, and cannot be put together")
    if isinstance(first, Tensor):
        shapes = {tuple(result.shape[1:]) for result in results}
        lengths = [len(result) if result.dim() else -1 for result in results]
        if lengths != list(counts) or len(shapes) > 1:
            raise _refuse_shapes(where, [tuple(result.shape) for result in results], counts)
        return torch.cat(list(results)).index_select(0, order.to(first.device))
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first) if field.init]
        kind: Any = type(first)
        return kind(
            **{
                name: join_rows([getattr(r, name) for r in results], counts, order, name)
                for name in names
            }
        )
    if isinstance(first, Mapping):
        return {
            key: join_rows([result[key] for result in results], counts, order, str(key))
            for key in first
        }
    if isinstance(first, list | tuple):
        items = [
            join_rows(list(column), counts, order, f"{where}[{i}]")
            for i, column in enumerate(zip(*results, strict=True))
        ]
        return _like(first, items)
    if isinstance(first, _PLAIN) and all(result == first for result in results):
        return first
    raise SubspanError(
        f"{where} is a {type(first).__name__}, whose rows cannot be put together: ask the network "
        "for tensors only (use_cache=False, say)"
    )


def _like(sequence: Sequence[Any], items: list[Any]) -> Any:
    """Make a sequence of the same kind; a named tuple takes its items one by one."""
    if hasattr(sequence, "_fields"):
        return type(sequence)(*items)
    return type(sequence)(items)  # type: ignore[call-arg]
