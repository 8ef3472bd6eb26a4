"""The file: a header and tensors, under one digest.

The recipes of compressed layers stand in the header. Two types of layers are older than their
registry and have a field each; all others share the field ``layers``, which says the module that
defines a type, so that whoever lacks it can be told. No module is imported because a file says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors
from torch import Tensor, nn

from subspan.checkpoint.compact import COORDINATES as COORDINATES
from subspan.checkpoint.compact import MAGIC, CompactFile, read_compact
from subspan.errors import SubspanError
from subspan.layers.protocol import (
    Compressed,
    comes_back,
    compressed_layers,
    layer_type,
    layer_types,
)
from subspan.layers.replace import full_name
from subspan.subspace.parameters import digest_tensors

FORMAT = 1
KEY = "subspan"
FIELD_OF = {"lowrank": "ranks", "product-of-sums": "sums"}  # of the older types of layers
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {  # of the header, by kind
    "full": {},
    "lowrank": {"ranks": dict},
    "product-of-sums": {"ranks": dict, "sums": dict},
    "layers": {"ranks": dict, "sums": dict, "layers": dict},
    "subspace": {"recipe": dict, "init_seed": (int, NoneType), "fingerprint": str, "layout": str},
    "part": {"fingerprint": str},
}
OPTIONAL = {
    "apart": list,
    "base": dict,
    "kept": dict,
    "lora": dict,
    "parameters": str,
    "quantised": dict,
}
Header = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Types = dict[type[Compressed], dict[str, Any]]  # the recipes of layers by their full names


def describe_layers(net: nn.Module) -> dict[str, Any]:
    """Return the header's fields on a network's compressed layers, and on its kind.

    Raises:
        SubspanError: if the recipe of a layer is not JSON, or a loaded layer would be another.
    """
    fields: dict[str, dict[str, Any]] = {}
    for name, layer in compressed_layers(net).items():
        kind = layer.type_name
        try:
            json.dumps(layer.recipe)
        except TypeError as error:
            raise SubspanError(f"the recipe of layer {name!r} must be JSON: {error}") from None
        if not comes_back(layer, layer_type(kind)):
            raise SubspanError(
                f"layer {name!r} cannot be saved, since its class, {full_name(layer)}, may compute "
                f"anything, and a file would name its type, {kind!r}: register the class as a type "
                "of its own (type_name=… and replaces=…)"
            )
        if kind in FIELD_OF:
            fields.setdefault(FIELD_OF[kind], {})[name] = layer.recipe
        else:
            entry = {"module": layer_type(kind).__module__, "recipes": {}}
            entry = fields.setdefault("layers", {}).setdefault(kind, entry)
            entry["recipes"][name] = layer.recipe
    kind = next(kind for kind, named in FIELDS.items() if fields.keys() <= named.keys())
    return {"kind": kind} | {field: fields.get(field, {}) for field in FIELDS[kind]}


def layers_of(header: Header, path: object = "the file") -> Types:
    """Return the compressed layers that a header describes, by their types.

    Raises:
        SubspanError: for a type that no imported module defines, and for layers without recipes.
    """
    types: Types = {
        layer_type(kind): header[field] for kind, field in FIELD_OF.items() if header.get(field)
    }
    for kind, entry in header.get("layers", {}).items():
        if not isinstance(entry, dict) or not isinstance(entry.get("recipes"), dict):
            raise SubspanError(f"{path} has no recipes of its layers of the type {kind!r}")
        if kind not in layer_types():
            raise SubspanError(
                f"{path} has layers of the type {kind!r}, which no imported module defines: import "
                f"{entry.get('module')} first, if you trust it (--import on the command line)"
            )
        types[layer_type(kind)] = entry["recipes"]
    return types


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a checkpoint, checked to be whole and unchanged."""
    path = Path(path)
    if (compact := _read_if_compact(path)) is not None:
        return compact.header, compact.tensors
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise SubspanError(f"{path} is damaged or no safetensors file: {error}") from None
    if KEY not in metadata:
        raise SubspanError(
            f"{path} is no subspan checkpoint: it has no {KEY!r} key in its metadata"
        )
    try:
        header = json.loads(metadata[KEY])
        version = header["format"]
        same = header.pop("digest", None) == digest(header, tensors)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SubspanError(f"{path} is damaged: its header is not readable") from None
    _check_format(version, path)
    if not same:
        raise SubspanError(f"{path} was damaged or edited after it was saved: its digest differs")
    return _checked(header, path), tensors


def _read_if_compact(path: Path) -> CompactFile | None:
    """Return the content of a compact file; None of any other file."""
    if not path.is_file():
        raise SubspanError(f"{path} is not a file: expected a checkpoint that subspan saved")
    if not os.access(path, os.R_OK):
        raise SubspanError(f"{path} may not be read: see to its permissions")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return None
        compact = read_compact(MAGIC + file.read(), path)
    _check_format(compact.header.get("format"), path)
    _checked(compact.header, path)
    return compact


def _check_format(version: object, path: Path) -> None:
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise SubspanError(
            f"{path} has format {version}, this version of subspan reads up to {FORMAT}: upgrade"
        )


def _checked(header: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a header whose fields are there, of the right types, and all understood."""
    kind = header.get("kind")
    if isinstance(kind, str) and kind not in FIELDS:
        raise SubspanError(
            f"{path} is of the kind {kind!r}, which this version of subspan does not know: upgrade"
        )
    fields = {"extra": dict, "weights": int} | FIELDS.get(str(kind), {"kind": ()})
    fields |= {name: OPTIONAL[name] for name in OPTIONAL.keys() & header.keys()}
    if not all(name in header and isinstance(header[name], t) for name, t in fields.items()):
        raise SubspanError(f"{path} is not what subspan saves: fields of its header are wrong")
    if unknown := sorted(header.keys() - fields.keys() - {"format", "kind"}):
        raise SubspanError(
            f"{path} has {unknown[0]!r} in its header, which this version of subspan does not "
            "know, and what it says would be lost: upgrade"
        )
    for name in header.keys() & {"fingerprint", "layout", "parameters"}:
        short = name == "layout" or "parameters" not in header  # is right in a compact file
        if not re.fullmatch("[0-9a-f]{8}([0-9a-f]{24})" + "?" * short, header[name]):
            raise SubspanError(f"{path} is not what subspan saves: {name} is {header[name]!r}")
    return header


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint's header, with the names and shapes of its tensors and its size.

    It needs no module that defines the layers.

    Returns:
        The header; ``tensors``, their shapes by name; ``bytes``, of the file, and
        ``bytes_of_parts``, of its ``header``, ``coordinates``, ``other tensors`` and, in a compact
        file, ``digest``. Of a compact file the number of its header's ``template``, too, and
        ``quantiser``: the ``step`` of the coordinates, how many distinct ``levels`` there are, and
        the ``bits`` that a coordinate takes.
    """
    path = Path(path)
    compact = _read_if_compact(path)
    header, tensors = read(path) if compact is None else (compact.header, compact.tensors)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    size = path.stat().st_size
    found: dict[str, Any] = header | {"tensors": shapes, "bytes": size}
    if compact is not None:
        w, size = tensors[COORDINATES], compact.sizes["coordinates"]
        found["template"] = compact.template
        found["quantiser"] = {
            "step": compact.step,
            "levels": w.unique().numel(),
            "bits": round(8 * size / w.numel(), 3),
        }
        return found | {"bytes_of_parts": compact.sizes}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    parts = {"header": size - sum(sizes.values()), "coordinates": sizes.pop(COORDINATES, 0)}
    return found | {"bytes_of_parts": parts | {"other tensors": sum(sizes.values())}}


def agree(one: str, other: str) -> bool:
    """Return whether two digests are one, as far as both go: a compact file has 8 digits."""
    known = min(len(one), len(other))
    return known >= 8 and one[:known] == other[:known]


def digest(header: Header, tensors: Tensors) -> str:
    """Return 128 bits of a hash over the header and all tensors."""
    sha = hashlib.sha256(to_json(header).encode())
    sha.update(digest_tensors({name: tensors[name] for name in sorted(tensors)}).encode())
    return sha.hexdigest()[:32]


def to_json(header: Header) -> str:
    """Write a header in the one way that its digest is made of."""
    return json.dumps(header, sort_keys=True, separators=(",", ":"))
