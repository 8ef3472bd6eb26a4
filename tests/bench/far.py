"""Functions that tests run in another process, which imports this module."""

from __future__ import annotations

import os
from collections.abc import Iterator

from subspan.errors import SubspanError


def counting(start: int) -> Iterator[tuple[int, str | None]]:
    """Numbers down to 1, each with a variable of the environment; then an error."""
    print("what libraries say is no value")
    for number in range(start, 0, -1):
        yield number, os.environ.get("MALLOC_ARENA_MAX")
    raise SubspanError("no more numbers")


def noisy() -> int:
    """Return a number, and say something else."""
    print("what libraries say is no value")
    return 3


def failing() -> None:
    """Fail as something else than the library's own errors does."""
    raise KeyError("nobody")


def peaks(width: int, ranks: list[int], batch_size: int) -> list[int]:
    """Peak memory of the networks of the part ``lowrank``, one after the other."""
    from subspan.bench.parts import lowrank

    return [lowrank.peak(width, rank, batch_size, "cpu") for rank in ranks]
