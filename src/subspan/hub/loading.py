"""A model from the name of its file or repository alone: its base is fetched by the file's header.

Nothing that is fetched is executed: the network's class is one of Transformers' own, by name, and
weights are read from safetensors files only.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspan import checkpoint
from subspan.checkpoint.base import APART, say_base
from subspan.checkpoint.loading import Net
from subspan.errors import SubspanError
from subspan.hub.client import asking, need

FILE = "model.safetensors"  # of a repository
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    path: str | os.PathLike[str],
    net: Net | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """Rebuild a saved model around a network, or around the one that its file names.

    Args:
        path: of a file of :func:`save`, or the name of a repository of the Hub (``"user/name"``).
        net: the network with the initial weights that the model was trained from, or a function
            that makes it. For a model of :meth:`SubspaceModel.from_seed` only its architecture
            counts: its initial weights are drawn anew. Without it, the base that the file names is
            loaded by Transformers.
        revision: of the repository of the model: a branch, a tag or a commit.
        token: for private repositories; by default that of `hf auth login`.

    Returns:
        The :class:`SubspaceModel` (or the ordinary network) as it was saved. ``net`` is taken over.

    Raises:
        SubspanError: if the file is not usable, the network is another one, or what is needed
            cannot be fetched; a network that was given is then untouched.
    """
    file = locate(path, revision=revision, token=token)
    if net is not None:
        return checkpoint.load(file, net)
    header, tensors = checkpoint.read(file)
    network, drawn = _fetch(str(path), header, token)
    parameters = dict(network.named_parameters())
    found = ((parameters.get(name.removeprefix("body.")), t) for name, t in tensors.items())
    fully = [(p, t) for p, t in found if p is not None and t.is_floating_point()]
    for p, tensor in fully:  # what is trained fully keeps the file's dtype
        p.data = p.data.to(tensor.dtype)
    try:
        model = checkpoint.load(file, network)
    except SubspanError as error:
        if drawn := drawn - {name.removeprefix("body.") for name in tensors}:
            raise SubspanError(
                f"{file} was trained around weights that {say_base(header['base'])} does not have "
                f"({', '.join(sorted(drawn))}) and that were drawn at random when it was loaded: "
                "only that very network has them, so give it to load; train such weights fully "
                "(train_fully=…) or exclude them from the network, and the file will be enough"
            ) from None
        raise error from None
    if dtype := header["base"].get("converted"):
        model.to(getattr(torch, dtype))
        for p, tensor in fully:
            p.data = tensor.to(p.device, copy=True)
    return model


def locate(
    path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """Return the file of a model, fetched from the Hub if it is the name of a repository."""
    here = Path(path)
    if (here / FILE).is_file():
        here = here / FILE
    name = str(path)
    if here.exists() or here.suffix == ".safetensors" or not _REPO.fullmatch(name):
        if revision is not None:
            raise SubspanError(f"{path} is a file and has no revision: leave revision={revision!r}")
        return here
    try:
        hub = need("huggingface_hub")
        with asking(name, revision):
            return Path(hub.hf_hub_download(name, FILE, revision=revision, token=token))
    except SubspanError as error:
        raise SubspanError(f"there is no file {name} here, and {error}") from error


def _fetch(path: str, header: Mapping[str, Any], token: str | None) -> tuple[nn.Module, set[str]]:
    """Return the base that a header names, and which of its tensors were drawn at random."""
    base = header.get("base")
    if base is None:
        drawn = header.get("init_seed") is not None
        given = "a function that makes the network" if drawn else "the one that it was trained from"
        raise SubspanError(f"{path} does not name a network that can be fetched: give load {given}")
    cls, where, revision = _read_base(path, base)
    with asking(where, revision, base_of=path), _quiet():
        config = cls.config_class.from_pretrained(where, revision=revision, token=token)
        quantised = getattr(config, "quantization_config", None) is not None
        weights = getattr(config, "transformers_weights", None) or FILE
        if header.get("quantised") and not quantised:
            raise SubspanError(
                f"{path} was trained around a quantised network: quantise {where} in the same way, "
                "and give it to load"
            )
        if ".safetensors" not in weights:
            raise SubspanError(f"{where} has its weights in {weights}, which is not safetensors")
        changes, late = base["config"], base.get("late", [])
        _configure(config, {key: value for key, value in changes.items() if key not in late})
        options = {} if quantised else {"dtype": base["dtype"]}
        net, info = cls.from_pretrained(
            where,
            config=config,
            revision=revision,
            token=token,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # of a head for other labels, which is drawn, then
            output_loading_info=True,
            **options,
        )
        _configure(net.config, {key: value for key, value in changes.items() if key in late})
    return net, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def _read_base(path: str, base: Any) -> tuple[Any, str, str | None]:
    """Return class, name and revision of a header's base, which must be there."""
    transformers = need("transformers")
    where = base.get("repo", base.get("folder")) if isinstance(base, dict) else None
    fields = {"class": str, "dtype": str, "config": dict}
    if (
        not isinstance(where, str)
        or not all(isinstance(base.get(field), kind) for field, kind in fields.items())
        or base.get("converted", _FLOATS[0]) not in _FLOATS
    ):
        raise SubspanError(f"{path} is not what subspan saves: its base cannot be read")
    package, _, name = base["class"].rpartition(".")
    cls = getattr(transformers, name, None) if package == "transformers" else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise SubspanError(
            f"{path} is of a {base['class']}, which transformers {transformers.__version__} does "
            "not have: install another version, or give load the network"
        )
    if "folder" in base and not Path(where).is_dir():
        raise SubspanError(
            f"{path} was trained from the network in {where}, and there is no such folder here: "
            "give load the network"
        )
    return cls, where, base.get("revision") if "repo" in base else None


def _configure(config: Any, changes: Mapping[str, Any]) -> None:
    """Change a base's configuration into that of the network that was trained.

    Only what the base's own configuration has is set: a file can say nothing else here.
    """
    known = config.to_dict().keys() - APART
    for key, value in changes.items():
        if key == "num_labels":
            config.num_labels = value
        elif key == "id2label":
            config.id2label = {int(n): label for n, label in value.items()}
            config.label2id = {label: n for n, label in config.id2label.items()}
        elif key in known and not key.startswith("_"):
            before = getattr(config, key)
            if hasattr(before, "to_dict") and isinstance(value, dict):
                _configure(before, value)  # of a part
            else:
                setattr(config, key, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Transformers from reporting a new head, whose values the file has."""
    logging = need("transformers").utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
