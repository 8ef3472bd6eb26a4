"""The state of a training run in one file, from which it goes on bit for bit.

The file is PyTorch's own, read with ``weights_only``: nothing in it is executable.
"""

from __future__ import annotations

import io
import math
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from subspan.errors import SubspanError
from subspan.files import write_atomically
from subspan.training.records import Epoch
from subspan.training.schema import from_json, to_json

FILE = "state.pt"
FORMAT = 2
_drawing = threading.RLock()


@dataclass
class Within:
    """The part of the current epoch that is done."""

    total: Tensor  # the sum of the losses of its samples, a scalar on the run's device
    seen: int = 0  # how many samples
    seconds: float = 0.0  # that they took
    lr: float = 0.0  # the learning rate that it began with


@dataclass
class Progress:
    """The part of a run that is done, and its measurements."""

    within: Within  # the epoch that is under way
    done: int = 0  # steps
    history: list[Epoch] = field(default_factory=list)  # the epochs that are over
    best_score: float = math.nan  # NaN before the first epoch that may be the best
    best_epoch: int = 0  # 0 before it
    sent: list[float] = field(default_factory=list)  # bytes per step of several processes, by epoch


@dataclass(kw_only=True)
class TrainState:
    """Everything that the rest of a training depends on."""

    config: dict[str, Any]  # of the run, as in its record
    header: dict[str, Any]  # of the model's checkpoint
    tensors: dict[str, Tensor]  # likewise
    optimizer: dict[str, Any]  # its state
    schedule: dict[str, Any]  # likewise
    scaler: dict[str, Any] | None  # of fp16, likewise; else None
    generators: dict[str, Any]  # of :func:`generators`
    progress: Progress  # how far it is
    log: dict[str, Any]  # what trackers were told
    notes: list[str]  # of the record
    processes: int  # how many trained
    device: str  # of the record
    versions: dict[str, str]  # of the record
    size: int  # training samples
    samples: int  # a checksum of them, ``Prepared.digest``
    seconds_total: float  # of all parts of the training

    def state_dict(self) -> dict[str, Any]:
        """Return the content of the file: one flat dict of plain values and tensors."""
        progress = vars(self.progress) | {
            "within": vars(self.progress.within),
            "history": to_json(self.progress.history),
        }
        own = {name: value for name, value in vars(self).items() if name != "progress"}
        return own | progress

    @classmethod
    def from_state_dict(cls, content: Mapping[str, Any]) -> TrainState:
        """Make a state from its :meth:`state_dict`; anything else raises an error of some kind."""
        progress = {each.name: content[each.name] for each in fields(Progress)} | {
            "within": Within(**content["within"]),
            "history": from_json(list[Epoch], content["history"]),
        }
        own = {each.name: content[each.name] for each in fields(cls) if each.name != "progress"}
        return cls(progress=Progress(**progress), **own)


def write(path: Path, state: TrainState) -> None:
    """Write a state, whole or not at all."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT} | state.state_dict(), buffer)
    write_atomically(path, buffer.getvalue())


def read(path: Path) -> TrainState | None:
    """Return a state, or None where there is none; refuse a damaged file, and another format."""
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format"]
        if version == FORMAT:
            return TrainState.from_state_dict(content)
    except Exception as error:  # of a damaged file PyTorch raises any
        raise SubspanError(
            f"{path} is damaged, training cannot go on from it ({type(error).__name__}): remove it "
            "to begin anew"
        ) from None
    raise SubspanError(
        f"{path} has format {version}; this version reads {FORMAT}: go on with the version of "
        "subspan that wrote it, or remove it to begin anew"
    )


def generators() -> dict[str, Any]:
    """Return the states of all generators that a network may draw from, as dropout does.

    Of the GPU that this process uses: all processes draw alike, each on its own.
    """
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), torch.from_numpy(np.array(keys, dtype=np.int64)), *map(float, rest)],
    }


@contextmanager
def aside() -> Iterator[None]:
    """Leave all generators as they were found, whatever is drawn or seeded meanwhile.

    A process has one set of them: another thread that is to seed them waits until this ends.
    """
    with _drawing:
        before = generators()
        try:
            yield
        finally:
            set_generators(before)


def seed_generators(seed: int) -> None:
    """Seed all generators; NumPy's takes 32 bits of the seed."""
    set_seed(seed % (1 << 32))


def set_generators(states: dict[str, Any]) -> None:
    """Set the states of all generators again; the GPU's where there is one."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(
        (kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached)
    )
