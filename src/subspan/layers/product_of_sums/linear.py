"""``nn.Linear`` with a product of sums for its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.layers.computed import guard
from subspan.layers.plain import autocast_type, linear
from subspan.layers.product_of_sums.layer import ProductOfSums
from subspan.layers.product_of_sums.order import Plan, example_size, plan_product


class ProductOfSumsLinear(ProductOfSums, replaces=nn.Linear):
    """``nn.Linear`` with a product of sums for its weight.

    Args:
        in_features: m.
        out_features: n.
        factors: of W, the leftmost first; see :class:`ProductOfSums`.
        bias: whether there is one; or how many numbers a projection makes one of.
        seed: of the fixed matrices, in [0, 2⁶⁴).
        stream: in [0, 2¹⁸); tells layers of one seed apart.
        init: "he", "glorot" or "lecun".
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SubspanError: for factors that do not chain, or that cannot be.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        factors: Sequence[Any],
        bias: bool | int = True,
        *,
        seed: int = 0,
        stream: int = 0,
        init: str = "he",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        super().__init__(
            out_features, in_features, factors, bias, seed, stream, init, device, dtype
        )

    def cost(self, batch: int) -> Plan:
        """Say how a batch is multiplied, and with how many multiply-adds: print it."""
        batch = example_size(batch)
        if batch not in self._plans:
            self._plans[batch] = plan_product(self.sums, batch)
        return self._plans[batch]

    def forward(self, x: Tensor) -> Tensor:
        """(…, m) → (…, n)."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise SubspanError(
                f"expected inputs (…, {self.in_features}), got {tuple(x.shape)}: in_features is "
                f"{self.in_features}"
            )
        rows = x.reshape(-1, self.in_features)
        y = self._form(self.cost(rows.shape[0]), rows).view(*x.shape[:-1], self.out_features)
        bias = self.full_bias()
        y = y if bias is None else y + bias
        return y.to(autocast_type(y))

    @property
    def weight(self) -> Tensor:
        """(n, m)."""
        return guard(self.matrix)

    def dense(self) -> nn.Linear:
        """``nn.Linear`` with this weight."""
        return linear(self.weight, self.full_bias())

    def extra_repr(self) -> str:
        """Sizes, and the factors."""
        return f"{self.in_features}, {self.out_features}, {self.describe_factors()}"
