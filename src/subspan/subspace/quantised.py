"""Weights that another library keeps quantised: θ₀ is dequantised where it is needed, and dropped.

A quantised weight stays in its module as the library made it. What is known of one here is a
:class:`Stored`: its logical shape and dtype, how it becomes dense, and the tensors that it is made
of, which are what a fingerprint is of. A kind of weights is a function that makes a Stored of a
parameter and its module; neither library is imported before a weight or module of its own is met.

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
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from subspan.errors import SubspanError

_plain = torch._C.DisableTorchFunctionSubclass


@dataclass(frozen=True, eq=False)
class Stored:
    """A quantised weight.

    Args:
        kind: names the library and the format: "bitsandbytes-nf4".
        shape: of the dense weight.
        dtype: of the dense weight.
        parts: the tensors that it is made of, by name.
        make: gives the dense weight.
        text: what else is needed to dequantise, for the digest.
        refusal: why this weight cannot be trained in a subspace, or "".
        entries: of the flattened weight that are meant; None for all of it.
    """

    kind: str
    shape: torch.Size
    dtype: torch.dtype
    parts: Mapping[str, Tensor]
    make: Callable[[], Tensor] = field(repr=False)
    text: str = ""
    refusal: str = ""
    entries: slice | None = None

    def numel(self) -> int:
        """Return the number of weights, not of packed numbers."""
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(iter(self.parts.values())).device

    @property
    def version(self) -> tuple[int, ...]:
        """How often its tensors were changed in place."""
        return tuple(-1 if t.is_inference() else t._version for t in self.parts.values())

    def cut(self, start: int, stop: int) -> Stored:
        """Entries start … stop−1 of the flattened weight."""
        return replace(self, entries=slice(start, stop))

    def dense(self) -> Tensor:
        """Dequantise: an ordinary tensor that nobody else has."""
        with _plain(), torch.no_grad():
            found = self.make()
        return found if self.entries is None else found.reshape(-1)[self.entries]


def dense(base: Tensor | Stored) -> Tensor:
    """θ₀ as an ordinary tensor."""
    return base.dense() if isinstance(base, Stored) else base


# ---- kinds ---------------------------------------------------------------------------------------


def stored(module: nn.Module, attribute: str) -> Stored | None:
    """Describe a module's weight if it is quantised; else return None."""
    parameter = module._parameters[attribute]
    kind = _kind(type(module), _own_class(parameter))  # type: ignore[arg-type]
    if kind is None or (kind is not _torchao and attribute != "weight"):
        return None
    return kind(parameter, module, parameter)


def known(kind: str, parameter: Any, module: Any, like: Any) -> Stored:
    """The same of a weight whose kind is known, for programs that compilers read.

    Args:
        kind: of :class:`Stored`.
        parameter: or what an exporter has put into its place.
        module: that it belongs to.
        like: the parameter itself, which has what else is needed.
    """
    if kind.startswith("torchao"):
        return _torchao(parameter, module, like)
    if kind == "bitsandbytes-int8":
        return _eight_bits(parameter, module, like)
    return _four_bits(parameter, module, like)


def _own_class(parameter: Any) -> type:
    return getattr(parameter, "kind", type(parameter))  # that a frozen one had


@functools.cache
def _kind(module: type, parameter: type) -> Callable[[Any, Any, Any], Stored] | None:
    """How weights of a class in modules of a class are stored; a pickled one has lost its class."""
    if _is(parameter, "torchao", ""):
        return _torchao
    for name, kind in (("Linear4bit", _four_bits), ("Linear8bitLt", _eight_bits)):
        if _is(module, "bitsandbytes", name):
            return kind
    return None


def _is(cls: type, library: str, name: str) -> bool:
    return any(
        base.__module__.partition(".")[0] == library and (not name or base.__name__ == name)
        for base in cls.__mro__
    )


def _four_bits(parameter: Any, module: Any, like: Any) -> Stored:
    """A weight of ``bitsandbytes.nn.Linear4bit``."""
    state = getattr(like, "quant_state", None) or module.quant_state
    if state is None:
        return _not_yet(parameter, f"bitsandbytes-{getattr(parameter, 'quant_type', '4bit')}")
    with _plain():
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

    return Stored(
        f"bitsandbytes-{state.quant_type}", torch.Size(state.shape), state.dtype, parts, make, text,
        refusal,
    )  # fmt: skip


def _eight_bits(parameter: Any, module: Any, like: Any) -> Stored:
    """A weight of ``bitsandbytes.nn.Linear8bitLt``, whose scales move from it to its module."""
    with _plain():
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
    return Stored("bitsandbytes-int8", numbers.shape, torch.float32, parts, make)


def _not_yet(parameter: Tensor, kind: str, refusal: str = "") -> Stored:
    """A weight that will be quantised one day."""
    with _plain():
        data = parameter.detach()
    refusal = refusal or (
        "is not quantised yet, which bitsandbytes does when the network is moved: net.to('cpu'), "
        "or to its device, before it is wrapped"
    )
    return Stored(kind, data.shape, data.dtype, {"packed": data}, data.clone, "none yet", refusal)


def _torchao(parameter: Any, module: Any, like: Any) -> Stored:
    """A parameter of torchao: a subclass that is made of tensors."""
    cls = _own_class(like)
    with _plain():
        parts = dict(_inner(parameter))
    for name in ("act_quant_kwargs", "activation_quantization", "act_quant_scale"):
        if getattr(parameter, name, None) is not None:
            refusal = (
                "quantises activations, too, and a subspace needs weights alone to be quantised: "
                "use a weight-only configuration of torchao, or exclude it"
            )
            break
    else:
        refusal = "" if hasattr(cls, "dequantize") and parts else (
            f"is a {cls.__name__}, which torchao cannot dequantise: use Int8WeightOnlyConfig or "
            "IntxWeightOnlyConfig, or exclude it"
        )  # fmt: skip

    def make() -> Tensor:
        return cls.dequantize(parameter).to(parameter.dtype).contiguous()  # type: ignore[attr-defined]

    return Stored(
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


# ---- layers that cannot be dequantised -----------------------------------------------------------

_FOREIGN = {
    "auto_gptq": "GPTQ", "gptqmodel": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "aqlm": "AQLM",
    "eetq": "EETQ", "vptq": "VPTQ", "spqr_quant": "SpQR", "fbgemm_gpu": "FBGEMM",
    "compressed_tensors": "compressed-tensors",
}  # fmt: skip


def foreign(net: nn.Module) -> dict[str, str]:
    """Layers whose quantised weights nothing here can read: what each is, by its weight's name."""
    found = {}
    for path, module in net.named_modules():
        what = _foreign(module)
        if what:
            name = f"{path}.weight" if path else "weight"
            found[name] = f"{path or 'the network'} is a {type(module).__name__}{what}"
    return found


def _foreign(module: nn.Module) -> str:
    """What a layer is, in words that follow its class; "" for one that is as any other."""
    library = type(module).__module__
    packed = any(
        name in place for place in (module._buffers, module._parameters)
        for name in ("qweight", "W_q")
    )  # fmt: skip
    for start, name in _FOREIGN.items():
        if library.partition(".")[0] == start and (packed or not module._parameters):
            return "" if list(module.children()) else f" of {name}"
    if packed:
        return " with packed weights (GPTQ, AWQ or the like)"
    if library.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return " of PyTorch's own quantisation" if hasattr(module, "_packed_params") else ""
    if library.partition(".")[0] == "bitsandbytes" and type(module).__name__.startswith(
        ("Embedding4", "Embedding8", "EmbeddingFP", "EmbeddingNF")
    ):
        return " of bitsandbytes"
    return ""


def refuse_foreign(what: str) -> SubspanError:
    """The refusal of such a layer."""
    return SubspanError(
        f"{what}, whose weights subspan cannot dequantise: leave it out (targets= or exclude=), or "
        "load the network unquantised, or quantised by bitsandbytes or by torchao's weight-only "
        "configurations"
    )


# ---- modules with a product of their own ---------------------------------------------------------


def own_product(cls: type) -> bool:
    """Whether modules of a class multiply by quantised weights themselves."""
    return _is(cls, "bitsandbytes", "Linear4bit") or _is(cls, "bitsandbytes", "Linear8bitLt")


class Multiplied:
    """The behaviour of such a module while its weight is computed: that of an ordinary layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by θ, which is formed in the precision that the layer computes in."""
        link, dtype = vars(self)["_subspan"], _precision(self, x)
        weight = link.weights.read(link.tensors["weight"], dtype)
        bias: Tensor | None = self.bias  # type: ignore[attr-defined]
        bias = bias if bias is None else bias.to(dtype)
        return functional.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)

    def _save_to_state_dict(self, *args: Any) -> None:
        nn.Module._save_to_state_dict(self, *args)  # type: ignore[arg-type]

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # type: ignore[arg-type]


def _precision(module: Any, x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes: autocast's, its own, or that of its input."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return getattr(module, "compute_dtype", None) or x.dtype


_REPACKS = "support_avx512bf16_for_cpu"  # a flag of Linear4bit


def keep_packing(net: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from packing weights anew, and rounding them, in evaluation mode.

    Returns:
        The modules that would have done so, for :func:`let_pack`.
    """
    found = [module for module in net.modules() if vars(module).get(_REPACKS)]
    for module in found:
        setattr(module, _REPACKS, False)
    return found


def let_pack(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`keep_packing`."""
    for module in modules:
        if _REPACKS in vars(module):  # it is no ordinary layer by now
            setattr(module, _REPACKS, True)


# ---- dense again ---------------------------------------------------------------------------------


def resting_dtype(module: nn.Module, found: Stored, net: nn.Module) -> torch.dtype:
    """The dtype of a weight that is to be dense for good: what the layer's neighbours have.

    Of 4 bits and of torchao's it is known; one of 8 bits goes by its bias, or by the network.
    """
    if found.kind != "bitsandbytes-int8":
        return found.dtype
    others = [module._parameters.get("bias"), *net.parameters()]
    for p in others:
        if p is not None and p.is_floating_point() and not is_traceable_wrapper_subclass(p):
            return p.dtype
    return found.dtype


def plain(module: Any) -> None:
    """Make a module of bitsandbytes an ordinary ``nn.Linear``; its weight is dense already.

    Of one that torchao has quantised only its description is another.
    """
    described = getattr(vars(module).get("extra_repr"), "__func__", None)
    if isinstance(described, functools.partial) and described.func.__module__.startswith("torchao"):
        del module.extra_repr
    if not own_product(type(module)):
        return
    module.__class__ = nn.Linear
    for name in ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "state",
                 "index", _REPACKS):  # fmt: skip
        vars(module).pop(name, None)
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "hook", hook).__module__.partition(".")[0] == "bitsandbytes":
            del hooks[key]


def unmark(net: nn.Module) -> None:
    """Take transformers' marks of a quantised network away, if none of its weights is any more."""
    for module in net.modules():
        quantiser: Any = getattr(module, "hf_quantizer", None)
        if quantiser is None or any(
            stored(part, name) is not None for part in module.modules() for name in part._parameters
        ):
            continue
        quantiser.remove_quantization_config(module)
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_4bit_serializable",
                     "is_8bit_serializable", "hf_quantizer", "is_quantized"):  # fmt: skip
            vars(module).pop(name, None)
