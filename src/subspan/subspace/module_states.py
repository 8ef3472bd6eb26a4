"""State dicts of the modules of a wrapped network: coordinates of the whole, θ of a part."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from subspan.errors import SubspanError
from subspan.subspace import callers
from subspan.subspace.computed import guard_theta
from subspan.subspace.dtensors import is_shard
from subspan.subspace.links import FINGERPRINT, Behaviour, link_of, trained_keys
from subspan.subspace.parameters import saved_buffers
from subspan.subspace.quantised_layers import belongs_to
from subspan.subspace.sharded import refuse_whole
from subspan.subspace.states import before_loading
from subspan.subspace.variant import refuse_in_use

_saving = threading.local()  # .thetas of the state_dict that is being made; None of coordinates


@contextmanager
def keeping_coordinates() -> Iterator[None]:
    """Have complete states of networks keep the coordinates, too, beside all weights."""
    _saving.coordinates = True
    try:
        yield
    finally:
        del _saving.coordinates


class ModuleStates(Behaviour):
    """The states of a module that has a trained parameter, or a part with one."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return θ to a part and to the network's own methods; else the coordinates.

        A network around this one that writes itself gets both: people load θ, and trainers go on
        from the coordinates.
        """
        if hasattr(_saving, "thetas"):  # a module around this one is being saved
            return super().state_dict(*args, **kwargs)
        weights = link_of(self).weights
        refuse_in_use(weights, "saved")
        if function := callers.goes_by_tensor(sys._getframe(1)):
            raise SubspanError(
                f"{function} of accelerate would take weights tensor by tensor, and those of a "
                "network in a subspace are computed from θ₀ and coordinates, which belong "
                "together: do this before the network is wrapped, or leave out offloading and "
                "device_map="
            )
        others = weights.root is self and not callers.asked_by_own_method(sys._getframe(1), self)
        around = others and callers.saved_around(sys._getframe(1))
        whole = others and not around
        if others:
            weights.changes.check_base()
            trained = any(w.requires_grad for w in weights.coordinates().values())
            if trained and callers.saved_as_adapters(sys._getframe(1)):
                raise SubspanError(
                    "Trainer would save PEFT's adapters without the coordinates that are trained "
                    "beside them: put adapters into the network before it is wrapped, with "
                    'train_fully=".*lora_.*", and give Trainer the SubspaceModel'
                )
        if weights.root is self and not whole:
            refuse_whole(weights, "saved with all its weights")
        if around and weights.packed:
            raise SubspanError(
                "save_pretrained of a network around this one would write its weights dense, and "
                "not quantised: put the merge() of the SubspaceModel in its place before"
            )
        _saving.thetas = None if whole else {}
        try:
            with keeping_coordinates() if around else nullcontext():
                state = super().state_dict(*args, **kwargs)
        finally:
            del _saving.thetas
        if whole:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            rest = {prefix + path for path, _ in weights.at_rest()}
            kept = {prefix + name for name in saved_buffers(weights.root)}
            for key in [key for key in state if key not in kept and belongs_to(key, rest)]:
                del state[key]
        return state

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        link = link_of(self)
        thetas = _saving.thetas
        for attribute, tensor in link.tensors.items():
            if thetas is None or tensor in link.weights.hidden:
                destination.pop(prefix + attribute, None)
            elif prefix + attribute in destination:
                if tensor not in thetas:
                    theta = link.weights.form(tensor)
                    theta = theta if is_shard(theta) else guard_theta(theta, tensor)
                    thetas[tensor] = theta if keep_vars else theta.detach()
                destination[prefix + attribute] = thetas[tensor]
        if thetas is not None and link.weights.root is self and not hasattr(_saving, "coordinates"):
            for name in (*link.weights.coordinate_names, FINGERPRINT):
                destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        link = link_of(self)
        if link.weights.root is self:
            assign = local_metadata.get("assign_to_params_buffers", False)
            before_loading(link.weights, state_dict, prefix, assign)
        for tensor, key, _ in trained_keys(self, prefix):
            if key in state_dict:  # of a part below, too: nothing is loaded yet
                raise SubspanError(
                    f"{tensor} is computed from coordinates, and a part alone cannot be loaded: "
                    "load a state of the whole network, or load before the network is wrapped"
                )
        before = set(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        computed = {prefix + attribute for attribute in link.tensors}
        missing_keys[:] = [key for key in missing_keys if key in before or key not in computed]
