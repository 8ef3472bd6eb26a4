"""Sparse signs: most entries are zero.

Sources: Achlioptas, "Database-friendly random projections", JCSS 2003 (s = 3); Li, Hastie and
Church, "Very sparse random projections", KDD 2006 (s = √D); Kane and Nelson, "Sparser
Johnson–Lindenstrauss transforms", JACM 2014 (the block construction); Minut 2023 for the variants
that carry his names.

``sparse``: the rows are cut into blocks of s, and each column has exactly one nonzero ±1/√⌈D/s⌉ in
each block, at a uniform place. An entry alone has Achlioptas's distribution (zero with probability
1 − 1/s, but for a last block that is shorter), columns are independent, and every column has
exactly ⌈D/s⌉ nonzeros, hence norm 1, for one draw per nonzero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.errors import SubspanError
from subspan.families.base import Projection
from subspan.families.dense import DenseProjection

CHUNK = 1 << 22  # nonzeros that exist at once


@dataclass(frozen=True)
class Sparse(Projection, family="sparse"):
    """One nonzero sign in every s rows of a column (Achlioptas 2003: s = 3; Li 2006: "sqrt_D").

    Word k of the source's sequence j places the nonzero of block k in column j: with the length l
    of the block (s, or what is left of D for the last), row k·s + (word div 2)·l div 2³¹, minus if
    the word is odd.

    Args:
        s: rows per nonzero: a number in [1, 2³¹], rounded to an integer (halves to the even one),
            or "sqrt_d" or "sqrt_D". One that exceeds D leaves one nonzero in each column.
    """

    s: float | str = 3
    domain = 7
    norm = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.s, str):
            valid = self.s in ("sqrt_d", "sqrt_D")
        else:
            number = isinstance(self.s, (int, float)) and not isinstance(self.s, bool)
            valid = number and 1 <= self.s <= 1 << 31
        if not valid:
            raise SubspanError(
                f"s must be a number in [1, 2^31], 'sqrt_d' or 'sqrt_D', got {self.s!r}"
            )

    @property
    def run(self) -> int:
        """The number of rows in a block: s as an integer."""
        if isinstance(self.s, str):
            return round(math.sqrt(self.in_dim if self.s == "sqrt_d" else self.out_dim))
        return round(self.s)

    @property
    def magnitude(self) -> float:
        """1/√⌈D/s⌉: the size of a nonzero."""
        return 1 / math.sqrt(-(-self.out_dim // self.run))

    def _nonzeros(
        self, x: Tensor, step: Tensor, start: int, stop: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Row − start, column and sign of the nonzeros, by chunks of blocks."""
        run, columns = self.run, torch.arange(self.in_dim, device=x.device)
        stride = max(1, CHUNK // self.in_dim)
        for first in range(start // run, -(-stop // run), stride):
            last = min(first + stride, -(-stop // run))
            word = self.source.sequence(first, last, column=columns, step=step, device=x.device)
            base = run * torch.arange(first, last, device=x.device).unsqueeze(1)
            length = (self.out_dim - base).clamp(max=run)
            row = base + ((word >> 1) * length >> 31) - start
            inside = (row >= 0) & (row < stop - start)
            sign = (1 - 2 * (word & 1)).to(x.dtype)
            yield row[inside], columns.expand_as(row)[inside], sign[inside]

    def coo(self, like: Tensor, step: Tensor) -> Tensor:
        """Return all of P by coordinates, on the device and of the dtype of ``like``."""
        parts = list(self._nonzeros(like, step, 0, self.out_dim))
        rows, columns, signs = (torch.cat(part) for part in zip(*parts, strict=True))
        size = (self.out_dim, self.in_dim)
        indices = torch.stack((rows, columns))
        values = signs * self.magnitude
        return torch.sparse_coo_tensor(indices, values, size, check_invariants=False).coalesce()

    def _dense(self, like: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        out = like.new_zeros(stop - start, self.in_dim)
        for row, column, sign in self._nonzeros(like, step, start, stop):
            out[row, column] = sign
        return out * self.magnitude

    def _matvec(self, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        out = w.new_zeros(stop - start)
        for row, column, sign in self._nonzeros(w, step, start, stop):
            out.index_add_(0, row, sign * w[column])
        return out * self.magnitude

    def _rmatvec(self, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        out = g.new_zeros(self.in_dim)
        for row, column, sign in self._nonzeros(g, step, start, stop):
            out.index_add_(0, column, sign * g[row])
        return out * self.magnitude


@dataclass(frozen=True)
class SparseOriginal(DenseProjection, family="sparse-original"):
    """Minut's first sparse projection, corrected: independent signs, nonzero with probability 1/√d.

    The published code draws every direction from one random state, so that all share nearly one
    support and 3 % of the weights are ever moved; here every entry is drawn on its own, from word i
    of the source's sequence j: nonzero if the word is below ⌊2³²/√d⌋, minus if it is odd.
    """

    domain = 8
    norm = "expected"

    @property
    def threshold(self) -> int:
        """⌊2³²/√d⌋: words below it are nonzeros."""
        return math.isqrt((1 << 64) // self.in_dim)

    @property
    def divisor(self) -> float:
        """√(D t/2³²) with the threshold t: what a sign is divided by."""
        return math.sqrt(self.out_dim * self.threshold / 2.0**32)

    def _signs(self, word: Tensor) -> Tensor:
        return 1 - 2 * (word & 1)

    def _entries(
        self, step: Tensor, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        columns = torch.arange(self.in_dim, device=device)
        word = self.source.sequence(start, stop, column=columns, step=step, device=device)
        nonzero = (word < self.threshold) * self._signs(word)
        return nonzero.to(dtype) / self.divisor


@dataclass(frozen=True)
class Sparse2(SparseOriginal, family="sparse2"):
    """Minut's second sparse projection, corrected: ``sparse-original`` without its minus signs."""

    domain = 9

    def _signs(self, word: Tensor) -> Tensor:
        return torch.ones_like(word)


@dataclass(frozen=True)
class Sparse2Full(Sparse, family="sparse2full"):
    """Minut's third sparse projection, corrected: both signs, ⌈D/√d⌉ nonzeros in every column."""

    s: float | str = "sqrt_d"
    domain = 10
