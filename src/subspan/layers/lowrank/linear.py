"""``nn.Linear`` with the weight U S Vᵀ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subspan.layers.computed import guard
from subspan.layers.lowrank.layer import LowRank
from subspan.layers.plain import linear
from subspan.precision import full_precision
from subspan.subspace.functions import ordinary_tensors


class LowRankLinear(LowRank, replaces=nn.Linear):
    """``nn.Linear`` with the weight U S Vᵀ.

    Args:
        in_features: m.
        out_features: n.
        rank: r, at most min(n, m).
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SubspanError: for a rank that is not in [1, min(n, m)].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        super().__init__(out_features, in_features, rank, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, m) → (…, n)."""
        return self._output(x, None)

    @property
    def weight(self) -> Tensor:
        """(n, m)."""
        return guard(self._matrix())

    def dense(self) -> nn.Linear:
        """``nn.Linear`` with this weight."""
        return linear(self.weight, self.bias)

    def two_factors(self) -> nn.Sequential:
        """Return two linear layers, (r, m) without a bias, then (n, r)."""
        with ordinary_tensors(), full_precision(self.U.device):
            return nn.Sequential(linear(self.V.T, None), linear(self.U @ self.S, self.bias))

    def extra_repr(self) -> str:
        """Describe the layer in the words of ``nn.Linear``, and its rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
