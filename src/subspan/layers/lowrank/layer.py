"""The factors of a layer of low rank: their state, their ranks, and the product with an input."""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from subspan.errors import SubspanError, is_integer
from subspan.families.operator import transformed
from subspan.layers import factors
from subspan.layers.plain import autocast_type
from subspan.layers.protocol import Compressed
from subspan.layers.watched import Geometry, Tangents, Watched, down, out
from subspan.precision import full_precision
from subspan.subspace.functions import ordinary_tensors

_OWN = (Tensor, nn.Parameter, factors.Factor, factors.Value, type(None))


class LowRank(Compressed, type_name="lowrank"):
    """A layer with weight W = U S Vᵀ, as an n × m matrix.

    Attributes:
        U: (n, r) parameter.
        S: (r, r) parameter.
        V: (m, r) parameter.
        bias: (n,) parameter, or None.
    """

    resizes = True
    _watcher: weakref.ref[Tangents] | None = None

    def __init__(
        self,
        n: int,
        m: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if not is_integer(rank, 1, min(n, m)):
            raise SubspanError(
                f"the rank of a {n} × {m} weight must be an integer in [1, {min(n, m)}], got "
                f"{rank!r}"
            )
        like = {"device": device, "dtype": dtype}
        self.U = nn.Parameter(torch.empty(n, rank, **like))  # type: ignore[arg-type]
        self.S = nn.Parameter(torch.empty(rank, rank, **like))  # type: ignore[arg-type]
        self.V = nn.Parameter(torch.empty(m, rank, **like))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(n, **like)) if bias else None  # type: ignore[arg-type]
        self.reset_parameters()
        self._adopt()

    def _adopt(self) -> None:
        """Take the parameters for this layer's, so that they are not averaged with another's."""
        for name in "USV":
            parameter = self._parameters.get(name)
            if parameter is not None:
                factors.adopt(name, parameter)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random orthonormal bases and S = c·1, at the scale ‖W‖ of PyTorch's layers."""
        n, m = self.shape
        for basis in (self.U, self.V):
            basis.copy_(torch.linalg.qr(torch.randn_like(basis, dtype=torch.float32)).Q)
        # Their entries are uniform in ±1/√m, with variance 1/(3m): ‖W‖² = n/3.
        self.S.zero_().diagonal().fill_(math.sqrt(n / 3 / self.rank))
        if self.bias is not None:
            self.bias.uniform_(-1 / math.sqrt(m), 1 / math.sqrt(m))

    @property
    def rank(self) -> int:
        """The number of columns of U and V."""
        return self.S.shape[0]

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """The shape (n, m) of the weight as a matrix."""
        return self.U.shape[0], self.V.shape[0]

    @property
    def recipe(self) -> int:
        """The rank."""
        return self.rank

    @classmethod
    def make(cls, recipe: int, **arguments: Any) -> Self:
        """Make a layer of a rank, with random factors."""
        return cls(rank=recipe, **arguments)

    def recipe_in(self, tensors: Mapping[str, Tensor]) -> int:
        """Return the rank of the core S among the tensors, if the weight can have it."""
        core = tensors.get("S", self.S)
        r = len(core) if core.dim() else 0
        return r if 1 <= r <= min(self.shape) else self.rank

    def resize(self, recipe: Any) -> None:
        """Take a rank, with any factors."""
        (n, m), empty = self.shape, self.S.new_empty
        self.set_factors(empty(n, recipe), empty(recipe, recipe), empty(m, recipe))

    @property
    def inference_numbers(self) -> int:
        """The number of parameters of two factors, r (n + m), and of the bias."""
        return self.own_numbers - self.S.numel()

    @classmethod
    def published_counts(cls, layers: Sequence[LowRank], matrices: int) -> dict[str, int]:
        """Count r (n + 1) numbers of a layer in evaluation, 5 r (n + m) + 12 r² in training."""
        sizes = [(*layer.shape, layer.rank) for layer in layers]
        return {
            "'params eval' of Schotthöfer 2022": sum(r * (n + 1) for n, _, r in sizes) + matrices,
            "'params train' of Schotthöfer 2022": sum(
                5 * r * (n + m) + 12 * r * r for n, m, r in sizes
            )
            + 2 * matrices,
        }

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W in the shape of the dense layer's, made at each call, to look at and not to train."""

    @property
    def tangents(self) -> Tangents | None:
        """Return the object that watches this layer, if there is one."""
        return None if self._watcher is None else self._watcher()

    def _watched(self) -> Tangents | None:
        """Return the tangents, where a pass through the layer that begins now is to have them.

        A layer that is frozen has none, and a trace has no place for them. Transforms of functions
        (``torch.func``, forward mode) are about the three factors alone, and a function of our own
        would be in their way.
        """
        tangents = self.tangents
        if tangents is None or not tangents.awake or not torch.is_grad_enabled():
            return None
        if not (self.U.requires_grad and self.S.requires_grad and self.V.requires_grad):
            return None
        if torch.compiler.is_compiling():
            return tangents
        return None if transformed() or torch._C._is_tracing() else tangents

    def _matrix(self) -> Tensor:
        """W (n, m), expanded."""
        with ordinary_tensors(), full_precision(self.U.device):
            U, S, V = self.U, self.S, self.V
            W, watched = U @ S @ V.T, self._watched()
            return W if watched is None else W + watched.k.T @ V.T + U @ watched.l

    def set_factors(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        """Take factors (n, r'), (r', r') and (m, r'); the parameters stay the same objects.

        Where the rank changes, gradients of the old factors are dropped. A backward pass through
        the layer as it was is refused by autograd.
        """
        with ordinary_tensors():
            for factor, new in ((self.U, U), (self.S, S), (self.V, V)):
                increment_version(factor)
                if factor.shape == new.shape:
                    factor.data.copy_(new)
                    continue
                factor.grad = None
                # A graph that is still alive (that of the last loss) keeps the node that
                # accumulates this gradient, which knows the old shape. A change of type or device,
                # and only that, makes autograd forget the node.
                dtype = factor.dtype
                other = torch.float64 if dtype == torch.float32 else torch.float32
                factor.data = torch.empty(0, dtype=other, device=factor.device)
                # Allocated at its own size:
                factor.data = new.detach().to(dtype).clone(memory_format=torch.contiguous_format)
        self._renew_tangents()

    def _renew_tangents(self) -> None:
        """Bring k and l to the shape, type and device of the factors."""
        tangents = self.tangents
        if tangents is None:
            return
        was = len(tangents.k), len(tangents.l), tangents.k.dtype, tangents.k.device
        if was != (self.S.shape[1], self.S.shape[0], self.S.dtype, self.S.device):
            tangents.renew(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the layer to another device or type, and what watches it, too."""
        super()._apply(fn, recurse)
        self._adopt()
        self._renew_tangents()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the watcher behind: copies of the layer are not what it watches."""
        return {name: value for name, value in vars(self).items() if name != "_watcher"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the copied parameters for this layer's."""
        super().__setstate__(state)
        self._adopt()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Add the witness, by which loading knows factors that have been averaged."""
        self._adopt()  # what was put in the place of a factor
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (witness := self.witness) is not None:
            destination[prefix + "witness"] = witness

    @property
    def witness(self) -> Tensor | None:
        """W z (n,), which a state holds beside the factors; None where something computes them."""
        U, S, V = (self._parameters.get(name) for name in "USV")
        for p in (U, S, V):
            if not isinstance(p, factors.Factor) or p.is_meta:
                return None
        with ordinary_tensors():
            return factors.witness(U, S, V)  # type: ignore[arg-type]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        """Take the rank of the file, too.

        Raises:
            SubspanError: if somebody has averaged the factors one by one, or left some out that
                are not those of this layer.
        """
        self.check_meaning(state_dict, prefix, *rest)
        tensors = [state_dict[prefix + name] for name in "USV" if prefix + name in state_dict]
        saved = state_dict.pop(prefix + "witness", None)  # older states have none
        if len(tensors) < 3 and saved is not None:
            own = ((prefix + name, self._parameters.get(name)) for name in "USV")
            both = [state_dict.get(key, p).to(p.device) for key, p in own if p is not None]
            if len(both) == 3 and not factors.belong(both, saved):
                raise SubspanError(
                    f"this state_dict lacks some of {prefix}U, {prefix}S and {prefix}V, perhaps "
                    "because their shapes differ, and those of the layer are others: load it "
                    "whole, for a layer takes the rank of a state, or leave out these three and "
                    f"{prefix}witness"
                )
        if len(tensors) == 3 and all(t.dim() == 2 for t in tensors):
            U, S, V = tensors
            (n, m), r = self.shape, S.shape[0]
            if (U.shape, S.shape, V.shape) == ((n, r), (r, r), (m, r)):
                with ordinary_tensors():
                    if saved is not None:
                        factors.check(prefix.removesuffix(".") or "the layer", tensors, saved)
                    self.set_factors(U.to(self.U), S.to(self.S), V.to(self.V))
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)
        self._adopt()

    def _output(self, x: Tensor, how: Geometry | None) -> Tensor:
        """Return the layer's output; in the type of autocast, where that is on."""
        given: tuple[Tensor, ...] = (self.U, self.S, self.V)
        bias: Tensor | None = self.bias
        # Those of another kind, as a functional call puts there, have rules of their own.
        own = all(type(tensor) in _OWN for tensor in (*given, bias))
        with ordinary_tensors() if own else nullcontext():
            x = x.to(autocast_type(x))
            kind, watched = x.dtype, self._watched() if own else None
            if not (kind.is_floating_point or kind.is_complex):
                raise SubspanError(
                    f"expected inputs of a floating dtype, got {kind}: use x.float()"
                )
            bias = None if bias is None else bias.to(kind)
            if watched is not None:
                return Watched.apply(x, *given, bias, watched.k, watched.l, how)
            U, S, V = (factor.to(kind) for factor in given)
            return out(down(x, V, how), S, U, how, bias)
