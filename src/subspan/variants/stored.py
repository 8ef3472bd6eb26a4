"""Stored variants: the tensors of each as bytes, taken from a vector, a file or a model.

A tensor of a thousand numbers takes a fifth more memory than these numbers, ``bytes`` a hundredth,
and nobody can change them, so that threads need no lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspan.checkpoint import check_base, contents, read
from subspan.checkpoint.file import COORDINATES
from subspan.errors import SubspanError
from subspan.subspace.links import locate
from subspan.subspace.model import SubspaceModel
from subspan.subspace.parameters import bytes_of, digest_tensors, saved_buffers, tensor_of
from subspan.subspace.states import refuse_rounding
from subspan.subspace.variant import Variant

Source = Tensor | str | os.PathLike[str] | nn.Module


@dataclass(frozen=True, slots=True, eq=False)
class StoredVariant:
    """A variant in memory."""

    coordinates: bytes  # of all compartments, one after another
    beside: bytes  # fully trained tensors and saved buffers; one object where they are the same


class Shelf:
    """Takes variants of a model from where they come, and makes them ready for use."""

    def __init__(self, model: SubspaceModel) -> None:
        self.model, self.weights = model, model.subspace
        self._last = b""
        root = self.weights.network()
        names = [*self.weights.fully, *saved_buffers(root)]
        self._places = {name: locate(root, name) for name in names}
        # Shapes and dtypes of what is stored, whatever the network is converted to later.
        self._like = _without_values(self._own_coordinates())
        self._like_beside = _without_values(self.beside())

    def take(self, source: Source) -> StoredVariant:
        """Take a variant from a vector, the file of a checkpoint, or a model as it is now."""
        if isinstance(source, str | os.PathLike):
            return self._take(os.fspath(source), *read(source))
        if isinstance(source, Tensor):
            return self._keep("the vector", source, self.beside())
        if isinstance(source, nn.Module) and (model := SubspaceModel.of(source)) is not None:
            return self._take("the model that was given", *contents(model))
        raise SubspanError(
            "a variant is a tensor of coordinates, the path of a checkpoint, or a SubspaceModel as "
            f"it is now; got {type(source).__name__}"
        )

    def make(self, name: str | None, stored: StoredVariant | None) -> Variant:
        """Make a variant for use, on the network's device; of nothing stored, the base itself."""
        parts, beside = self._own_coordinates(), self.beside()
        if stored is None:
            zeros = {each: torch.zeros_like(w) for each, w in parts.items()}
            return Variant(self.weights, name, zeros, {})
        for tensors, data, like in (
            (parts, stored.coordinates, self._like),
            (beside, stored.beside, self._like_beside),
        ):
            for each, tensor in from_bytes(data, like).items():
                tensors[each] = tensor.to(tensors[each])  # its device and dtype
        return Variant(self.weights, name, parts, beside)

    def beside(self) -> dict[str, Tensor]:
        """Return the network's own tensors that a variant has beside its coordinates."""
        return {
            name: (module._parameters | module._buffers)[attribute]  # type: ignore[misc]
            for name, (module, attribute) in self._places.items()
        }

    def state(self) -> tuple[Any, ...]:
        """Describe what a variant is made for: it is right as long as this is the same."""
        places = tuple((own.dtype, own.device) for own in self.beside().values())
        return self.weights.state(), places

    def _own_coordinates(self) -> dict[str, Tensor]:
        root = self.weights.network()
        return {name: root._parameters[name].detach() for name in self.weights.coordinate_names}  # type: ignore[union-attr]

    def _keep(
        self, source: str, coordinates: Tensor, beside: Mapping[str, Tensor]
    ) -> StoredVariant:
        dim = sum(part.dim for part in self.weights.compartments)
        if coordinates.shape != (dim,) or coordinates.is_complex():
            raise SubspanError(
                f"a variant of this model is a vector of d = {dim} real numbers, got a tensor of "
                f"{coordinates.dtype} and shape {tuple(coordinates.shape)}: {source}"
            )
        refuse_rounding(beside, {n: like.dtype for n, like in self._like_beside.items()}, source)
        parts = coordinates.split([len(like) for like in self._like.values()])
        for part, like in zip(parts, self._like.values(), strict=True):
            refuse_rounding({COORDINATES: part}, {COORDINATES: like.dtype}, source)
        blob = to_bytes(beside[name].to(like.dtype) for name, like in self._like_beside.items())
        if blob == self._last:
            blob = self._last
        self._last = blob
        pairs = zip(parts, self._like.values(), strict=True)
        return StoredVariant(to_bytes(part.to(like.dtype) for part, like in pairs), blob)

    def _take(
        self, source: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> StoredVariant:
        self._check(source, header, tensors)
        beside = {}
        own = self.beside()
        for name, here in own.items():
            there = tensors.get(f"body.{name}")
            if there is None and name in self.weights.fully:
                raise SubspanError(f"{source} has no {name}, which this model trains fully")
            if there is None:
                was = self.weights.base_buffers.get(name)
                if digest_tensors({name: here}) != was:
                    raise SubspanError(
                        f"{source} has the buffer {name} of its base, and this model's has changed "
                        "since it was wrapped: make the variants of a model as it was wrapped"
                    )
            elif there.shape != here.shape:
                raise SubspanError(
                    f"{source} is a variant of another network: {name} has shape "
                    f"{tuple(there.shape)} there and {tuple(here.shape)} here"
                )
            beside[name] = here if there is None else there
        for name in tensors:
            if name != COORDINATES and name.removeprefix("body.") not in own:
                raise SubspanError(
                    f"{source} has {name.removeprefix('body.')} beside its coordinates, which this "
                    "model does not train fully"
                )
        return self._keep(source, tensors.get(COORDINATES, torch.empty(0)), beside)

    def _check(self, source: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Refuse the variant of another recipe or base."""
        if header["kind"] != "subspace":
            raise SubspanError(
                f"{source} is a whole network ({header['kind']}), and a variant is coordinates of "
                "this model"
            )
        if header["layout"] != self.model.layout:
            for key in sorted(header["recipe"].keys() | self.model.recipe.keys()):
                there, here = header["recipe"].get(key), self.model.recipe.get(key)
                if there != here:
                    raise SubspanError(
                        f"{source} is a variant of another recipe: {key} is {there!r} there and "
                        f"{here!r} in this model"
                    )
        if header.get("parameters") is not None and header["fingerprint"] != (
            self.model.base_fingerprint
        ):
            # Buffers may be others, if the file has all of them.
            complete = all(f"body.{name}" in tensors for name in self._places)
            if complete and header["parameters"] == self.weights.parameters_digest():
                header = {**header, "fingerprint": self.model.base_fingerprint}
        check_base(source, self.model, header)


def to_bytes(tensors: Iterable[Tensor]) -> bytes:
    """Return the bytes of tensors, one after another."""
    return b"".join(bytes_of(tensor).numpy().tobytes() for tensor in tensors)


def _without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def from_bytes(data: bytes, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of these names, shapes and dtypes, made of their bytes."""
    found, start = {}, 0
    with torch.inference_mode(False):
        for name, tensor in like.items():
            stop = start + tensor.nbytes
            found[name] = tensor_of(data[start:stop], tensor.dtype, tensor.shape)
            start = stop
    return found
