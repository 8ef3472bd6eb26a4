"""Callers: the right answer may depend on the code that asks for a network's parameters.

A network in a subspace gives θ to its own code, and frozen θ₀ to whoever asks it as a whole;
PyTorch and trainers call the same methods for both. Where no argument and no hook tells them apart,
the caller's frame does. All of that is in this file, so that a new version of PyTorch is checked in
one place. Each function takes the frame of the code that asks. A training step of an ordinary
network comes to none of them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator
from itertools import takewhile
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

_CAST = {  # forwards that use their weight in autocast's precision only
    kind.forward.__code__ for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}

_LISTING = ("named_modules", "_named_members", "named_parameters")


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame, and those that it was called from."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _beyond(start: FrameType, *functions: str) -> FrameType | None:
    """Return the first frame of another function than these."""
    return next((f for f in _callers(start) if f.f_code.co_name not in functions), None)


def _module(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _runs(frame: FrameType | None, package: str, function: str) -> bool:
    """Return whether a frame is of a package's function, and not of a person's by the same name."""
    named = frame is not None and frame.f_code.co_name == function
    return named and _module(frame).partition(".")[0] == package


# ---- by the module of the code -------------------------------------------------------------------


def asked_by_fsdp(frame: FrameType) -> bool:
    """Return whether code of ``fully_shard`` asks."""
    return "._fully_shard" in _module(frame)


def find_left_by_fsdp1(start: FrameType) -> set[nn.Parameter] | None:
    """Find what FSDP1 leaves alone, if it lists what it is to make one parameter of."""
    frame = _beyond(start, *_LISTING, "parameters")
    asked = frame is not None and _runs(frame, "torch", "_get_orig_params")
    return frame.f_locals["ignored_params"] if asked else None  # type: ignore[union-attr]


def resolves_super(frame: FrameType) -> bool:
    """Return whether a compiler looks for a class among the bases of another, for ``super()``."""
    return _module(frame) == "torch._dynamo.variables.misc"


def asked_by_ddp(frame: FrameType) -> bool:
    """Return whether DistributedDataParallel asks."""
    return _module(frame) == "torch.nn.parallel.distributed"


def given_to_ddp(start: FrameType) -> list[Tensor]:
    """Return all parameters of the module that DistributedDataParallel is being made around."""
    for frame in _callers(start):
        held = getattr(frame.f_locals.get("self"), "__dict__", {})
        if "_module_parameters" in held:
            return list(held["_module_parameters"])
    return []


def asked_by_tensor_parallel(frame: FrameType) -> bool:
    """Return whether ``parallelize_module`` asks, to spread a layer over processes."""
    return _module(frame).startswith("torch.distributed.tensor.")


def runs_in_pipeline(start: FrameType) -> bool:
    """Return whether a stage of ``torch.distributed.pipelining`` runs."""
    stage = "torch.distributed.pipelining.stage"
    return stage in sys.modules and any(_module(frame) == stage for frame in _callers(start))


def asked_by_export(frame: FrameType) -> bool:
    """Return whether ``torch.export`` asks."""
    return _module(frame).startswith(("torch.export", "torch._export"))


def asked_by_checkpoint(frame: FrameType) -> bool:
    """Return whether parameters are listed for ``torch.distributed.checkpoint``."""
    return _module(frame) == "torch.distributed.checkpoint.state_dict"


def pairs_with_state(start: FrameType) -> bool:
    """Return whether ``torch.distributed.checkpoint`` pairs parameters with the keys of a state."""
    return any(
        frame.f_code.co_name in ("_get_model_state_dict", "_load_model_state_dict")
        for frame in takewhile(asked_by_checkpoint, _callers(start))
    )


def averages_models(start: FrameType) -> bool:
    """Return whether PyTorch's AveragedModel pairs the parameters of a model and of its copy."""
    frame = _beyond(start, *_LISTING)
    asked = frame is not None and frame.f_code.co_name == "parameters"
    return asked and _module(frame.f_back) == "torch.optim.swa_utils"  # type: ignore[union-attr]


def asked_by_another_package(frame: FrameType, net: nn.Module) -> bool:
    """Return whether an installed program, other than the network's, asks."""
    installed = "site-packages" in frame.f_code.co_filename
    return installed and _module(frame).partition(".")[0] != type(net).__module__.partition(".")[0]


def asked_by_a_graph(start: FrameType) -> bool:
    """Return whether a compiled or exported graph asks, which has θ₀ + P w from others."""
    for frame in _callers(start):
        if (file := frame.f_code.co_filename) != torch._ops.__file__:
            compiled = "eval_with_key" in file or "torchinductor" in file
            return compiled or _module(frame).startswith("torch.")
    return False


# ---- by the name of the function -----------------------------------------------------------------


def asked_by_validation(frame: FrameType) -> bool:
    """Return whether transformers looks for quantised weights that cannot be trained."""
    asking = _beyond(frame, "__getattr__")  # of a handle
    return _runs(asking, "transformers", "validate_quantization_for_training")


def saved_around(start: FrameType) -> bool:
    """Return whether a network writes itself as ``from_pretrained`` will read it.

    PEFT's do not: they write their adapters.
    """
    for frame in _callers(start):
        code = frame.f_code
        if code.co_name == "save_pretrained" and not _module(frame).startswith("peft."):
            first = frame.f_locals[code.co_varnames[0]] if code.co_argcount else None
            return isinstance(first, nn.Module)
    return False


def saved_by_trainer(frame: FrameType) -> bool:
    """Return whether transformers' Trainer saves a network."""
    return _module(frame) == "transformers.trainer" and frame.f_code.co_name == "_save"


def saved_as_adapters(start: FrameType) -> bool:
    """Return whether transformers' Trainer saves a network of PEFT's, which saves its adapters."""
    adapters = False
    for frame in _callers(start.f_back):
        if saved_by_trainer(frame):
            return adapters
        adapters |= frame.f_code.co_name == "get_peft_model_state_dict"
    return False


def find_checkpoint(start: FrameType) -> str | None:
    """Find the folder of the checkpoint that transformers' Trainer loads, if it does."""
    for frame in _callers(start):
        if _module(frame) == "transformers.trainer":
            if frame.f_code.co_name == "_load_from_checkpoint":
                return frame.f_locals["resume_from_checkpoint"]
            if frame.f_code.co_name == "_load_best_model":
                return frame.f_locals["self"].state.best_model_checkpoint
            break
    return None


def empties_for_fsdp(start: FrameType) -> bool:
    """Return whether accelerate moves a network to the meta device, to fill its shards anew."""
    return _runs(_beyond(start, "_apply", "to"), "accelerate", "fsdp2_prepare_model")


def goes_by_tensor(start: FrameType) -> str:
    """Return the function of accelerate that offloads or loads tensor by tensor, or ""."""
    frame = _beyond(start, "state_dict")
    for name in ("cpu_offload", "disk_offload", "dispatch_model", "load_checkpoint_in_model"):
        if frame is not None and _runs(frame, "accelerate", name):
            whole = name.startswith("load") and frame.f_locals["device_map"] is None
            return "" if whole else name
    return ""


def sorts_by_decay(frame: FrameType) -> bool:
    """Return whether transformers goes from module to module to find what weight decay is for."""
    return frame.f_code.co_name == "get_parameter_names"


def copies_weights(start: FrameType) -> bool:
    """Return whether TRL copies weights to a reference model or to vLLM."""
    frame = _beyond(start, "parameters")
    return _runs(frame, "trl", "_sync_target_model") or _module(frame).startswith("trl.generation.")


def converts_batchnorm(frame: FrameType) -> bool:
    """Return whether SyncBatchNorm looks for layers to convert."""
    return frame.f_code.co_name == "convert_sync_batchnorm"


def adds_to_optimizer(frame: FrameType) -> bool:
    """Return whether an optimizer takes a parameter."""
    return frame.f_code.co_name == "add_param_group"


def switches_adapters(frame: FrameType) -> bool:
    """Return whether PEFT enables or disables an adapter, whose flags follow."""
    return _runs(frame, "peft", "_set_layer_requires_grad")


def freezes_all(frame: FrameType) -> bool:
    """Return whether PEFT freezes all parameters, to prepare a quantised network for adapters."""
    return _runs(frame, "peft", "prepare_model_for_kbit_training")


def quantises(frame: FrameType, kinds: Collection[type]) -> bool:
    """Return whether ``torch.ao`` looks for layers of some of these classes, to quantise them."""
    asked = _runs(frame, "torch", "_propagate_qconfig_helper")
    wanted = frame.f_locals["qconfig_dict"] if asked else {}
    return any(wanted.get(kind) is not None for kind in kinds)


def registers_parameter(frame: FrameType) -> bool:
    """Return whether a module looks at the type of what it is given for a parameter."""
    before = frame.f_back
    sets = before is not None and before.f_code.co_name in ("__setattr__", "register_parameter")
    return sets and frame.f_code.co_name == "typename"


def find_traced(start: FrameType) -> nn.Module | None:
    """Find the module that ``torch.jit.trace`` runs."""
    tracing = (f.f_locals["mod"] for f in _callers(start) if _runs(f, "torch", "trace_module"))
    return next(tracing, None)


def asked_by_trace(start: FrameType) -> bool:
    """Return whether TorchScript prepares a module to trace it, and not to script it."""
    names = (frame.f_code.co_name for frame in _callers(start))
    return next((n for n in names if n.startswith(("trace", "script"))), "").startswith("trace")


def runs_twice(start: FrameType) -> bool:
    """Return whether a function of autograd runs a part once more in the backward pass.

    So do reentrant checkpoints: first without a graph, then with one.
    """
    for frame in _callers(start):
        code = frame.f_code
        if code.co_name in ("forward", "backward") and code.co_argcount:
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx) and (
                code.co_name == "backward" or context.next_functions  # type: ignore[attr-defined]
            ):  # which are there if a backward pass is to come
                return True
    return False


# ---- by the code itself --------------------------------------------------------------------------


def asked_by_own_forward(frame: FrameType, cls: type) -> bool:
    """Return whether a layer's own forward asks, which casts its weight under autocast."""
    return frame.f_code in _CAST and cls.forward.__code__ is frame.f_code  # type: ignore[attr-defined]


def asked_by_own_method(start: FrameType, net: Any) -> bool:
    """Return whether a method of the network, ``save_pretrained`` say, is running."""
    codes = _own_code(net, properties=False)
    return any(_runs_on(frame, net, codes) for frame in _callers(start))


def asked_by_own_property(start: FrameType, net: Any) -> bool:
    """Return whether a property of the network asks for its parameters."""
    frame = _beyond(start, "parameters", "<genexpr>", "<listcomp>")
    return frame is not None and _runs_on(frame, net, _own_code(net, properties=True))


def _own_code(net: Any, properties: bool) -> set[CodeType]:
    """Collect the code of the methods, or of the properties, of a network's own classes."""
    codes = set()
    for cls in type(net).__mro__:
        if cls is nn.Module or cls.__module__.startswith("subspan.subspace."):
            continue
        for value in vars(cls).values():
            if isinstance(value, property) is not properties:
                continue
            function = (
                value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            )
            if callable(function):
                codes.add(getattr(inspect.unwrap(function), "__code__", None))
    return codes - {None}  # type: ignore[return-value]


def _runs_on(frame: FrameType, net: Any, codes: set[CodeType]) -> bool:
    """Return whether a frame runs one of these functions with the network as its first argument."""
    code = frame.f_code
    return code in codes and code.co_argcount > 0 and frame.f_locals[code.co_varnames[0]] is net
