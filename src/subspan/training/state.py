"""Where a training run stands, in one file, so that it can go on bit for bit.

The file is PyTorch's own, read with ``weights_only``: nothing in it is executable.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from subspan.errors import SubspanError
from subspan.files import write_atomically

FILE = "state.pt"
FORMAT = 2


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a state, whole or not at all."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT} | content, buffer)
    write_atomically(path, buffer.getvalue())


def read(path: Path) -> dict[str, Any] | None:
    """A state, or None where there is none.

    Raises:
        SubspanError: if the file is damaged, or of a newer format.
    """
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format"]
    except Exception as error:  # of a damaged file PyTorch raises any
        raise SubspanError(
            f"{path} is damaged, training cannot go on from it ({type(error).__name__}): remove it "
            "to begin anew"
        ) from None
    if version != FORMAT:
        raise SubspanError(
            f"{path} has format {version}; this version reads {FORMAT}: go on with the version of "
            "subspan that wrote it, or remove it to begin anew"
        )
    return dict(content)


def generators() -> dict[str, Any]:
    """The states of all generators that a network may draw from, as dropout does.

    Of the GPU that this process uses: all processes draw alike, each on its own.
    """
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), torch.from_numpy(np.array(keys, dtype=np.int64)), *map(float, rest)],
    }


def seed_generators(seed: int) -> None:
    """Begin them all at a seed, of which NumPy's takes 32 bits."""
    set_seed(seed % (1 << 32))


def set_generators(states: dict[str, Any]) -> None:
    """Put them back; that of the GPU where there is one."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(
        (kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached)
    )
