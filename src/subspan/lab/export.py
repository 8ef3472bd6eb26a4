"""From coordinates back to an ordinary file of weights."""

from __future__ import annotations

import os

import safetensors.torch

from subspan import slots
from subspan.files import write_atomically
from subspan.lab.evaluate import rebuild
from subspan.subspace import SubspaceModel


def export(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    """Write the merged weights of a checkpoint as a plain safetensors ``state_dict``.

    It loads without subspan: ``net.load_state_dict(safetensors.torch.load_file(out), strict=False)``
    (tied weights are there once, under their first name).

    Returns:
        The size of the file in bytes.
    """
    model, _ = rebuild(path)
    net = model.merge() if isinstance(model, SubspaceModel) else model
    tensors = {slot.tensor: net.get_parameter(slot.tensor) for slot in slots.slots(net)}
    state = {name: t.detach().contiguous() for name, t in tensors.items()}
    state |= {name: b.contiguous() for name, b in slots.saved_buffers(net).items()}
    return write_atomically(out, safetensors.torch.save(state))
