"""Weights that another library keeps quantised: θ₀ is dequantised where it is needed, and dropped.

A quantised weight stays in its module as the library made it. A :class:`QuantisedTensor` describes
it: its logical shape and dtype, how it becomes dense, and the tensors that it is made of, which a
fingerprint covers. For each kind of weights a function makes the description from a parameter and
its module; neither library is imported before a weight or module of its own is met. The layers
around such weights are :mod:`subspan.subspace.quantised_layers`.

* bitsandbytes: ``Linear4bit`` (nf4, fp4) and ``Linear8bitLt``, whose weights are packed bytes with
  scales beside them, and whose forward has a product of its own.
* torchao: weight-only subclasses of tensors, which look like dense ones and can dequantise.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from subspan.subspace.functions import ordinary_tensors


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A quantised weight."""

    kind: str  # names the library and the format: "bitsandbytes-nf4"
    shape: torch.Size  # of the dense weight
    dtype: torch.dtype  # of the dense weight
    parts: Mapping[str, Tensor]  # that it is made of, by name
    make: Callable[[], Tensor] = field(repr=False)  # gives the dense weight
    text: str = ""  # what else is needed to dequantise, for the digest
    refusal: str = ""  # why this weight cannot be trained in a subspace
    entries: slice | None = None  # of the flattened weight that are meant; None for all of it

    def numel(self) -> int:
        """Return the number of weights, not of packed numbers."""
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return next(iter(self.parts.values())).device

    @property
    def version(self) -> tuple[int, ...]:
        """The number of changes in place of each of its tensors."""
        return tuple(-1 if t.is_inference() else t._version for t in self.parts.values())

    def cut(self, start: int, stop: int) -> QuantisedTensor:
        """Take entries start … stop−1 of the flattened weight."""
        return replace(self, entries=slice(start, stop))

    def dense(self) -> Tensor:
        """Dequantise: an ordinary tensor that nobody else has."""
        with ordinary_tensors(), torch.no_grad():
            weight = self.make()
        return weight if self.entries is None else weight.reshape(-1)[self.entries]


def dense(base: Tensor | QuantisedTensor) -> Tensor:
    """θ₀ as an ordinary tensor."""
    return base.dense() if isinstance(base, QuantisedTensor) else base


# ---- kinds ---------------------------------------------------------------------------------------


def read_quantised(module: nn.Module, attribute: str) -> QuantisedTensor | None:
    """Describe a module's weight if it is quantised; else return None."""
    parameter = module._parameters[attribute]
    kind = _kind(type(module), _own_class(parameter))  # type: ignore[arg-type]
    if kind is None or (kind is not _torchao and attribute != "weight"):
        return None
    return kind(parameter, module, parameter)


def read_kind(kind: str, parameter: Any, module: Any, like: Any) -> QuantisedTensor:
    """Describe a weight whose kind is known, in a program that compilers can read.

    ``parameter`` may be what an exporter has put into the place of the parameter itself, which is
    ``like``, and has what else is needed.
    """
    if kind.startswith("torchao"):
        return _torchao(parameter, module, like)
    if kind == "bitsandbytes-int8":
        return _eight_bits(parameter, module, like)
    return _four_bits(parameter, module, like)


def _own_class(parameter: Any) -> type:
    return getattr(parameter, "kind", type(parameter))  # that a frozen one had


@functools.cache
def _kind(module: type, parameter: type) -> Callable[[Any, Any, Any], QuantisedTensor] | None:
    """Find the function that reads the packed weights of a class, in modules of a class.

    The module's class counts, too, because a pickled parameter has lost its own.
    """
    if is_class(parameter, "torchao"):
        return _torchao
    for name, kind in (("Linear4bit", _four_bits), ("Linear8bitLt", _eight_bits)):
        if is_class(module, "bitsandbytes", name):
            return kind
    return None


def is_class(cls: type, library: str, name: str = "") -> bool:
    """Return whether a class, or one that it derives from, is of a library and has a name."""
    return any(
        base.__module__.partition(".")[0] == library and (not name or base.__name__ == name)
        for base in cls.__mro__
    )


def _four_bits(parameter: Any, module: Any, like: Any) -> QuantisedTensor:
    """Return a weight of ``bitsandbytes.nn.Linear4bit``."""
    state = getattr(like, "quant_state", None) or module.quant_state
    if state is None:
        return _not_yet(parameter, f"bitsandbytes-{getattr(parameter, 'quant_type', '4bit')}")
    with ordinary_tensors():
        packed = parameter.detach()
    parts = {"packed": packed, "absmax": state.absmax, "code": state.code}
    text = f"blocks of {state.blocksize}"
    if state.nested:
        parts |= {"offset": state.offset, "nested.absmax": state.state2.absmax}
        parts["nested.code"] = state.state2.code
        text += f", nested blocks of {state.state2.blocksize}"
    refusal = ""
    if getattr(state, "packing_format_for_cpu", False):
        text += ", packed for the processor"
        refusal = (
            "was packed anew, with scales rounded to 16 bits, when bitsandbytes ran the network in "
            "evaluation mode on this processor: load the network anew and wrap it before it runs"
        )

    def make() -> Tensor:
        return sys.modules["bitsandbytes.functional"].dequantize_4bit(packed, state)

    kind, shape = f"bitsandbytes-{state.quant_type}", torch.Size(state.shape)
    return QuantisedTensor(kind, shape, state.dtype, parts, make, text, refusal)


def _eight_bits(parameter: Any, module: Any, like: Any) -> QuantisedTensor:
    """A weight of ``bitsandbytes.nn.Linear8bitLt``, whose scales move from it to its module."""
    with ordinary_tensors():
        numbers = parameter.detach()
    scales = getattr(like, "SCB", None)
    scales = module.state.SCB if scales is None else scales
    if module.state.has_fp16_weights:
        refusal = (
            "is quantised at each call only: make the layer with has_fp16_weights=False, or "
            "exclude it"
        )
        return _not_yet(parameter, "bitsandbytes-int8", refusal)
    if numbers.dtype != torch.int8 or scales is None:
        return _not_yet(parameter, "bitsandbytes-int8")

    def make() -> Tensor:
        library = sys.modules["bitsandbytes.functional"]
        return library.int8_vectorwise_dequant(numbers, scales)

    parts = {"packed": numbers, "scales": scales}
    return QuantisedTensor("bitsandbytes-int8", numbers.shape, torch.float32, parts, make)


def _not_yet(parameter: Tensor, kind: str, refusal: str = "") -> QuantisedTensor:
    """Return a weight that will be quantised one day."""
    with ordinary_tensors():
        data = parameter.detach()
    refusal = refusal or (
        "is not quantised yet, which bitsandbytes does when the network is moved: net.to('cpu'), "
        "or to its device, before it is wrapped"
    )
    return QuantisedTensor(
        kind, data.shape, data.dtype, {"packed": data}, data.clone, "none yet", refusal
    )


def _torchao(parameter: Any, module: Any, like: Any) -> QuantisedTensor:
    """Return a parameter of torchao: a subclass that is made of tensors."""
    cls = _own_class(like)
    with ordinary_tensors():
        parts = dict(_inner(parameter))
    refusal = ""
    if not hasattr(cls, "dequantize") or not parts:
        refusal = (
            f"is a {cls.__name__}, which torchao cannot dequantise: use Int8WeightOnlyConfig or "
            "IntxWeightOnlyConfig, or exclude it"
        )
    activations = ("act_quant_kwargs", "activation_quantization", "act_quant_scale")
    if any(getattr(parameter, name, None) is not None for name in activations):
        refusal = (
            "quantises activations, too, and a subspace needs weights alone to be quantised: "
            "use a weight-only configuration of torchao, or exclude it"
        )

    def make() -> Tensor:
        return cls.dequantize(parameter).to(parameter.dtype).contiguous()  # type: ignore[attr-defined]

    return QuantisedTensor(
        f"torchao-{cls.__name__}", parameter.shape, parameter.dtype, parts, make, "", refusal
    )


def _inner(tensor: Any) -> Iterable[tuple[str, Tensor]]:
    """The ordinary tensors that a subclass is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return
    for name in sorted(tensor.__tensor_flatten__()[0]):
        inside = getattr(tensor, name)
        if inside is None:
            continue
        if is_traceable_wrapper_subclass(inside):
            yield from ((f"{name}.{more}", part) for more, part in _inner(inside))
        else:
            yield name, inside
