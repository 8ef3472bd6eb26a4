"""Layers of quantised weights: what they do while θ is computed, and how they become dense ones."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from subspan.errors import SubspanError
from subspan.precision import autocast_dtype
from subspan.subspace.links import Behaviour, link_of
from subspan.subspace.quantised import QuantisedTensor, is_class, read_quantised
from subspan.subspace.structure import lies_in

# ---- layers that cannot be dequantised -----------------------------------------------------------

_FOREIGN = {  # what packages call their formats
    "aqlm": "AQLM",
    "auto_gptq": "GPTQ",
    "awq": "AWQ",
    "compressed_tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_gpu": "FBGEMM",
    "gptqmodel": "GPTQ",
    "hqq": "HQQ",
    "spqr_quant": "SpQR",
    "vptq": "VPTQ",
}


def find_foreign(net: nn.Module) -> dict[str, str]:
    """Find layers whose quantised weights cannot be read here: a description by weight's name."""
    layers = {}
    for path, module in net.named_modules():
        what = _foreign(module)
        if what:
            name = f"{path}.weight" if path else "weight"
            layers[name] = f"{path or 'the network'} is a {type(module).__name__}{what}"
    return layers


def _foreign(module: nn.Module) -> str:
    """Say what a layer is, in words that follow its class; "" for one that is as any other."""
    library, name = type(module).__module__, type(module).__name__
    package = library.partition(".")[0]
    places = (module._buffers, module._parameters)  # of TorchScript's, no dictionaries
    packed = any(key in place for place in places for key in ("qweight", "W_q"))
    if package in _FOREIGN and (packed or not module._parameters):
        return "" if list(module.children()) else f" of {_FOREIGN[package]}"
    if packed:
        return " with packed weights (GPTQ, AWQ or the like)"
    if library.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return " of PyTorch's own quantisation" if hasattr(module, "_packed_params") else ""
    kinds = ("Embedding4", "Embedding8", "EmbeddingFP", "EmbeddingNF")
    return " of bitsandbytes" if package == "bitsandbytes" and name.startswith(kinds) else ""


def refuse_foreign(what: str) -> SubspanError:
    """Make the refusal of such a layer."""
    return SubspanError(
        f"{what}, whose weights subspan cannot dequantise: leave it out (targets= or exclude=), or "
        "load the network unquantised, or quantised by bitsandbytes or by torchao's weight-only "
        "configurations"
    )


def refuse_converted(net: nn.Module, path: str, weight: QuantisedTensor) -> None:
    """Refuse a weight of torchao in a layer that was converted: the weight has stayed as it was."""
    bias = net.get_submodule(path.rpartition(".")[0])._parameters.get("bias")
    others = {
        p.dtype
        for p in (net.parameters() if bias is None else [bias])
        if p.is_floating_point() and not is_traceable_wrapper_subclass(p)
    }
    if weight.kind.startswith("torchao") and others and weight.dtype not in others:
        own, theirs = (
            str(dtype).removeprefix("torch.") for dtype in (weight.dtype, min(others, key=str))
        )
        raise SubspanError(
            f"{path} was quantised by torchao as {own} and its layer is {theirs} by now, which "
            f"cannot be multiplied: convert the network to {theirs} before it is quantised, back "
            f"to {own}, or exclude it"
        )


# ---- modules with a product of their own ---------------------------------------------------------


def multiplies_itself(cls: type) -> bool:
    """Return whether modules of a class multiply by quantised weights themselves."""
    return is_class(cls, "bitsandbytes", "Linear4bit") or is_class(
        cls, "bitsandbytes", "Linear8bitLt"
    )


class Multiplied(Behaviour):
    """The behaviour of such a module while its weight is computed: that of an ordinary layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by θ, which is formed in the precision that the layer computes in."""
        link, dtype = link_of(self), _precision(self, x)
        weight = link.weights.read(link.tensors["weight"], dtype)
        bias: Any = self.bias
        bias = bias if bias is None else bias.to(dtype)
        return functional.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)

    def _save_to_state_dict(self, *args: Any) -> None:
        nn.Module._save_to_state_dict(self, *args)

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)


def _precision(module: Any, x: Tensor) -> torch.dtype:
    """Find the dtype in which a layer computes: autocast's, its own, or that of its input."""
    return autocast_dtype(x.device) or getattr(module, "compute_dtype", None) or x.dtype


def belongs_to(key: str, parameters: Collection[str]) -> bool:
    """Return whether a key of a state is of one of these, or of what bitsandbytes has beside it."""
    for scales in ("SCB", "weight_format"):
        if key.endswith(scales):
            key = key.removesuffix(scales) + "weight"
    return lies_in(key, parameters)


_REPACKS = "support_avx512bf16_for_cpu"  # a flag of Linear4bit


def keep_packing(net: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from packing weights anew, and rounding them, in evaluation mode.

    Returns the modules that would have done so, for :func:`let_pack`.
    """
    packing = [module for module in net.modules() if vars(module).get(_REPACKS)]
    for module in packing:
        setattr(module, _REPACKS, False)
    return packing


def let_pack(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`keep_packing`."""
    for module in modules:
        if _REPACKS in vars(module):  # it is no ordinary layer by now
            setattr(module, _REPACKS, True)


# ---- dense again ---------------------------------------------------------------------------------

# Attributes of bitsandbytes' layers, and of transformers' models.
_OF_QUANTISED_LINEAR = "compute_dtype compute_type_is_set index quant_state quant_storage state"
_OF_QUANTISED_MODEL = (
    "hf_quantizer is_4bit_serializable is_8bit_serializable is_loaded_in_4bit is_loaded_in_8bit "
    "is_quantized"
)


def resting_dtype(module: nn.Module, weight: QuantisedTensor, net: nn.Module) -> torch.dtype:
    """Find the dtype of a weight that is to be dense for good: what the layer's neighbours have.

    Of 4 bits and of torchao's it is known; one of 8 bits goes by its bias, or by the network.
    """
    if weight.kind != "bitsandbytes-int8":
        return weight.dtype
    others = [module._parameters.get("bias"), *net.parameters()]
    for p in others:
        if p is not None and p.is_floating_point() and not is_traceable_wrapper_subclass(p):
            return p.dtype
    return weight.dtype


def make_plain(module: Any) -> None:
    """Make a module of bitsandbytes an ordinary ``nn.Linear``; its weight is dense already.

    Of one that torchao has quantised only its description is another.
    """
    described = getattr(vars(module).get("extra_repr"), "__func__", None)
    if isinstance(described, functools.partial) and described.func.__module__.startswith("torchao"):
        del module.extra_repr
    if not multiplies_itself(type(module)):
        return
    module.__class__ = nn.Linear
    for name in (*_OF_QUANTISED_LINEAR.split(), _REPACKS):
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
            read_quantised(part, name) is not None
            for part in module.modules()
            for name in part._parameters
        ):
            continue
        quantiser.remove_quantization_config(module)
        for name in _OF_QUANTISED_MODEL.split():
            vars(module).pop(name, None)
