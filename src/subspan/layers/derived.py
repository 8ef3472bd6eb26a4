"""Buffers that follow from a layer's arguments, such as the fixed matrices of a seed.

No file holds them. The layer makes them again whenever something has taken the place of one, which
may have lost the values: a narrower type rounds them, the meta device and ``to_empty`` have none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Self

import torch
from torch import Tensor, nn


class DerivedBuffers(nn.Module):
    """A layer with such buffers: it writes :meth:`derive`, and reads them by :meth:`derived`."""

    def derive(self) -> dict[str, Tensor]:
        """Make the buffers by their names, as precisely as they can be."""
        raise NotImplementedError

    def register_derived(self, like: Tensor, persistent: Collection[str] = ()) -> dict[str, Tensor]:
        """Register the buffers, and return them as they were made.

        They have the device of ``like`` and, if they are floating, its dtype. A file holds those
        that are named as ``persistent`` all the same.
        """
        with torch.device("cpu"):  # with values, even where a network is made without any
            made = self.derive()
        for name, tensor in made.items():
            self.register_buffer(name, _as(like, tensor), persistent=name in persistent)
        self._derived = list(made)
        return made

    def derived(self, name: str) -> Tensor:
        """Return a buffer; it is made first where ``assign=True`` has filled parameters alone."""
        if getattr(self, name).is_meta:
            self._complete()
        return getattr(self, name)

    def _complete(self) -> None:
        """Make the buffers that are on the meta device still, while parameters have values."""
        like = next((p for p in self.parameters() if not p.is_meta), None)
        if like is not None:
            self._make_again({n: like for n in self._derived if getattr(self, n).is_meta})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the layer; what a file holds is made again only if it had no values."""
        self._complete()
        before = {name: getattr(self, name) for name in self._derived}
        super()._apply(fn, recurse)
        now = {n: getattr(self, n) for n, was in before.items() if getattr(self, n) is not was}
        lost = (n for n in now if before[n].is_meta or n in self._non_persistent_buffers_set)
        self._make_again({n: now[n] for n in lost if not now[n].is_meta})
        return self

    def _make_again(self, likes: dict[str, Tensor]) -> None:
        with torch.device("cpu"):
            made = self.derive() if likes else {}
        for name, like in likes.items():
            setattr(self, name, _as(like, made[name]))


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor on the device of another and, if it is floating, in its dtype."""
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
