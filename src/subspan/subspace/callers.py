"""Callers: the right answer may depend on the code that asks for a network's parameters.

A network in a subspace gives θ to its own code, and frozen θ₀ to whoever asks it as a whole;
PyTorch and trainers call the same methods for both. Where no argument and no hook tells them apart,
the caller's frame does. All of that is in this file, so that a new version of PyTorch is checked in
one place. Each function takes the frame of the code that asks. A training step of an ordinary
network comes to none of them.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator
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
    while frame is not None:
        yield frame
        frame = frame.f_back


def _beyond(start: FrameType, *functions: str) -> FrameType | None:
    """Return the first frame of another function than these."""
    return next((f for f in _callers(start) if f.f_code.co_name not in functions), None)


def _module(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _code(pattern: str, beyond: str = "") -> Callable[[FrameType], bool]:
    """Make a function that returns whether code asks whose "module:function" a pattern matches.

    ``beyond`` names functions in between, which may have passed the question on.
    """
    match, between = re.compile(pattern).match, beyond.split()

    def asks(frame: FrameType) -> bool:
        found = _beyond(frame, *between) if between else frame
        return found is not None and bool(match(f"{_module(found)}:{found.f_code.co_name}"))

    return asks


# ---- which code it is ----------------------------------------------------------------------------

asked_by_fsdp = _code(r".*\._fully_shard")  # fully_shard's
asked_by_ddp = _code(r"torch\.nn\.parallel\.distributed:")
asked_by_tensor_parallel = _code(r"torch\.distributed\.tensor\.")  # which spreads a layer
asked_by_export = _code(r"torch\._?export")
asked_by_checkpoint = _code(r"torch\.distributed\.checkpoint\.state_dict:")
# It pairs the parameters that a module has, and a handle in it, with keys of a state.
lists_for_checkpoint = _code(
    r"torch\.distributed\.checkpoint\.state_dict:\w+_state_dict$", beyond=" ".join(_LISTING)
)
resolves_super = _code(r"torch\._dynamo\.variables\.misc:")  # a compiler, for ``super()``
adds_to_optimizer = _code(r".*:add_param_group$")
converts_batchnorm = _code(r".*:convert_sync_batchnorm$")  # looks for layers to convert
may_set_class = _code(r"torch\.distributed\.|subspan\.")  # FSDP's, and ours for variants
parametrizes = _code(r"torch\.nn\.utils\.parametrize:register_parametrization$")
sorts_by_decay = _code(r".*:get_parameter_names$")  # transformers, by modules
saved_by_trainer = _code(r"transformers\.trainer:_save$")
# Transformers looks for quantised weights that it would not train, perhaps on a handle.
asked_by_validation = _code(
    r"transformers\b.*:validate_quantization_for_training$", beyond="__getattr__"
)
# Accelerate empties a network, to fill its shards anew.
empties_for_fsdp = _code(r"accelerate\b.*:fsdp2_prepare_model$", beyond="_apply to")
# PEFT enables or disables an adapter, whose flags follow.
switches_adapters = _code(r"peft\b.*:_set_layer_requires_grad$")
# PEFT freezes all parameters, to prepare a quantised network for adapters.
freezes_all = _code(r"peft\b.*:prepare_model_for_kbit_training$")
# TRL copies weights to a reference model or to vLLM.
copies_weights = _code(r"trl\b.*:_sync_target_model$|trl\.generation\.", beyond="parameters")

_flattens = _code(r"torch\b.*:_get_orig_params$")
_propagates = _code(r"torch\b.*:_propagate_qconfig_helper$")
_traces = _code(r"torch\b.*:trace_module$")
_goes_by_tensor = _code(
    r"accelerate\b.*:(cpu_offload|disk_offload|dispatch_model|load_checkpoint_in_model)$"
)


def find_left_by_fsdp1(start: FrameType) -> set[nn.Parameter] | None:
    """Find what FSDP1 leaves alone, if it lists what it is to make one parameter of."""
    frame = _beyond(start, *_LISTING, "listed", "parameters")  # the second is a handle's
    return frame.f_locals["ignored_params"] if frame is not None and _flattens(frame) else None


def given_to_ddp(start: FrameType) -> list[Tensor]:
    """Return all parameters of the module that DistributedDataParallel is being made around."""
    for frame in _callers(start):
        held = getattr(frame.f_locals.get("self"), "__dict__", {})
        if "_module_parameters" in held:
            return list(held["_module_parameters"])
    return []


def group_of_new_ddp(start: FrameType) -> Any:
    """Return the processes of a DistributedDataParallel that is made and lists a layer, or None."""
    frame = _beyond(start, "<listcomp>")
    if frame is None or frame.f_code.co_name != "_build_params_for_reducer":
        return None
    made = asked_by_ddp(frame) and frame.f_back.f_code.co_name == "__init__"  # type: ignore[union-attr]
    return frame.f_locals["self"].process_group if made else None  # a copy is made by one process


def runs_in_pipeline(start: FrameType) -> bool:
    """Return whether a stage of ``torch.distributed.pipelining`` runs."""
    stage = "torch.distributed.pipelining.stage"
    return stage in sys.modules and any(_module(frame) == stage for frame in _callers(start))


def pairs_with_state(start: FrameType) -> bool:
    """Return whether ``torch.distributed.checkpoint`` pairs parameters with the keys of a state."""
    return any(
        frame.f_code.co_name in ("_get_model_state_dict", "_load_model_state_dict")
        for frame in takewhile(asked_by_checkpoint, _callers(_beyond(start, *_LISTING)))
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


def saved_as_adapters(start: FrameType) -> bool:
    """Return whether transformers' Trainer saves a network of PEFT's, which saves its adapters."""
    adapters = False
    for frame in _callers(start.f_back):
        if saved_by_trainer(frame):
            return adapters
        adapters |= frame.f_code.co_name == "get_peft_model_state_dict"
    return False


def find_copied(frame: FrameType, asked: nn.Module) -> Any:
    """Return what ``copy.deepcopy`` copies; if something else asks, the module that it asked."""
    return frame.f_locals["x"] if frame.f_code is copy.deepcopy.__code__ else asked


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


def goes_by_tensor(start: FrameType) -> str:
    """Return the function of accelerate that offloads or loads tensor by tensor, or ""."""
    frame = _beyond(start, "state_dict")
    if frame is None or not _goes_by_tensor(frame):
        return ""
    name = frame.f_code.co_name
    whole = name.startswith("load") and frame.f_locals["device_map"] is None
    return "" if whole else name


def quantises(frame: FrameType, kinds: Collection[type]) -> bool:
    """Return whether ``torch.ao`` looks for layers of some of these classes, to quantise them."""
    wanted = frame.f_locals["qconfig_dict"] if _propagates(frame) else {}
    return any(wanted.get(kind) is not None for kind in kinds)


def registers_parameter(frame: FrameType) -> bool:
    """Return whether a module looks at the type of what it is given for a parameter."""
    before = frame.f_back
    sets = before is not None and before.f_code.co_name in ("__setattr__", "register_parameter")
    return sets and frame.f_code.co_name == "typename"


def find_traced(start: FrameType) -> nn.Module | None:
    """Find the module that ``torch.jit.trace`` runs."""
    return next((f.f_locals["mod"] for f in _callers(start) if _traces(f)), None)


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
