"""Copies and pickles of an optimizer that has more than PyTorch's own three attributes."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class Copied(Optimizer):
    """An optimizer that ``copy.deepcopy`` and ``pickle`` take as it is.

    PyTorch copies parameter groups, state and defaults alone. Hooks stay behind, as there, and so
    does what others have put over a method, as a scheduler does over ``step``.
    """

    def __getstate__(self) -> dict[str, Any]:
        """All attributes of its own."""
        return {
            name: value
            for name, value in vars(self).items()
            if "_hooks" not in name and not callable(getattr(type(self), name, None))
        }
