"""Loading states into a network in a subspace: its own, or one of all weights as coordinates."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from subspan.errors import SubspanError
from subspan.families import Projection
from subspan.linalg import conjugate_gradients
from subspan.subspace.dtensors import local
from subspan.subspace.functions import ordinary_tensors
from subspan.subspace.links import FINGERPRINT, PREFIX, trained_keys
from subspan.subspace.parameters import saved_buffers
from subspan.subspace.resuming import find_beside
from subspan.subspace.sharded import refuse_whole

if TYPE_CHECKING:
    from subspan.subspace.weights import Weights


def refuse_rounding(
    values: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], where: str
) -> None:
    """Refuse numbers that the dtype of their place would round; places without one are left out.

    Integers of other dtypes are taken as PyTorch takes them: the mean of counters, say.
    """
    for name, value in values.items():
        dtype, numbers = dtypes.get(name, value.dtype), local(value)
        if dtype == value.dtype or not dtype.is_floating_point:
            continue
        if numbers.is_meta or is_traceable_wrapper_subclass(numbers):
            continue
        if not numbers.is_complex():
            rounded = numbers.to(dtype).to(numbers.dtype)
            if ((rounded == numbers) | numbers.isnan()).all():
                continue
        own, here = (str(each).removeprefix("torch.") for each in (value.dtype, dtype))
        raise SubspanError(
            f"{name} is {own} in {where} and {here} in the network, where its numbers would be "
            f"rounded: convert the network to {own} before, or these numbers to {here}"
        )


def _take_off_handle(state: dict[str, Any], prefix: str) -> None:
    """Give the keys of a handle's state, if it is one, the names that a network has for them."""
    names = {"coordinates.": PREFIX, "fingerprint": FINGERPRINT, "body.": ""}
    inside = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    found = {key: start for key in inside for start in names if key.startswith(start)}
    if {"coordinates.", "fingerprint"} <= {*found.values()}:
        for key, start in found.items():
            state[prefix + names[start] + key.removeprefix(start)] = state.pop(prefix + key)


@torch.no_grad()
def before_loading(weights: Weights, state: dict[str, Any], prefix: str, assign: bool) -> None:
    """Check a state that is to be loaded, and turn one of all weights into coordinates, in place.

    Nothing of the network is loaded before. Modules around it to which PyTorch came earlier keep
    what they took when this refuses: nobody asks here before them. With ``assign`` its tensors come
    into the place of the network's, in their own dtypes.

    Raises:
        SubspanError: if it is another model's, its weights lie outside of the subspace, or its
            numbers would be rounded.
    """
    _take_off_handle(state, prefix)
    fingerprint = state.get(prefix + FINGERPRINT)
    if fingerprint is not None and (different := weights.difference(fingerprint)):
        raise SubspanError(
            f"{different} of the model that this state_dict comes from differ from this "
            "model's: build it from the same initial weights and with the same options"
        )
    given = {}
    for tensor, path, link in trained_keys(weights.root):
        if link.weights is not weights or (value := state.get(prefix + path)) is None:
            continue
        if value is weights.find(tensor):  # θ₀ itself, as torch.distributed.checkpoint adds it
            del state[prefix + path]
        else:
            given[path] = tensor
    own: dict[str, Tensor | None] = {**weights.root._parameters, **saved_buffers(weights.root)}
    own |= {name: weights.find(name) for name in weights.fully}
    dtypes = {} if assign else {prefix + n: t.dtype for n, t in own.items() if t is not None}
    dtypes |= {prefix + path: weights.resting(tensor).dtype for path, tensor in given.items()}
    found = {key: value for key, value in state.items() if key in dtypes}
    refuse_rounding(found, dtypes, "this state_dict")
    names = [name for name in weights.coordinate_names if prefix + name in state]
    if not given:
        if len(names) == len(weights.coordinate_names):  # parameters that nobody trains stay
            state |= {prefix + n: p for n, p in weights.at_rest() if prefix + n not in state}
        return
    names = [n for n in names if state[prefix + n] is not weights.root._parameters[n]]
    if weights.adapters or len(names) == len(weights.coordinate_names):
        _check_products(weights, state, prefix, given)
        return
    if names or set(given.values()) != set(weights.homes):
        raise SubspanError(
            "this state_dict has weights beside coordinates, or some of the weights only: load "
            "that of a model in the same subspace, or a complete one of its network"
        )
    refuse_whole(weights, "given a state of all weights", "load it before fully_shard")
    values = {t: state.pop(prefix + path) for path, t in given.items()}
    coordinates = _coordinates_of(weights, values, find_beside(sys._getframe(1)))
    state |= {prefix + name: w for name, w in coordinates.items()}
    state[prefix + FINGERPRINT] = weights.root._buffers[FINGERPRINT]


def _check_products(
    weights: Weights, state: dict[str, Any], prefix: str, given: Mapping[str, str]
) -> None:
    """Take the weights out of a state that has their coordinates, too, and refuse it without these.

    ``given`` are tensors by their paths in the state.
    """
    names = weights.coordinate_names
    if any(prefix + name not in state for name in names):
        raise SubspanError(
            "this state_dict has weights without the coordinates of their LoRA factors, which "
            "cannot be found from W + s B A: load it into the network before it is wrapped, or "
            "into that of unwrap()"
        )
    own = [weights.root._parameters[name] for name in names]
    before = [w.detach().clone() for w in own]  # type: ignore[union-attr]
    try:
        for name, w in zip(names, own, strict=True):
            w.copy_(state[prefix + name])  # type: ignore[union-attr]
        for path, tensor in given.items():
            theta, value = weights.form(tensor), state.pop(prefix + path)
            error = (theta.double() - value.to(theta.device).double()).abs().max()
            if not error <= 8 * torch.finfo(value.dtype).eps * value.abs().max():
                raise SubspanError(
                    f"{path} of this state_dict is not the weight that its coordinates give: load "
                    "it into the network before it is wrapped, or into that of unwrap()"
                )
    finally:
        for w, values in zip(own, before, strict=True):
            w.copy_(values)  # type: ignore[union-attr]


def _coordinates_of(
    weights: Weights, values: Mapping[str, Tensor], beside: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Find w whose θ are these values, to within rounding; refuse values that have none.

    Coordinates ``beside`` the values, by name, are taken if they are such.
    """
    coordinates = {}
    for tensor, value in values.items():
        if tensor in weights.packed and (
            is_traceable_wrapper_subclass(value) or not value.is_floating_point()
        ):
            raise SubspanError(
                f"{tensor} is quantised in this state_dict, that is, without coordinates: load it "
                "into the network before it is wrapped, or into that of unwrap()"
            )
        shape = weights.held(tensor).shape
        if value.shape != shape:
            raise SubspanError(
                f"the state_dict is of another network: {tensor} has shape "
                f"{list(value.shape)} there and {list(shape)} here"
            )
    for name, part, projection in zip(
        weights.coordinate_names, weights.compartments, weights.projections, strict=True
    ):
        pieces, moved, size, eps = [], [], 0.0, 0.0
        for piece in part.pieces:
            with ordinary_tensors():
                base = weights.resting(piece.tensor)
            value = values[piece.tensor].to(base.device, base.dtype)
            delta = (value.double() - base.double()).reshape(-1)[piece.start : piece.stop]
            kept = weights.kept.get(piece.tensor, range(0))
            entries = torch.arange(piece.start, piece.stop, device=base.device)
            moved.append((entries < kept.start) | (entries >= kept.stop))
            pieces.append(delta)
            size = max(size, float(value.abs().max()))
            eps = max(eps, torch.finfo(base.dtype).eps)
        delta, mask = torch.cat(pieces), torch.cat(moved).double()
        rounding = 8 * eps * size
        w = beside.get(name, delta.new_zeros(0)).to(delta)
        if w.shape != (part.dim,) or not _distance(projection, w, delta, mask) <= rounding:
            w = _least_squares(projection, delta, mask)
        if not _distance(projection, w, delta, mask) <= rounding:
            raise SubspanError(
                "the weights of this state_dict do not lie in this model's subspace: load them "
                "into the network before it is wrapped, or into that of unwrap()"
            )
        coordinates[name] = w.to(weights.root._parameters[name])
    return coordinates


def _distance(projection: Projection, w: Tensor, delta: Tensor, mask: Tensor) -> float:
    """Return the largest entry of M P w - δ; arguments are those of :func:`_least_squares`."""
    return float((mask * projection.matvec(w) - delta).abs().max())


def _least_squares(projection: Projection, delta: Tensor, mask: Tensor) -> Tensor:
    """W with M P w ≈ δ, (d,) float64; PᵀP is nearly 1, or 1 exactly, so that a few steps suffice.

    δ is (D,) float64, and the mask the diagonal of M, (D,), 0 where weights stay at θ₀, else 1.
    """
    return conjugate_gradients(
        lambda w: mask * projection.matvec(w),
        lambda y: projection.rmatvec(mask * y),
        delta.new_zeros(projection.in_dim),
        delta,
        tolerance=1e-14,
        steps=100,
    )
