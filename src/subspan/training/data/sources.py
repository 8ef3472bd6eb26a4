"""The sources of data sets: a name leads to a folder, the Hub, or scikit-learn."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subspan.errors import SubspanError, unknown
from subspan.files import expanded
from subspan.training.data import cache, decode, pixels
from subspan.training.data.cache import Content
from subspan.training.data.images import ImageData, RawData, Split, statistics
from subspan.training.data.order import TEST, VALIDATION, hold_out

HUB = {
    "cifar10": "uoft-cs/cifar10",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "mnist": "ylecun/mnist",
}
FORMAT = 5  # of the decoded tensors: a change of what decoding gives must change it


def names() -> list[str]:
    """Short names that `load` knows; it takes a folder and any name on the Hub besides."""
    return sorted(["digits", *HUB])


def load(
    name: str,
    *,
    validation: float = 1 / 12,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    resize: int | str | None = None,
) -> ImageData:
    """Load an image classification set.

    The name is, in this order: a sub-folder of ``$SUBSPAN_DATA``, one of `names`, a local folder,
    or a set on the Hugging Face Hub. Folders and Hub sets may have any layout that
    ``datasets.load_dataset`` reads. A set without a test part gets one, which ``notes`` say: its
    validation part if it has one (which is not used otherwise), else 1/6 of its images.

    The first load decodes the set and keeps its tensors (see `cache.fetch`). A folder is decoded
    again when a file in it changes; a Hub set stays at the revision first loaded, which its
    ``notes`` tell, until its cache file is deleted, and so needs no network again.

    Args:
        name: which set.
        validation: share of the set's training part that is held out for choices, in [0, 1).
        seed: of the draw of that share.
        image_column: where the images are, if it cannot be told from the columns' types and names.
        label_column: where the labels are, likewise.
        resize: what all images are resized to while they are decoded: 32, or "28x32", height x
            width. None leaves them as they are; they must then have one size.

    Raises:
        SubspanError: there is no such set, it cannot be reached or read, or it is not one of
            equally large, labelled images.
    """
    size = None if resize is None else decode.parse_size(resize)
    identity, read = _find(name, image_column, label_column, size)
    raw = cache.fetch_set(name, FORMAT, identity, RawData, read)
    train, held_out = hold_out(raw.train, validation, seed=seed, stream=VALIDATION)
    mean, std = statistics(train.images)
    channels, height, width = train.images.shape[1:]
    return ImageData(
        **vars(raw) | {"train": train},
        name=name,
        image_shape=(channels, height, width),
        validation=held_out,
        mean=mean,
        std=std,
    )


def _find(
    name: str, image_column: str | None, label_column: str | None, size: pixels.Size | None
) -> tuple[list[Any], Callable[[], RawData]]:
    """Find a set: JSON that identifies its content, and the function that reads it."""
    if not name:
        raise unknown("data set", name, names())
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    resized = [] if size is None else [size]
    if name == "digits" and local_folder(name) is None:
        for column, asked in columns.items():
            if asked is not None:
                raise SubspanError(f"digits has no columns, got {column} {asked!r}: leave it out")
        return [name, *resized], partial(_read_digits, size)
    place, read = find(name, HUB.get(name, name), partial(decode.read, size=size, **columns))
    return [*place, columns, *resized], read


def find(
    name: str, hub_name: str, read: Callable[..., Content]
) -> tuple[list[Any], Callable[[], Content]]:
    """Find a folder, or else a set on the Hub: JSON that identifies its content, and its reader.

    ``read`` gets a path, and of a set on the Hub its ``revision``.
    """
    if folder := local_folder(name):
        return contents(folder), partial(read, str(folder))
    return [hub_name], partial(_read_newest, name, hub_name, read)


def local_folder(name: str) -> Path | None:
    """Return the folder that a name stands for, if it is one."""
    if data := os.environ.get("SUBSPAN_DATA"):
        folder = expanded(data) / name
        if re.fullmatch(r"\w[\w.-]*", name) and folder.is_dir():
            return folder.resolve()
    if name in names():
        return None
    folder = expanded(name)
    if folder.is_dir():
        return folder.resolve()
    if name[0] in "./~" or name.count("/") > 1:  # no name on the Hub looks like this
        raise SubspanError(f"there is no data folder {name}: give the path of one that exists")
    return None


def contents(folder: Path) -> list[Any]:
    """Return the folder's path, and the name, size and time of change of every file in it.

    Links to folders, which ``datasets`` passes over, are refused.
    """
    files = []
    for path in sorted(folder.rglob("[!.]*")):
        if path.is_file():
            stat = path.stat()
            files.append((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
        elif path.is_dir() and path.is_symlink():
            raise SubspanError(
                f"{path} is a link to a folder, and what lies behind it would be left out: put the "
                "folder itself there, or links to its files"
            )
    return [str(folder), files]


def _read_digits(size: pixels.Size | None) -> RawData:
    """Return the 1,797 digits of 8x8 pixels in 16 grey levels that come with scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = (digits.images * (255 / 16)).round().astype("uint8")
    arrays = [pixels.to_array(Image.fromarray(image), size) for image in levels]
    images = torch.from_numpy(np.stack(arrays)).unsqueeze(1)
    every = Split(images, torch.from_numpy(digits.target).long())
    train, test = hold_out(every, 0.2, seed=0, stream=TEST)
    return RawData(train, test, classes=10)


def _read_newest(name: str, hub_name: str, read: Callable[..., Content]) -> Content:
    """Read the newest revision of a set on the Hub, and note which it is."""
    revision = _newest_revision(name, hub_name)
    raw = read(hub_name, revision=revision)
    return replace(raw, notes=(f"{hub_name} at revision {revision}", *raw.notes))


def _newest_revision(name: str, hub_name: str) -> str:
    """Return the commit of a set on the Hub; refuse a name that it has not, or does not give."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return str(HfApi().dataset_info(hub_name, timeout=10).sha)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise _not_on_hub(name, "it has no such set") from error
    except Exception as error:  # no network: the client's versions raise other types
        raise _not_on_hub(name, f"{type(error).__name__}: {error}") from error


def _not_on_hub(name: str, cause: str) -> SubspanError:
    message = f"no folder {name!r} was found, and the Hugging Face Hub gave no data set ({cause})"
    if "/" in name:
        return SubspanError(f"{message}: check the name and the network, or give a local folder")
    remedy = f"give a local folder, or set SUBSPAN_DATA to a folder with {name}/ in it"
    if there := os.environ.get("SUBSPAN_DATA"):
        remedy += f", which {there} is not"
    nearest = "" if name in names() else f"{unknown('data set', name, names())}; "
    return SubspanError(f"{nearest}{message}: {remedy}")
