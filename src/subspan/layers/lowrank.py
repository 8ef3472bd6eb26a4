"""Linear and convolutional layers whose weight is U S Vᵀ, never expanded.

Sources: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets: finding
efficient low-rank neural networks via matrix differential equations", NeurIPS 2022 (layers);
Zangrando et al. 2023, GeoLoRA 2024 (all gradients from one backward pass).

    y = U S Vᵀ x        h = Vᵀ x,  q = Uᵀ ∂y

    true gradients                      gradients of the integrators (G = ∂W, the dense one)
    ∂U = ∂y (S h)ᵀ  = G V Sᵀ            ∂K = ∂y hᵀ = G V      of K = U S
    ∂S = q hᵀ       = Uᵀ G V            ∂S = q hᵀ  = Uᵀ G V
    ∂V = x (Sᵀ q)ᵀ  = Gᵀ U S            ∂L = x qᵀ  = Gᵀ U     of L = V Sᵀ

Both cost O(B (n + m) r) for B samples. The right ones do not contain S, whose small singular values
are what makes plain gradient descent on the factors stall.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn import grad as conv_grad

from subspan.errors import SubspanError
from subspan.layers.plain import Convolution, filled, linear


class LowRank(nn.Module, ABC):
    """A layer with weight W = U S Vᵀ, as an n × m matrix.

    Attributes:
        U: (n, r) parameter.
        S: (r, r) parameter.
        V: (m, r) parameter.
        bias: (n,) parameter, or None.
        gradients: what ``backward`` leaves in ``U.grad``, ``S.grad`` and ``V.grad``: "true", the
            gradients of these three; "tangent", ∂K, ∂S and ∂L; "core", ∂S alone.
            :class:`subspan.optim.DLRT` sets it on the layers it trains; any other optimizer needs
            "true".
    """

    def __init__(
        self, n: int, m: int, rank: int, bias: bool,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= rank <= min(n, m):
            raise SubspanError(
                f"the rank of a {n} × {m} weight must be in [1, {min(n, m)}], got {rank}"
            )
        like = {"device": device, "dtype": dtype}
        self.U = nn.Parameter(torch.empty(n, rank, **like))  # type: ignore[arg-type]
        self.S = nn.Parameter(torch.empty(rank, rank, **like))  # type: ignore[arg-type]
        self.V = nn.Parameter(torch.empty(m, rank, **like))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(n, **like)) if bias else None  # type: ignore[arg-type]
        self.gradients: Literal["true", "tangent", "core"] = "true"
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random orthonormal bases and S = c·1, at the scale ‖W‖ of PyTorch's layers."""
        n, m = self.shape
        for basis in (self.U, self.V):
            basis.copy_(torch.linalg.qr(torch.randn_like(basis, dtype=torch.float32)).Q)
        # Their entries are uniform in ±1/√m, with variance 1/(3m): ‖W‖² = n/3.
        self.S.copy_(torch.eye(self.rank) * math.sqrt(n / 3 / self.rank))
        if self.bias is not None:
            self.bias.uniform_(-1 / math.sqrt(m), 1 / math.sqrt(m))

    @property
    def rank(self) -> int:
        """The number of columns of U and V."""
        return self.S.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as a matrix: n and m."""
        return self.U.shape[0], self.V.shape[0]

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W in the shape of the dense layer's, made at each call: for looking at, not for work."""

    @abstractmethod
    def dense(self) -> nn.Module:
        """The ordinary layer with this weight."""

    @abstractmethod
    def two_factors(self) -> nn.Sequential:
        """Two ordinary layers, of Vᵀ and of U S."""

    def set_factors(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        """Take other factors, perhaps of another rank; the parameters stay the same objects.

        Args:
            U: (n, r').
            S: (r', r').
            V: (m, r').
        """
        for own, new in ((self.U, U), (self.S, S), (self.V, V)):
            if own.shape == new.shape:
                own.data.copy_(new)
            else:  # allocated at its own size
                own.grad = None
                # A graph that is still alive (that of the last loss) keeps the node that
                # accumulates this gradient, which knows the old shape. A change of type, and only
                # that, makes autograd forget the node.
                dtype = own.dtype
                other = torch.float64 if dtype == torch.float32 else torch.float32
                own.data = torch.empty(0, dtype=other, device=own.device)
                own.data = new.detach().to(dtype).clone(memory_format=torch.contiguous_format)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        """Take the rank of the file, too."""
        found = [state_dict[prefix + name] for name in "USV" if prefix + name in state_dict]
        if len(found) == 3 and all(t.dim() == 2 for t in found):
            U, S, V = found
            (n, m), r = self.shape, S.shape[0]
            if (U.shape, S.shape, V.shape) == ((n, r), (r, r), (m, r)):
                self.set_factors(U.to(self.U), S.to(self.S), V.to(self.V))
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """x, U, S, V and the bias in one type: that of autocast, where it is on."""
        if not torch.is_autocast_enabled(x.device.type):
            return x, self.U, self.S, self.V, self.bias
        kind = torch.get_autocast_dtype(x.device.type)
        bias = None if self.bias is None else self.bias.to(kind)
        return x.to(kind), self.U.to(kind), self.S.to(kind), self.V.to(kind), bias


class LowRankLinear(LowRank):
    """``nn.Linear`` with the weight U S Vᵀ.

    Args:
        in_features: m.
        out_features: n.
        rank: r, at most min(n, m).
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SubspanError: for a rank that the weight cannot have.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.in_features, self.out_features = in_features, out_features
        super().__init__(out_features, in_features, rank, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, m) → (…, n)."""
        x, U, S, V, bias = self._inputs(x)
        if self.gradients != "true" and torch.is_grad_enabled():
            return _LinearTangent.apply(x, U, S, V, bias, self.gradients == "core")
        return F.linear(F.linear(F.linear(x, V.T), S), U, bias)

    @property
    def weight(self) -> Tensor:
        """(n, m)."""
        return self.U @ self.S @ self.V.T

    def dense(self) -> nn.Linear:
        """``nn.Linear`` with this weight."""
        return linear(self.weight, self.bias)

    def two_factors(self) -> nn.Sequential:
        """(r, m) without a bias, then (n, r)."""
        return nn.Sequential(linear(self.V.T, None), linear(self.U @ self.S, self.bias))

    def extra_repr(self) -> str:
        """As in ``nn.Linear``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class LowRankConv2d(LowRank, Convolution):
    """``nn.Conv2d`` with the kernel U S Vᵀ, out × (in·k²): r filters, then a 1×1 convolution.

    Args:
        in_channels: of the input.
        out_channels: n.
        kernel_size: of the filters.
        rank: r, at most min(n, in_channels·k²).
        stride: as in ``nn.Conv2d``.
        padding: as there.
        dilation: as there.
        bias: whether there is one.
        padding_mode: as there.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        SubspanError: for a rank that the weight cannot have.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], rank: int,
        stride: int | tuple[int, int] = 1, padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1, bias: bool = True, padding_mode: str = "zeros",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.place(in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode)
        m = in_channels * math.prod(self.kernel_size)
        super().__init__(out_channels, m, rank, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H', W')."""
        x, U, S, V, bias = self._inputs(x)
        x, padding = self.padded(x)
        if self.gradients != "true" and torch.is_grad_enabled():
            how = (self.kernel_size, self.stride, padding, self.dilation)
            return _ConvTangent.apply(x, U, S, V, bias, self.gradients == "core", how)
        h = F.conv2d(x, self._filters(V), None, self.stride, padding, self.dilation)
        return F.conv2d(h, (U @ S)[..., None, None], bias)

    def _filters(self, V: Tensor) -> Tensor:
        return V.T.reshape(-1, self.in_channels, *self.kernel_size)

    @property
    def weight(self) -> Tensor:
        """(out, in, k, k)."""
        flat = self.U @ self.S @ self.V.T
        return flat.view(-1, self.in_channels, *self.kernel_size)

    def dense(self) -> nn.Conv2d:
        """``nn.Conv2d`` with this kernel."""
        return self.ordinary(self.weight, self.bias)

    def two_factors(self) -> nn.Sequential:
        """Vᵀ as r filters without a bias, then a 1×1 convolution."""
        K = self.U @ self.S
        last = nn.Conv2d(K.shape[1], K.shape[0], 1, bias=self.bias is not None, device="meta")
        return nn.Sequential(
            self.ordinary(self._filters(self.V), None),
            filled(last, K[..., None, None], self.bias),
        )

    def extra_repr(self) -> str:
        """As in ``nn.Conv2d``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"rank={self.rank}, stride={self.stride}, padding={self.padding}, "
            f"bias={self.bias is not None}"
        )


class _LinearTangent(torch.autograd.Function):
    """y = U S Vᵀ x + b with ∂K, ∂S, ∂L in the places of ∂U, ∂S, ∂V (this file's head)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, core: bool
    ) -> Tensor:
        h = x @ V
        ctx.save_for_backward(x, h, U, S, V)
        ctx.core = core
        return F.linear(h @ S.T, U, bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, U, S, V = ctx.saved_tensors
        q = gy @ U
        gx = (q @ S) @ V.T if ctx.needs_input_grad[0] else None
        gy, h, q, x = (t.reshape(-1, t.shape[-1]) for t in (gy, h, q, x))
        bias = gy.sum(dim=0) if ctx.needs_input_grad[4] else None
        gK, gL = (None, None) if ctx.core else (gy.T @ h, x.T @ q)
        return gx, gK, q.T @ h, gL, bias, None


class _ConvTangent(torch.autograd.Function):
    """The same of a convolution."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None, core: bool,
        how: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        kernel, *geometry = how
        h = F.conv2d(x, V.T.reshape(V.shape[1], -1, *kernel), None, *geometry)
        ctx.save_for_backward(x, h, U, S, V)
        ctx.core, ctx.how = core, how
        return F.conv2d(h, (U @ S)[..., None, None], bias)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, U, S, V = ctx.saved_tensors
        kernel, *geometry = ctx.how
        filters = V.T.reshape(V.shape[1], -1, *kernel)
        q = F.conv2d(gy, U.T[..., None, None])
        gx = gK = gL = None
        if ctx.needs_input_grad[0]:
            p = F.conv2d(q, S.T[..., None, None])
            gx = conv_grad.conv2d_input(x.shape, filters, p, *geometry)
        if not ctx.core:
            gK = torch.einsum("bnhw,brhw->nr", gy, h)
            gL = conv_grad.conv2d_weight(x, filters.shape, q, *geometry).flatten(1).T
        gS = torch.einsum("bshw,brhw->sr", q, h)
        bias = gy.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[4] else None
        return gx, gK, gS, gL, bias, None, None
