"""A layer that takes another one's place: when it may, and what it takes over.

People put more on a layer than its weights: hooks, attributes, ``requires_grad``. Whatever means
the same on the new layer goes there; anything else is refused by name, before the network is
changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import TypeGuard

import torch
from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.subspace.held import held_by
from subspan.subspace.links import check_network
from subspan.subspace.memory import Place, find_overlaps

# Registries that mean the same on any module with the same inputs and outputs.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
# The others are written for the names and shapes of the tensors that go.
STATE_HOOKS = {
    "_state_dict_pre_hooks": "state_dict pre-hook",
    "_state_dict_hooks": "state_dict hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict post-hook",
}


# ---- whether it may ------------------------------------------------------------------------------


def obstacle(
    layer: nn.Module,
    parameters: Collection[str],
    buffers: Collection[str] = (),
    modules: Collection[str] = (),
    kinds: Collection[type[Tensor]] = (),
) -> str | None:
    """Say why no other layer can compute what this one does, from its parameters; or None.

    Given are all names that its class registers, also for a parameter that is None, and the
    ``kinds`` of its parameters besides ``nn.Parameter``.
    """
    for name in parameters:
        tensor = layer._parameters.get(name)
        if tensor is None:
            if getattr(layer, name, None) is not None:
                return f"something else computes its {name} (a normalisation, a mask, a subspace)"
            continue
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            return f"its {name} has no values yet: run a batch, or load them, first"
        if type(tensor) not in (nn.Parameter, *kinds) or tensor.layout != torch.strided:
            return f"its {name} is no ordinary tensor but {type(tensor).__name__}, {tensor.layout}"
        if not tensor.is_floating_point():
            return f"its {name} is {tensor.dtype}, and factors are real"
    registered = {*parameters, *buffers, *modules}
    for name in (*layer._parameters, *layer._buffers, *layer._modules):
        if name not in registered:
            return f"it holds {name!r}, which layers of its class do not have"
    for name, value in vars(layer).items():
        if callable(getattr(type(layer), name, None)):
            return f"its method {name!r} was replaced"
        if name == "_compiled_call_impl" and value is not None:
            return "it was compiled: compile the network afterwards"
    return None


def used_elsewhere(net: nn.Module) -> dict[int, str]:
    """Find the modules that cannot be exchanged alone, by ``id``, each with the reason.

    Something else in the network shares memory with one of their parameters, or holds the module
    itself outside ``_modules``: an attribute, a bound method, a function, a hook.
    """
    check_network(net)
    reasons: dict[int, str] = {}
    places: list[Place] = []
    for module in net.modules():
        beside = [*module._buffers.values()]
        for value in held_by(module):
            if isinstance(value, nn.Module):
                reasons[id(value)] = f"an attribute or a hook of a {type(module).__name__} holds it"
            else:
                beside.append(value)
        if type(module).__name__ == "OptimizedModule":  # holds the call of the module inside
            reasons[id(module._modules["_orig_mod"])] = "it was compiled: compile the network after"
        own = module._parameters.items()
        places += [Place.of(name, p, id(module)) for name, p in own if _has_values(p)]
        places += [Place.of("", tensor) for tensor in beside if _has_values(tensor)]
    for place in itertools.chain.from_iterable(find_overlaps(places)):
        reasons.setdefault(place.owner, f"something else shares its {place.name}")
    return reasons


def _has_values(tensor: Tensor | None) -> TypeGuard[Tensor]:
    if tensor is None or nn.parameter.is_lazy(tensor):
        return False
    return not tensor.is_meta and tensor.numel() > 0


def refuse_hooks(name: str, layer: nn.Module, *, called: bool = True) -> None:
    """Refuse hooks that would mean something else on a layer in the place of this one.

    Any hook would if the network has not ``called`` this layer, as it will call the new one.
    """
    hooks = [kind for registry, kind in STATE_HOOKS.items() if vars(layer)[registry]]
    if layer._backward_hooks and not layer._is_full_backward_hook:
        hooks.append("backward hook (not a full one)")
    if not called and any(vars(layer)[registry] for registry in HOOKS):
        hooks.append("hook of a layer that is not called")
    for parameter, tensor in layer._parameters.items():
        if tensor is not None and tensor._backward_hooks:
            hooks.append(f"hook on its {parameter}")
        if tensor is not None and tensor._post_accumulate_grad_hooks:
            hooks.append(f"post-accumulate-grad hook on its {parameter}")
    if hooks:
        raise SubspanError(
            f"layer {name!r} has a {hooks[0]}, which another layer in its place could not have: "
            "remove it first, or leave the layer out"
        )


# ---- what it takes over --------------------------------------------------------------------------


def hand_over(
    name: str, old: nn.Module, new: nn.Module, fresh: nn.Module, *, parts: bool = False
) -> nn.Module:
    """Give a new layer the hooks, attributes and flags of the one whose place it will take.

    Hooks are not copied: both layers have the same registries, so that their handles remove them
    from the new one. Whether weights are trained, and their attributes, go to all parameters that
    stand for them, and those of the bias to the bias; not if the new one's ``parts`` have been
    given theirs already. What ``fresh``, any layer of the old one's class, lacks is the user's.

    Raises:
        SubspanError: if the new layer needs the name of a user's attribute.
    """
    for key, value in vars(old).items():
        if key in HOOKS:
            vars(new)[key] = value
        elif not hasattr(fresh, key):
            taken = (vars(new), new._parameters, new._buffers, new._modules)
            if hasattr(type(new), key) or any(key in names for names in taken):
                raise SubspanError(
                    f"layer {name!r} has the attribute {key!r}, a name that {type(new).__name__} "
                    "needs for itself: rename it first, or leave the layer out"
                )
            vars(new)[key] = value
    if not parts:
        for is_bias in (True, False):
            before, after = (
                [p for n, p in layer.named_parameters() if n.endswith("bias") == is_bias]
                for layer in (old, new)
            )
            for p in after if before else ():
                stand_for(p, *before)
        new.train(old.training)
    return new


def stand_for(new: Tensor, *old: Tensor) -> None:
    """Make a parameter trained if one of others is, and give it their attributes."""
    for p in old:
        of_class = {
            name for kind in type(p).__mro__ for name in vars(kind).get("__annotations__", ())
        }
        vars(new).update({name: v for name, v in vars(p).items() if name not in of_class})
    new.requires_grad_(any(p.requires_grad for p in old))
