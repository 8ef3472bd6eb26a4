"""Factors that cannot be averaged one by one.

The mean of two weights U₁ S₁ V₁ᵀ and U₂ S₂ V₂ᵀ has twice their rank, and the product of the means
of their factors is another matrix. Programs that average parameters (moving averages, stochastic
weight averaging, federated learning) know nothing of that. Two things tell them:

- The parameters U, S and V, and what is detached, cloned or scaled from them, are tensors that know
  which layer they are from, and so are vectors of all parameters. Sums, interpolations and stacks
  of the same factor of two layers, or of a layer and an older copy of it, are refused. Everything
  else is as with ordinary tensors.
- A layer's state has a witness, W z for a fixed vector z. Whatever averages the numbers of files
  averages it, too, and then it is that of the mean of W. Loading compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subspan.errors import SubspanError
from subspan.linalg import fixed_vector
from subspan.subspace.functions import ordinary_tensors

# Names of functions of PyTorch. A difference is no average, but what is made of it may be one.
SUMS = frozenset({"add", "iadd", "radd", "isub", "lerp", "stack"})
_DIFFERENCES = {"sub", "rsub"}
_COPIES = {"detach", "data", "clone", "contiguous", "to", "cpu", "cuda"}
_CASTS = {"float", "double", "half", "bfloat16"}
_MULTIPLES = {"mul", "rmul", "div", "truediv", "true_divide", "neg"}
_FLAT = {"view", "reshape", "flatten", "ravel"}
# Their results know the layer, too.
KEPT = SUMS | _DIFFERENCES | _COPIES | _CASTS | _MULTIPLES | _FLAT | {"cat"}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the witness; 16 bits: 3 %
REFUSED = (
    "{} cannot be averaged one by one, for the product of such averages is not the average of the "
    "weights U S Vᵀ: average the weights (layers.merge() gives ordinary layers), or the outputs"
)


class Value(Tensor):
    """The values of one factor of one layer, or of a copy."""

    of: tuple[str, object]  # the factor's name, and what stands for the layer at one time

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function on ordinary tensors, but for sums of factors of different layers."""
        kwargs, name = kwargs or {}, func.__name__
        if name == "__get__":
            if func.__self__ is not Tensor.data:  # the common ones: grad, shape, dtype, …
                with ordinary_tensors():
                    return func(*args)
            name = "data"
        each, name = name.startswith("_foreach_"), name.removeprefix("_foreach_")
        name = "isub" if name == "sub_" else name.strip("_")  # which changes a factor
        if name in SUMS or name == "copy":
            groups: Iterable[Any] = zip(*_lists(args, kwargs), strict=False) if each else [args]
            for tensors in groups:
                _refuse(name, [t for t in tree_leaves((tensors, kwargs)) if isinstance(t, Value)])
        with ordinary_tensors():
            out = func(*args, **kwargs)
        if name in KEPT and type(out) is Tensor and out.is_floating_point():
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            factors = [t for t in tensors if isinstance(t, Value)]
            alone = all(isinstance(t, Value) or not t.dim() for t in tensors)
            flat = name in _FLAT and out.dim() == 1
            if name == "cat" and factors and out.dim() == 1:  # all parameters as one vector
                out = _tagged(out, Value, ("U, S and V", object()))
            elif factors and alone and (flat or out.shape == factors[0].shape):
                factor, same = factors[0].of
                live = name in ("detach", "data") or flat
                out = _tagged(out, Value, (factor, same if live else object()))
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy; that of a parameter is an ordinary one, until a layer takes it."""
        if id(self) not in memo:
            with ordinary_tensors():
                data = self.detach().clone(memory_format=torch.preserve_format)
                memo[id(self)] = (
                    nn.Parameter(data, self.requires_grad)
                    if isinstance(self, nn.Parameter)
                    else _tagged(data, Value, (self.of[0], object()))
                )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle an ordinary tensor: files hold nothing else."""
        with ordinary_tensors():
            data = self.detach()
            if isinstance(self, nn.Parameter):
                return nn.Parameter(data, self.requires_grad).__reduce_ex__(protocol)
            return data.__reduce_ex__(protocol)


class Factor(Value, nn.Parameter):
    """U, S or V of a layer: a parameter like any other, but for averages."""

    may_be_computed = True  # in a subspace, where it is one weight among others


def adopt(factor: str, parameter: nn.Parameter) -> None:
    """Make an ordinary parameter, or one made of a factor's values, that of a layer.

    It stays the same object.
    """
    if type(parameter) in (nn.Parameter, Value):
        _tagged(parameter, Factor, (factor, object()))


def witness(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """W z (n,) of factors (n, r), (r, r), (m, r), for a z that is always the same."""
    U, S, V = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (U, S, V))
    return U @ (S @ (V.T @ fixed_vector(len(V)).to(V)))


def check(name: str, factors: Sequence[Tensor], saved: Tensor) -> None:
    """Refuse U, S and V that are to be loaded and are not those of the witness beside them."""
    if not belong(factors, saved):
        raise SubspanError(
            REFUSED.format(f"U, S and V of {name} do not belong together: factors")
            + f"; or leave {name}.witness out of the state, if this is what it shall be"
        )


def belong(factors: Sequence[Tensor], saved: Tensor) -> bool:
    """Return whether U, S and V have a witness, as far as numbers that are finite can tell."""
    if any(t.is_meta or not t.is_floating_point() for t in (*factors, saved)):
        return True
    U, S, V = factors
    if (*U.shape[1:], *V.shape[1:]) != S.shape or U.shape[:1] != saved.shape:
        return False
    expected = witness(*factors)
    kinds = [TOLERANCE.get(t.dtype, 0.03) for t in (*factors, saved)]
    size = torch.maximum(expected.norm(), saved.norm().to(expected))
    # What is not finite is no average, and not for us to judge.
    return not bool((expected - saved.to(expected)).norm() > max(kinds) * size)


def _tagged(tensor: Tensor, cls: type[Value], of: tuple[str, object]) -> Tensor:
    tensor.__class__ = cls
    tensor.of = of  # type: ignore[attr-defined]
    return tensor


def _lists(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    """The lists of tensors among the arguments of a function for each of several tensors."""
    return (
        argument for argument in (*args, *kwargs.values()) if isinstance(argument, list | tuple)
    )


def _refuse(name: str, values: Iterable[Value]) -> None:
    """Refuse to add up the same factor of different layers, and to copy one of another rank."""
    first: dict[str, Value] = {}
    for value in values:
        other = first.setdefault(value.of[0], value)
        if name == "copy":
            if value.shape != other.shape:
                raise SubspanError(
                    f"factors {value.of[0]} of ranks {other.shape[-1]} and {value.shape[-1]} "
                    "cannot be copied to each other, for ranks have changed: use "
                    "load_state_dict(), which takes the rank, too"
                )
        elif value.of[1] is not other.of[1]:
            raise SubspanError(REFUSED.format(f"factors {value.of[0]} of several layers"))
