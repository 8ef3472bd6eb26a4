"""Families whose entries are independent: one hook writes a block, both products follow."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from subspan.families.base import Projection

CHUNK = 1 << 22  # entries of P that exist at once


class DenseProjection(Projection):
    """A family that can write down any block of its rows."""

    @abstractmethod
    def _entries(
        self, step: Tensor, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Rows start … stop−1 of P, (stop − start, d)."""

    def _blocks(self, x: Tensor, step: Tensor, start: int, stop: int) -> Iterator[Tensor]:
        rows = max(1, CHUNK // self.in_dim)
        for first in range(start, stop, rows):
            yield self._entries(step, first, min(first + rows, stop), x.device, x.dtype)

    def _dense(self, like: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        out, done = like.new_empty(stop - start, self.in_dim), 0
        for block in self._blocks(like, step, start, stop):
            out[done : done + len(block)] = block
            done += len(block)
        return out

    def _matvec(self, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        return torch.cat([block @ w for block in self._blocks(w, step, start, stop)])

    def _rmatvec(self, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        out, done = g.new_zeros(self.in_dim), 0
        for block in self._blocks(g, step, start, stop):
            out += g[done : done + len(block)] @ block
            done += len(block)
        return out


class Sequences(DenseProjection):
    """A family whose column j is sequence j of the source, read in one way, over √D."""

    @property
    @abstractmethod
    def _draw(self) -> Callable[..., Tensor]:
        """How a sequence is read: a method of the source."""

    def _entries(
        self, step: Tensor, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        columns = torch.arange(self.in_dim, device=device)
        entries = self._draw(start, stop, column=columns, step=step, device=device, dtype=dtype)
        return entries / math.sqrt(self.out_dim)
