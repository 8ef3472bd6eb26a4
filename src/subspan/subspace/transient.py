"""Tensors of a kind of their own that are ordinary as soon as they are somebody else's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subspan.subspace.functions import ordinary_tensors

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def clone_results(attributes: dict[str, Any], memo: dict[int, Any]) -> None:
    """Clone for a copy what PyTorch does not copy: results in a graph, and compressed tensors."""
    for leaf in tree_leaves(attributes):
        if not isinstance(leaf, Tensor) or isinstance(leaf, CopiedPlain) or id(leaf) in memo:
            continue
        if leaf.grad_fn is not None or leaf.layout in _COMPRESSED:
            memo[id(leaf)] = leaf.detach().clone()


class CopiedPlain(Tensor):
    """A tensor whose copies and pickles are ordinary ones, without a graph."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with ordinary_tensors():
            return self.detach().clone().as_subclass(Tensor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with ordinary_tensors():
            return self.detach().clone().as_subclass(Tensor).__reduce_ex__(protocol)


class Transient(CopiedPlain):
    """A weight that was made when it was read; what changes it is refused by a subclass."""

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, as any change: PyTorch does not ask ``__torch_function__`` for this one."""
        return self.__torch_function__(Tensor.set_, (), (self, *args), kwargs)

    @property
    def _is_param(self) -> bool:
        """Whether it is a parameter to PyTorch, whose ``nn.Parameter(weight)`` sets this."""
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """Become one of another module, with memory of its own."""
        vars(self).clear()
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        self.data = self.data.clone()
