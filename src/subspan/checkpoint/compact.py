"""The compact file: coordinates as levels of a quantiser, in few bytes (``docs/format.md``).

It holds the same header and tensors as the other file. The header is a patch on a template that
every reader knows, so that what is usual costs nothing; the levels are coded arithmetically; what
was trained fully and buffers that training changed are there as they are.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspan import coding
from subspan.coding.packing import ABSENT, varint
from subspan.coding.steps import bfloat16, from_levels, pattern_of
from subspan.errors import SubspanError
from subspan.subspace.parameters import bytes_of, tensor_of

MAGIC = b"\xd3SB"
VERSION = 1  # of the container and its coder
DIGEST = 4  # bytes, of the file's and of each of the header's
COORDINATES = "coordinates"
SHORTENED = ("fingerprint", "layout")

_RECIPE = {
    "dim": 1000,
    "projection": "hash",
    "compartments": "global",
    "allocation": "sqrt",
    "targets": None,
    "exclude": None,
    "train_fully": None,
    "seed": 0,
}
_PLAIN = {
    "format": 1,
    "kind": "subspace",
    "recipe": _RECIPE,
    "init_seed": 0,
    "weights": 0,
    "extra": {},
}
_MNIST = {
    "net": "lenet",
    "data": "mnist",
    "seed": 0,
    "method": "hash",
    "image_shape": [1, 28, 28],
    "classes": 10,
}
_CIFAR10 = _MNIST | {
    "net": "separable-ln-32-64-64-64-64",
    "data": "cifar10",
    "image_shape": [3, 32, 32],
    "names": "4910675e35533f6e",  # a digest of those of the classes
}
# By their numbers for ever: what a header differs from. New ones are added at the end.
TEMPLATES: tuple[dict[str, Any], ...] = (
    _PLAIN,
    _PLAIN | {"weights": 61706, "extra": _MNIST},
    _PLAIN | {"weights": 1714, "extra": _MNIST | {"net": "separable-8-16-16-16-16"}},
    _PLAIN | {"weights": 18154, "extra": _CIFAR10},
)
CHOSEN = (2, 3)  # those that name a network which was chosen by its accuracy on that very set
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64)}
_EXACT = _DTYPES | {
    str(t).removeprefix("torch."): t
    for t in (torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
}


@dataclass(frozen=True)
class CompactFile:
    """The content of a compact file."""

    header: dict[str, Any]  # as of the other file; its digests have 8 digits
    tensors: dict[str, Tensor]
    template: int  # the number of the header's
    step: float  # Δ of the coordinates
    sizes: dict[str, int]  # bytes by what they are for; they sum up to the file's


def to_compact(header: Mapping[str, Any], tensors: Mapping[str, Tensor], bits: float) -> bytes:
    """Return the compact file of a header and its tensors, of :func:`subspan.checkpoint.contents`.

    Coordinates that lie on a grid, since a quantiser had a hand in their training or they come from
    such a file, stay there if they take no more bits; all others are rounded here.

    Raises:
        SubspanError: for a model without coordinates, for bits that leave nothing of them, for a
            tensor of a dtype that the file does not know, and for a header that it cannot hold.
    """
    if header["kind"] != "subspace":
        raise SubspanError(
            "bits quantises coordinates, and this network has none: save it without bits, or put "
            "it into a SubspaceModel"
        )
    coding.check_bits(bits)
    exact = {name: tensors[name] for name in sorted(tensors) if name != COORDINATES}
    kept = [varint(len(exact))]
    for name, tensor in exact.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _EXACT:
            raise SubspanError(f"a file with bits knows no {dtype}, of {name}: save without bits")
        kept.append(coding.pack(name) + coding.pack(dtype) + coding.pack(list(tensor.shape)))
    kept += [bytes_of(tensor).numpy().tobytes() for tensor in exact.values()]

    w = tensors[COORDINATES]
    step = coding.find_grid(w)
    if step is None or not coding.fits(w, step, bits):
        step = coding.choose_step(w, bits)
    wide = (w.dtype == torch.float64) << 15  # a step is positive: its sign says the dtype
    code = coding.encode_levels(coding.round_to_levels(w, step))
    coded = varint(w.numel()) + struct.pack("<H", pattern_of(step) | wide) + code

    try:
        packed = _pack_header(header)
    except ValueError as error:
        raise SubspanError(
            f"a file with bits cannot hold this extra: {error}; save without bits"
        ) from None
    body = MAGIC + bytes([VERSION]) + packed + b"".join(kept) + coded
    return body + _digest(body)


def read_compact(data: bytes, path: object) -> CompactFile:
    """Return the content of a compact file, whose data begin with :data:`MAGIC`.

    Raises:
        SubspanError: if it is of a later version, cut short, longer than it was, or edited.
    """
    if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
        raise SubspanError(
            f"{path} has a coder of version {data[len(MAGIC)]}, this version of subspan reads up "
            f"to {VERSION}: upgrade"
        )
    if _digest(data[:-DIGEST]) != data[-DIGEST:]:
        raise SubspanError(f"{path} was damaged or edited after it was saved: its digest differs")
    reader = coding.Reader(data[len(MAGIC) + 1 : -DIGEST])
    try:
        header = _read_header(reader)
        begin_exact = reader.place
        names = [(reader.value(), reader.value(), reader.value()) for _ in range(reader.varint())]
        tensors = {}
        for name, dtype, shape in names:
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is no name of a tensor")
            size = torch.empty(shape, dtype=_EXACT[dtype], device="meta").nbytes
            tensors[name] = tensor_of(reader.take(size), _EXACT[dtype], shape)
        begin_coded = reader.place
        number, (pattern,) = reader.varint(), struct.unpack("<H", reader.take(2))
        step = bfloat16(pattern & 0x7FFF)
        if not 0 < step < math.inf:
            raise ValueError(f"its step is {step}")
        _check_number(number, header["recipe"])
        levels = coding.decode_levels(reader.data[reader.place :], number)
    except (ValueError, LookupError, TypeError, RuntimeError, ArithmeticError) as error:
        said = str(error).partition("\n")[0]  # PyTorch goes on with its own functions
        raise SubspanError(f"{path} is not what subspan saves: {said}") from None
    dtype = torch.float64 if pattern >> 15 else torch.float32
    tensors[COORDINATES] = from_levels(levels, step, dtype)
    sizes = {
        "header": len(MAGIC) + 1 + begin_exact,
        "other tensors": begin_coded - begin_exact,
        "coordinates": len(reader.data) - begin_coded,
        "digest": DIGEST,
    }
    return CompactFile(header, tensors, reader.data[0], step, sizes)


def _pack_header(header: Mapping[str, Any]) -> bytes:
    """Return the template's number, short digests, and the patch: the shortest that there is."""
    own = dict(header)
    short = b"".join(bytes.fromhex(own[name])[:DIGEST] for name in SHORTENED)
    # With buffers the whole fingerprint is needed: a reader may take it over.
    for name in SHORTENED if "parameters" not in own else SHORTENED[1:]:
        del own[name]
    packed = (
        bytes([number]) + short + coding.pack(difference(own, template))
        for number, template in enumerate(TEMPLATES)
    )
    return min(packed, key=len)


def _read_header(reader: coding.Reader) -> dict[str, Any]:
    number = reader.take(1)[0]
    if number >= len(TEMPLATES):
        raise ValueError(f"its header needs template {number}, which a later version has: upgrade")
    short = {name: reader.take(DIGEST).hex() for name in SHORTENED}
    patch = reader.value()
    if not isinstance(patch, dict):
        raise ValueError(f"the patch of its header is of the type {type(patch).__name__}")
    header: dict[str, Any] = short | apply_patch(patch, TEMPLATES[number])
    json.dumps(header)  # raises TypeError where something is left out that no template has
    return header


def _check_number(number: int, recipe: Mapping[str, Any]) -> None:
    """Compare the number of coordinates with the recipe: a file that is wrong may claim any."""
    dims = recipe["dim"]
    if dims is None:
        dims = [dim for _, dim in recipe["compartments"]]
    if number < 1 or number != (sum(dims) if isinstance(dims, list) else dims):
        raise ValueError(f"it has {number} coordinates, and its recipe has others")


def difference(value: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    """Return the patch that makes a value of a template."""
    patch: dict[str, Any] = {name: ABSENT for name in template if name not in value}
    for name, mine in value.items():
        theirs = template.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            if inner := difference(mine, theirs):
                patch[name] = inner
        elif name not in template or json.dumps(mine) != json.dumps(theirs):
            patch[name] = mine
    return patch


def apply_patch(patch: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    """Return a template with a patch."""
    value = copy.deepcopy(dict(template))
    for name, mine in patch.items():
        if mine is ABSENT:
            del value[name]
        elif isinstance(mine, dict) and isinstance(value.get(name), dict):
            value[name] = apply_patch(mine, value[name])
        else:
            value[name] = mine
    return value


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST]
