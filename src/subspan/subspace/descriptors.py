"""Descriptors in the classes of a wrapped network: reading a trained parameter gives θ.

A descriptor on the type goes before ``Module.__getattr__``, so that every read of
``module.weight`` gives θ = θ₀ + P w, whoever reads it and from wherever. (Source of the idea:
``torch.nn.utils.parametrize``, which moves the parameter away for it.)
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.subspace.callers import asked_by_validation, find_traced, runs_in_pipeline
from subspan.subspace.links import Link, link_of


class WeightDescriptor:
    """The descriptor of a trained parameter: reading it gives θ."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        base = module._parameters.get(self.name)
        if base is None or (not torch.compiler.is_compiling() and self.name in module.__dict__):
            return _find_attribute(module, self.name)
        link = link_of(module)
        if not torch.compiler.is_compiling() and torch._C._is_tracing():
            _check_trace(link, sys._getframe(1))
        try:
            return link.weights.read(link.tensors[self.name], own=base)
        except AttributeError as error:  # Python would ask Module.__getattr__, which has θ₀
            raise RuntimeError(f"{link.tensors[self.name]} could not be computed") from error

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__[self.name] = value  # of a module whose parameter has been taken away


def _check_trace(link: Link, frame: FrameType) -> None:
    """Refuse the ONNX exporter that traces, and to trace a part, which has no coordinates."""
    if torch.onnx.is_in_onnx_export():
        raise SubspanError(
            "torch.onnx.export(dynamo=False) knows no operator of a network in a subspace: leave "
            "dynamo=False out, or export the merge() of the SubspaceModel"
        )
    traced = find_traced(frame)
    if traced is not None and link.weights.root not in list(traced.modules()):
        raise refuse_part("traced")


def refuse_part(done: str) -> SubspanError:
    """Make the refusal of what can be done with a whole network only."""
    return SubspanError(
        f"a part of a network in a subspace cannot be {done} alone, since its coordinates are the "
        "network's: give the network, or the part in the merge() of the SubspaceModel"
    )


def refuse_stage(frame: FrameType) -> None:
    """Refuse a part as a stage of a pipeline, whose process has its part of the gradient alone."""
    if runs_in_pipeline(frame):
        raise SubspanError(
            "a part of a network in a subspace cannot be a stage of a pipeline, since coordinates "
            "are the network's and each process would have its own part of their gradient: wrap "
            "the part of each stage by itself, or use DDP or fully_shard around the whole network"
        )


def _find_attribute(module: nn.Module, name: str) -> Any:
    """Find an attribute that was a trained parameter and is something else by now."""
    for entries in (module.__dict__, module._buffers, module._modules, module._parameters):
        if name in entries:
            return entries[name]
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")


class QConfigDescriptor:
    """The attribute that PyTorch's quantisation sets: it would pass modules of our classes by."""

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None or "qconfig" not in module.__dict__:
            raise AttributeError("qconfig")
        return module.__dict__["qconfig"]

    def __set__(self, module: nn.Module, value: Any) -> None:
        raise SubspanError(
            "a network in a subspace cannot be quantised: quantise the merge() of its SubspaceModel"
        )


class QuantisedFlag:
    """The attribute ``is_quantized`` of transformers' networks, which is as it was set.

    Trainer looks at it and refuses to train quantised weights. Here it trains coordinates.
    """

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None or "is_quantized" not in module.__dict__:
            raise AttributeError("is_quantized")
        return module.__dict__["is_quantized"] and not asked_by_validation(sys._getframe(1))

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__["is_quantized"] = value

    def __delete__(self, module: nn.Module) -> None:
        del module.__dict__["is_quantized"]
