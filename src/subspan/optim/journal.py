"""The journal of an optimizer: θ₀ and a few numbers a step rebuild the weights at every step.

A file, all little-endian (``docs/format.md``):

    "SUBSPANJ"   length: u32   header: JSON of that length   crc32 of the header: u32
    step: u64    rates: f64 each   coordinates: f32 or f64 each   crc32 of the record: u32     …

Records have one length, so that a tail that was cut off is noticed and costs the last step alone.
A step without a record was skipped.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from subspan.errors import SubspanError, is_integer
from subspan.files import refuse_what_is_no_file, write_atomically
from subspan.optim.directions import Directions, Move
from subspan.subspace.parameters import digest_tensors

MAGIC, FORMAT = b"SUBSPANJ", 1
FIELDS = {"format": int, "parts": list, "groups": list, "bases": int, "dtype": str}
FIELDS |= {"tensors": dict, "base": str}  # of the header
WRONG = "{} is not what subspan writes: fields of its header are wrong"


class Journal:
    """A journal that is read, or written one step after another."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                magic, raw = file.read(len(MAGIC)), file.read(4)
                (length,) = struct.unpack("<I", raw) if len(raw) == 4 else (0,)
                # A length that was edited may be any: no memory for more than there is.
                text = file.read(min(length, self.path.stat().st_size))
                crc = file.read(4)
                self._begin = file.tell()
        except OSError as error:
            raise SubspanError(f"{path} cannot be read: {error.strerror}") from None
        if magic != MAGIC:
            raise SubspanError(f"{path} is no journal of subspan")
        if crc != struct.pack("<I", zlib.crc32(text)):
            raise SubspanError(f"{path} is damaged: its header is cut short or edited")
        self.header: dict[str, Any] = json.loads(text)  # before the records
        self._check_header()
        self._rates = len(self.header["groups"])
        self._shape = (self.header["bases"], sum(self.header["groups"]))
        self._dtype = np.dtype(self.header["dtype"]).newbyteorder("<")
        self._length = 8 + 8 * self._rates + self._dtype.itemsize * math.prod(self._shape) + 4
        self._end: int | None = self.path.stat().st_size  # None: a step could not be written

    def _check_header(self) -> None:
        """Refuse a later format, and fields that are missing or of other types."""
        header = self.header if isinstance(self.header, dict) else {}
        if isinstance(version := header.get("format"), int) and version > FORMAT:
            raise SubspanError(
                f"{self.path} has format {version}, this version of subspan reads up to {FORMAT}: "
                "upgrade"
            )
        fit = all(isinstance(header.get(name), kind) for name, kind in FIELDS.items())
        if not fit or header["dtype"] not in ("float32", "float64"):
            raise SubspanError(WRONG.format(self.path))
        counts = [header["bases"], *header["groups"]]
        if header.get("redraw_every") is not None:
            counts.append(header["redraw_every"])
        if not all(is_integer(n, least=1) for n in counts):
            raise SubspanError(WRONG.format(self.path))

    @staticmethod
    def create(path: str | os.PathLike[str], header: Mapping[str, Any]) -> Journal:
        """Write a new file without records, as a whole or not at all."""
        refuse_what_is_no_file(Path(path))
        try:
            text = json.dumps({"format": FORMAT} | dict(header), sort_keys=True).encode()
        except (TypeError, ValueError) as error:
            raise SubspanError(f"extra must be JSON: {error}") from None
        crc = struct.pack("<I", zlib.crc32(text))
        write_atomically(Path(path), MAGIC + struct.pack("<I", len(text)) + text + crc)
        return Journal(path)

    def moves(self) -> Iterator[Move]:
        """Read the steps in order, but no tail that was cut off; refuse damage before others."""
        last, size = -1, self.path.stat().st_size
        with self.path.open("rb") as file:
            file.seek(self._begin)
            while self._length <= size and len(raw := file.read(self._length)) == self._length:
                (step,) = struct.unpack_from("<Q", raw)
                whole = raw[-4:] == struct.pack("<I", zlib.crc32(raw[:-4]))
                if not whole or step <= last:
                    if size - file.tell() < self._length:
                        return  # the last one: written while the machine went down
                    raise SubspanError(
                        f"{self.path} is damaged after step {last}: a record was edited, and "
                        "others follow"
                    )
                numbers = np.frombuffer(raw[8 + 8 * self._rates : -4], self._dtype)
                coordinates = torch.from_numpy(numbers.astype(self._dtype.newbyteorder("=")))
                rates = struct.unpack_from(f"<{self._rates}d", raw, 8)
                yield Move(step, rates, coordinates.view(self._shape))
                last = step

    def cut(self, before: int | None = None) -> None:
        """Remove a tail that is no whole record, and all steps from ``before`` on."""
        whole = sum(1 for move in self.moves() if before is None or move.step < before)
        with self.path.open("r+b") as file:
            self._end = file.truncate(self._begin + whole * self._length)

    def check(self) -> None:
        """Refuse to go on where the file does not end with the last step that was appended here."""
        try:
            size = self.path.stat().st_size
        except OSError:
            size = -1
        if size != self._end:
            raise SubspanError(
                f"{self.path} does not end with this optimizer's last step, since it is gone, or "
                "is written by another one: make a new optimizer that goes on from a journal, with "
                "the network as it was before the first step"
            )

    def append(self, move: Move) -> None:
        """Write one step behind the others; the system has it when this returns."""
        numbers = move.coordinates.detach().cpu().numpy().astype(self._dtype)
        raw = struct.pack(f"<Q{self._rates}d", move.step, *move.rates) + numbers.tobytes()
        end, self._end = self._end, None
        try:
            with self.path.open("ab") as file:
                file.write(raw + struct.pack("<I", zlib.crc32(raw)))
        except OSError as error:
            raise SubspanError(
                f"step {move.step} cannot be written to {self.path} ({error.strerror}): the steps "
                "before it are there, and a new optimizer goes on from them"
            ) from None
        self._end = (end or 0) + self._length

    def sync(self) -> None:
        """Bring all steps to the disk, so that they outlast a crash of the system."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


def header_of(
    directions: Directions, dtype: torch.dtype, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the header of a journal, with the weights as they are before the first step."""
    tensors = {n: t for weights in directions.compartments for n, t in weights.tensors.items()}
    return {
        **directions.described(),
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": {n: [list(t.shape), str(t.dtype)] for n, t in tensors.items()},
        "base": digest_tensors(tensors),
        "extra": dict(extra),
    }


@torch.no_grad()
def replay(
    path: str | os.PathLike[str],
    weights: nn.Module | Mapping[str, Tensor],
    *,
    steps: int | None = None,
) -> int:
    """Bring weights from where a journal began to where they were after some of its steps.

    On the same kind of device the weights are those of the training to the last bit.

    Args:
        path: of the journal.
        weights: a network, or tensors by name, with the values that the journal began with;
            changed in place.
        steps: how many steps of the training to make, skipped ones counted; all by default.

    Returns:
        The number of steps that the weights have made now.

    Raises:
        SubspanError: if the file is no journal or damaged, or the weights are others; or if it has
            fewer steps. The weights are then untouched.
    """
    journal = Journal(path)
    header = journal.header
    tensors = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else dict(weights)
    try:
        names = {p[0]: header["tensors"][p[0]][0] for d in header["parts"] for p in d["pieces"]}
    except (LookupError, TypeError):
        raise SubspanError(WRONG.format(path)) from None
    for name, shape in names.items():
        if name not in tensors or list(tensors[name].shape) != shape:
            got = list(tensors[name].shape) if name in tensors else "none"
            raise SubspanError(
                f"{path} is the journal of another network: it has {name} of shape {shape}, "
                f"this one {got}"
            )
    tensors = {name: tensors[name].detach() for name in names}
    if digest_tensors(tensors) != header["base"]:
        raise SubspanError(
            f"{path} began with other weights: give the network as it was before the first step"
        )
    moves = list(journal.moves())
    last = moves[-1].step + 1 if moves else 0
    if steps is not None and not (isinstance(steps, Integral) and 0 <= steps <= last):
        raise SubspanError(f"{path} has {last} steps, not {steps}")
    try:
        directions = Directions.from_description(header, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise SubspanError(WRONG.format(path)) from None
    for move in moves:
        if steps is None or move.step < steps:
            directions.move(move, directions.redraw(move.step))
    return last if steps is None else steps
