"""The coordinates of a model as a module of parameters, which the network itself holds."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import nn

from subspan.errors import SubspanError
from subspan.subspace.blocks import parameter_key
from subspan.subspace.links import PREFIX
from subspan.subspace.network import Network


class Coordinates(nn.Module):
    """w of a model by compartment: a view of parameters that the network holds."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self._parameters = _Entries(network)  # type: ignore[assignment]

    def __getitem__(self, key: str) -> nn.Parameter:
        return self._parameters[parameter_key(key) if key not in self._parameters else key]  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self._parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __contains__(self, key: str) -> bool:
        return key in self._parameters

    def keys(self) -> Any:
        """Names of the compartments, with a slash for every dot."""
        return self._parameters.keys()

    def values(self) -> Any:
        """Return the parameters."""
        return self._parameters.values()

    def items(self) -> Any:
        """Both."""
        return self._parameters.items()


class _Entries(MutableMapping[str, Any]):
    """The coordinates' entries in the network's ``_parameters``, by compartment."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __getitem__(self, key: str) -> Any:
        return self._network.coordinates()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._network.root._parameters[PREFIX + key] = value

    def __delitem__(self, key: str) -> None:
        raise SubspanError("coordinates cannot be deleted: unwrap() the model")

    def __iter__(self) -> Iterator[str]:
        return iter(self._network.coordinates())

    def __len__(self) -> int:
        return len(self._network.coordinate_names)
