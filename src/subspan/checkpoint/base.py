"""The name of θ₀: the pretrained network that the coordinates of a file go with.

Transformers keeps the name that a network was loaded by, and not the revision: that is looked up in
the cache of the Hub's client, where the network's own files lie. Nothing is asked of the Hub. The
name is for finding the network again; whether it is the right one, the fingerprint decides.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspan.errors import SubspanError
from subspan.subspace.model import SubspaceModel

# What a configuration says of how the network was loaded or runs, and not of what it computes.
APART = {"transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config"}
APART |= {"auto_map", "fusion_config", "transformers_weights"}
_LABELS = {"id2label", "label2id", "num_labels"}


def find_base(model: SubspaceModel, name: str | None = None) -> dict[str, Any] | None:
    """Find out which pretrained network of Transformers a model was made from.

    The name is that of the repository, or ``NAME@REVISION``; by default it is that of the network's
    configuration, at the revision in the cache.

    Returns:
        The header's field ``base``: ``repo`` and ``revision`` (a commit), or ``folder``; ``class``;
        ``dtype``; ``converted``, the dtype that it has now, if that is another; ``config``, where
        the network's configuration differs from the base's; and ``late``, the names in it of what
        was set after the network was made. None if nothing can be named for sure: a network with
        replaced parts is not what the base would give.

    Raises:
        SubspanError: if a name that was given cannot be the base.
    """
    cls, drawn = class_in_transformers(model.body), model.init_seed is not None
    if cls is None or drawn:
        if name is not None:
            kind = f"{type(model.body).__name__} is no class of Transformers"
            raise SubspanError(
                f"base={name!r} names weights that Transformers loads, and "
                f"{'these are drawn from a seed' if drawn else kind}: leave base out, and give "
                "load the network"
            )
        return None
    config: Any = model.body.config
    given, _, revision = (name or "").partition("@")
    where = _locate(
        given or getattr(config, "name_or_path", "") or "",
        revision or (None if given else getattr(config, "_commit_hash", None)),
    )
    if where is None:
        if name is not None:
            raise SubspanError(
                f"base={name!r} is not in the cache of the Hub's client: load it once by "
                "from_pretrained, with this revision"
            )
        return None
    fields, folder = where
    try:
        base_config = type(config).from_pretrained(folder)
    except (OSError, ValueError):  # a folder that has become another network's
        return None
    changes = _difference(config, base_config)
    late = _set_late(cls, model, base_config, changes)
    if late is None:
        if name is not None:
            raise SubspanError(
                f"base={name!r} cannot be the whole base: parts of the network were replaced after "
                "it was loaded, or its configuration makes another one; leave base out, and give "
                "load the network"
            )
        return None
    fields |= {"class": f"transformers.{cls.__name__}", "config": changes} | _dtypes(model)
    return fields | ({"late": late} if late else {})


def class_in_transformers(net: nn.Module) -> type | None:
    """Return a network's class if it is one of Transformers' own, as it was before wrapping."""
    cls = getattr(type(net), "_subspan_class", (type(net),))[0]
    if not cls.__module__.startswith("transformers."):
        return None
    own = getattr(sys.modules["transformers"], cls.__name__, None) is cls
    return cls if own and hasattr(net, "config") else None


def say_base(base: Mapping[str, Any] | None) -> str:
    """Name a base for people; "" if there is none."""
    if not base:
        return ""
    if "folder" in base:
        return f"the folder {base['folder']}"
    return f"{base.get('repo')} at revision {base.get('revision')}"


def _locate(name: str, revision: str | None) -> tuple[dict[str, Any], Path] | None:
    """Return a base's name as it stands in a header, and the folder of its configuration."""
    if not name:
        return None
    if (Path(name) / "config.json").is_file():
        return {"folder": name}, Path(name)
    import huggingface_hub

    try:
        file = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # it can be no repository's name
        return None
    if not isinstance(file, str):
        return None
    folder = Path(file).parent  # snapshots/COMMIT
    return {"repo": name, "revision": folder.name}, folder


def _dtypes(model: SubspaceModel) -> dict[str, str]:
    """Return the dtype in which the network was loaded: that of its first weights with a dtype.

    It is the one in which they were wrapped; what they were converted to since stands beside it.
    """
    weights = model.subspace
    rest = [name for name in weights.requires_grad if name not in weights.fully]
    floats = [name for name in rest if weights.stored(name).is_floating_point()]
    now = before = weights.stored((floats or rest)[0]).dtype
    if floats:
        before = weights.changes.dtype_before(floats[0])
    found = {"dtype": before} | ({"converted": now} if now != before else {})
    return {key: str(dtype).removeprefix("torch.") for key, dtype in found.items()}


def _difference(config: Any, base: Any) -> dict[str, Any]:
    """Return what the network's configuration has in place of the base's."""
    mine, theirs = config.to_dict(), base.to_dict()
    found = {
        key: value
        for key, value in mine.items()
        if key in theirs and not key.startswith("_") and key not in APART | _LABELS
        if value != theirs[key]
    }
    if mine.get("id2label") != theirs.get("id2label"):
        labels = config.id2label
        if labels == {n: f"LABEL_{n}" for n in range(len(labels))}:
            found["num_labels"] = len(labels)
        else:
            found["id2label"] = labels
    return found


def _set_late(
    cls: Any, model: SubspaceModel, base: Any, changes: Mapping[str, Any]
) -> list[str] | None:
    """Find what was set in a configuration after the network was made of it, and shows in it.

    An embedding, say, looks for the token of padding when it is made, and people set that token
    later. Networks without values are made to see; at most one setting can be late. None is
    returned if the configuration does not make this network.
    """
    if model.subspace.packed:  # whose layers are others; they are not made anew
        return []
    shown = str(model.body)
    for late in ([], *([key] for key in changes if key not in _LABELS)):
        config = copy.deepcopy(model.body.config)
        for key in late:
            setattr(config, key, getattr(base, key))
        try:
            with torch.device("meta"):
                made = cls(config)
        except Exception:  # of a configuration that was changed into one of no network
            continue
        if str(made) == shown:
            return late
    return None
