"""From coordinates back to an ordinary file of weights."""

from __future__ import annotations

import os
from pathlib import Path

import safetensors.torch
from torch import nn

from subspan.adapters import LoraExport, export_lora
from subspan.errors import SubspanError
from subspan.files import refuse_what_is_no_file, write_atomically
from subspan.layers import compressed_layers, merge
from subspan.subspace.model import SubspaceModel
from subspan.subspace.parameters import find_slots, saved_buffers
from subspan.training.evaluate import rebuild
from subspan.training.methods import method


def export(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, net: str | None = None
) -> int:
    """Write the merged weights of a checkpoint as a plain safetensors ``state_dict``.

    It loads without subspan, by ``safetensors.torch.load_file`` and ``net.load_state_dict``. Tied
    weights are there once, under their first name: a network with such needs ``strict=False``.

    Args:
        path: of the checkpoint.
        out: the file to write.
        net: the name of its network, where it is not that of the training any more.

    Returns:
        The size of the file in bytes.

    Raises:
        SubspanError: if the checkpoint is unusable, or the file cannot be where it is to be.
    """
    refuse_what_is_no_file(out)
    if Path(out).resolve() == Path(path).resolve():
        raise SubspanError(f"{out} is the checkpoint itself: give another file name")
    model, header = rebuild(path, net)
    if isinstance(model, SubspaceModel):
        model = model.merge()
    elif compressed_layers(model):
        model = merge(model)
    elif header["kind"] == "part":
        model = method(header["extra"]["method"]).merge(model)
    return write_weights(model, out)


def export_peft(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rank: int | None = None,
    *,
    net: str | None = None,
) -> LoraExport:
    """Write a checkpoint as a LoRA that PEFT loads, see :func:`subspan.export_lora`."""
    return export_lora(rebuild(path, net)[0], out, rank=rank)


def write_weights(net: nn.Module, out: str | os.PathLike[str]) -> int:
    """Write a network's weights and buffers, tied ones once; returns the size in bytes."""
    tensors = {slot.tensor: net.get_parameter(slot.tensor) for slot in find_slots(net)}
    state = {name: t.detach().contiguous() for name, t in tensors.items()}
    state |= {name: b.contiguous() for name, b in saved_buffers(net).items()}
    return write_atomically(out, safetensors.torch.save(state))
