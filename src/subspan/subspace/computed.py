"""θ that was read outside of a call of the network: ordinary, but not to write to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from subspan.errors import SubspanError
from subspan.subspace import callers, functions
from subspan.subspace.functions import ordinary_tensors, property_of
from subspan.subspace.transient import Transient


def refuse_change(
    tensor: str, function: Any, instead: str = ", or that of merge() or unwrap()"
) -> SubspanError:
    """Make the refusal of a function that writes to a computed weight."""
    name = property_of(function) or getattr(function, "__name__", "")
    return SubspanError(
        f"{tensor} is θ₀ + P w, computed when it is read, and a change of it ({name}) would be "
        f"lost: change the network before it is wrapped{instead}"
    )


class Computed(Transient):
    """A weight θ that was read outside of a call of the network: ordinary, but not to write to.

    It was made a moment ago and belongs to nobody, so that a change of it would be lost without a
    word: ``net.fc.weight.data.zero_()`` is refused.
    """

    weight_name = ""
    _marks: dict[str, Any] | None = None  # attributes of the parameter whose weight it is

    def __setattr__(self, name: str, value: Any) -> None:
        """Give an attribute of a person's to the parameter, too, which lives on."""
        if self._marks is not None and not hasattr(Computed, name):
            self._marks[name] = value
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if self._marks is not None:
            self._marks.pop(name, None)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = tree_leaves(functions.written_by(func, args, kwargs))
        target = next((t for t in written if type(t) is Computed), None)
        name = getattr(func, "__name__", "")
        if target is not None and name != "requires_grad_":
            if name == "__set__" and _sets_the_same(target, args[1]):
                return None  # a bias that is padded by nothing, as tie_weights() does
            raise target._refuse_change(func)
        if target is not None and not target._may_set_flag(args, kwargs):
            if callers.switches_adapters(sys._getframe(1)):
                return target  # a disabled adapter has no gradient anyway
            raise target._refuse_flag()
        if name == "__set__" and property_of(func) == "requires_grad":
            if not args[0]._may_set_flag(args, {}):
                raise args[0]._refuse_flag()
            func = Tensor.requires_grad_  # the property is refused in a graph, even if it stays
        of_gradients = name in _OF_GRADIENTS or (name != "name" and property_of(func) == "grad")
        if of_gradients and args[0]._is_theta:
            raise SubspanError(
                f"{args[0].weight_name} is computed, and its gradient goes on to the coordinates "
                "and is kept there alone: look at theirs, or read the weight inside of a call"
            )
        if name == "__dlpack__" and not kwargs.get("copy"):
            raise SubspanError(
                f"{args[0].weight_name} is θ₀ + P w, computed when it is read, and what another "
                "library writes to its memory (__dlpack__) would be lost: give it .detach().clone()"
            )
        if name == "type" or property_of(func) == "is_leaf":
            args[0]._check_use()
        if name not in _OF_NOW and not torch.compiler.is_compiling():
            for tensor in tree_leaves((args, kwargs)):
                if type(tensor) is Computed:
                    tensor._check_time()
        with ordinary_tensors():
            if func is torch.autograd.grad:
                return _take_gradients(func, args, kwargs)
            out = func(*args, **kwargs)
            if name in ("numpy", "__array__"):
                functions.read_only(out, args[0])
            elif args and type(args[0]) is Computed:
                out = functions.map_tensors(args[0]._guard_view, out)
        return out

    def _guard_view(self, out: Tensor) -> Tensor:
        """Make a view of θ as careful as θ itself."""
        if type(out) is Tensor and not out.is_sparse and functions.share_memory(out, self):
            out = out.as_subclass(Computed)
            out.weight_name, out._lender = self.weight_name, self._lender
            out._now, out._then = self._now, self._then
        return out

    def _may_set_flag(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Return whether requires_grad may be set: on a detached copy, or as it is already."""
        with ordinary_tensors():
            flag = kwargs.get("requires_grad", args[1] if len(args) > 1 else True)
            detached = self.is_leaf and not self._is_theta and not self._lender
            return detached or bool(flag) == self.requires_grad

    def _check_use(self) -> None:
        """Refuse what PyTorch is about to refuse in other words, or not to notice."""
        if torch.compiler.is_compiling():
            return
        frame = sys._getframe(2)
        if self._is_theta and callers.adds_to_optimizer(frame):
            raise SubspanError(
                f"{self.weight_name} is computed, and an optimizer has nothing of it to change: "
                "give it the parameters of the SubspaceModel or of the whole network"
            )
        if callers.registers_parameter(frame):
            raise SubspanError(
                f"{self.weight_name} is computed from coordinates and cannot be a parameter of "
                "another module, too: tie or convert modules before the network is wrapped, or "
                "those of merge()"
            )

    _is_theta = False
    _lender = ""  # the variant whose tensor it is, where that is no θ
    _now: Callable[[], Any] | None = None
    _then: Any = None

    def _check_time(self) -> None:
        """Refuse to compute with a θ that was read before its coordinates changed."""
        if self._now is not None and self._now() != self._then:
            raise SubspanError(
                f"{self.weight_name} was read before its coordinates changed, and what was read "
                "does not follow them: read it again from its module, or keep a .detach().clone() "
                "of what it was"
            )

    def _refuse_change(self, function: Any) -> SubspanError:
        if not self._lender:
            return refuse_change(self.weight_name, function)
        name = property_of(function) or function.__name__
        return SubspanError(
            f"{self.weight_name} is that of variant {self._lender} while it is in use, and a "
            f"change ({name}) would be one of the variant: leave `with variants.use(…)` first"
        )

    def _refuse_flag(self) -> SubspanError:
        if self._lender:
            return self._refuse_change(Tensor.requires_grad_)
        return SubspanError(
            f"{self.weight_name} is trained through coordinates that it may share with others, and "
            "cannot be frozen alone: give exclude= when the network is wrapped"
        )


_OF_NOW = frozenset({"__get__", "__set__", "type", "grad", "backward", "size", "dim", "numel"})
_OF_GRADIENTS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})


def _sets_the_same(tensor: Tensor, data: Any) -> bool:
    """Return whether ``tensor.data = data`` leaves every number as it is."""
    with ordinary_tensors():
        like = (data.shape, data.dtype, data.device) == (tensor.shape, tensor.dtype, tensor.device)
        return like and torch.equal(tensor, data)


def _take_gradients(function: Any, args: Any, kwargs: Any) -> Any:
    """Call ``torch.autograd.grad``, and refuse a θ that has no gradient as it was read apart."""
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    lenient = {"allow_unused": True, "materialize_grads": False}
    gradients = (
        function(*args[:2], **(kwargs | lenient)) if len(args) < 3 else function(*args, **kwargs)
    )
    for tensor, gradient in zip(inputs, gradients, strict=True):
        if gradient is None and type(tensor) is Computed:
            raise SubspanError(
                f"{tensor.weight_name} is computed at each read, and this read is not the one that "
                "was used: read it once, and use what was read, or ask for the coordinates"
            )
    if any(gradient is None for gradient in gradients) and not kwargs.get("allow_unused"):
        return function(*args, **kwargs)  # with its own words
    if kwargs.get("materialize_grads"):
        pairs = zip(inputs, gradients, strict=True)
        return tuple(torch.zeros_like(t) if g is None else g for t, g in pairs)
    return gradients


def guard_lent(tensor: Tensor, name: str, lender: str) -> Tensor:
    """Make what a variant has beside θ a :class:`Computed`: whoever reads it must not write to it.

    ``lender`` is the variant's name, in quotes.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        return tensor
    with ordinary_tensors():
        lent: Any = tensor.detach().as_subclass(Computed)
    lent.weight_name, lent._lender = name, lender
    return lent


def guard_theta(
    theta: Tensor,
    name: str,
    now: Callable[[], Any] | None = None,
    *,
    itself: bool = False,
    marks: dict[str, Any] | None = None,
) -> Tensor:
    """Make θ a :class:`Computed`, in the same graph.

    ``now`` returns the same as long as θ is the weight of the network; None if it always is. With
    ``itself`` this tensor becomes one, for whoever holds it already, and no other. ``marks`` are
    the attributes of the parameter, which has those that people give θ.
    """
    guarded: Any = theta if itself else theta.as_subclass(Computed)
    guarded.__class__ = Computed
    guarded.weight_name, guarded._is_theta = name, True
    if now is not None:
        guarded._now, guarded._then = now, now()
    guarded._marks = marks
    return guarded
