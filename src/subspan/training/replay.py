"""From a journal back to the weights of any step."""

from __future__ import annotations

import os
from pathlib import Path

import safetensors
import safetensors.torch
from torch import nn

from subspan import optim
from subspan.errors import SubspanError
from subspan.files import refuse_what_is_no_file, write_atomically
from subspan.optim.journal import Journal
from subspan.subspace import init
from subspan.training import state, tasks
from subspan.training.export import write_weights


def replay(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: int | None = None,
    base: str | os.PathLike[str] | None = None,
) -> tuple[int, int]:
    """Write the weights after some steps of a journal as a plain safetensors ``state_dict``.

    A journal of ``subspan train`` says which network it began with. One of your own training needs
    the initial weights: ``base``, and the file then holds just the tensors of the journal.

    Args:
        path: of the journal.
        out: the file to write.
        step: how many steps to make; all by default.
        base: a safetensors file of the weights that the journal began with.

    Returns:
        The number of steps, and the size of the file in bytes.

    Raises:
        SubspanError: if the journal is unusable, or began with other weights.
    """
    refuse_what_is_no_file(out)
    for other in (path, base):
        if other and Path(out).resolve() == Path(other).resolve():
            raise SubspanError(f"{out} would be overwritten: give another file name")
    if base is None:
        net = _drawn(path)
        return optim.replay(path, net, steps=step), write_weights(net, out)
    try:
        tensors = safetensors.torch.load_file(base)
    except (safetensors.SafetensorError, OSError) as error:
        raise SubspanError(f"{base} is no safetensors file of weights: {error}") from None
    made = optim.replay(path, tensors, steps=step)
    return made, write_atomically(out, safetensors.torch.save(tensors))


@state.aside()
def _drawn(path: str | os.PathLike[str]) -> nn.Module:
    """Return the network that a run of the laboratory began with."""
    extra = Journal(path).header["extra"]
    make = tasks.kind(extra.get("task")).network(extra)
    if make is None or "init_seed" not in extra:
        raise SubspanError(
            f"{path} does not say which network it began with: give its weights as --base FILE"
        )
    return make() if extra["init_seed"] is None else init.build(make, extra["init_seed"])
