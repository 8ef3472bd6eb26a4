"""Networks of which a file holds only what is trained: their base is wherever the file is loaded.

Fine-tuning trains a head, or adapters that another library has put into a network, and leaves the
pretrained weights as they are. Such a network is an ordinary module that knows its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from subspan.errors import SubspanError
from subspan.subspace.parameters import changed_buffers, digest_buffers, digest_tensors

ATTRIBUTE = "_subspan_base"


@dataclass(frozen=True)
class HeldBase:
    """A network before its training, and which part of it is trained.

    The fingerprint is a digest of the other parameters and of all buffers, those that no
    ``state_dict`` has among them: adapters keep there what they draw from a seed.
    """

    weights: int  # of the network before anything was put into it
    trained: tuple[str, ...]  # names of parameters
    fingerprint: str
    buffers: Mapping[str, str]  # digests of those that training may change, by name


def hold_base(net: nn.Module, weights: int) -> None:
    """Let a network know its base: a file of it has what requires a gradient now, and no more.

    ``weights`` are those of the network before adapters were put into it.
    """
    parameters = dict(net.named_parameters())
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    vars(net)[ATTRIBUTE] = HeldBase(
        weights,
        tuple(name for name in parameters if name not in frozen),
        digest_tensors({**frozen, **dict(net.named_buffers())}),
        digest_buffers(net),
    )


def base_of(net: nn.Module) -> HeldBase | None:
    """Return the base that a network knows; None of any other network."""
    base: HeldBase | None = vars(net).get(ATTRIBUTE)
    return base


def trained_tensors(net: nn.Module, base: HeldBase) -> dict[str, Tensor]:
    """Return what is trained, and the buffers that training changed."""
    trained = {name: net.get_parameter(name) for name in base.trained}
    return trained | changed_buffers(net, base.buffers)


def check_part(path: object, net: nn.Module, header: Mapping[str, Any]) -> None:
    """Refuse what was trained in a network with another base than this one, or none."""
    base = base_of(net)
    if base is None:
        raise SubspanError(
            f"{path} holds only what was trained of a network, adapters perhaps: load it with "
            "subspan.training.evaluate.rebuild(path), or put it into a network that the same "
            "method has wrapped"
        )
    if base.fingerprint != header["fingerprint"]:
        raise SubspanError(
            f"{path} was trained in a network with other weights or adapters (fingerprint "
            f"{header['fingerprint']}, this one has {base.fingerprint}): give the network that it "
            "was trained from"
        )
