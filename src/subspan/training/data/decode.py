"""From whatever ``datasets.load_dataset`` reads to tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subspan.errors import SubspanError
from subspan.training.data import parts, pixels, tables
from subspan.training.data.images import RawData, Split
from subspan.training.data.order import TEST, hold_out
from subspan.training.data.pixels import Size

REMEDY = ", or of a folder of images make a sub-folder for each class, two at least"
EXPECTED = (
    "a folder with one sub-folder of images per class, parquet files, or another layout that "
    "datasets.load_dataset knows"
)


def read(
    path: str,
    *,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    size: Size | None = None,
) -> RawData:
    """Read and decode an image classification set, of a folder, or of the Hub at a revision.

    It is streamed: ``datasets`` then leaves no copy of it in a cache of its own. Columns that are
    not named are found, and images without a size for all stay as they are.

    Raises:
        SubspanError: the set cannot be read, or is not one of equally large, labelled images.
    """
    import datasets

    found, features, left_out = tables.open_set(path, revision, "images", EXPECTED)
    images = tables.column("image", path, features, image_column, REMEDY)
    labels = tables.column("label", path, features, label_column, REMEDY)
    if not _may_hold_images(features[images]) or images == labels:
        columns = ", ".join(
            f"{name} ({tables.kind(feature)})" for name, feature in features.items()
        )
        raise SubspanError(
            f"{path} must have a column of images and another of labels, got {images!r} and "
            f"{labels!r} of {columns}: name the right ones with --image-column and --label-column"
        )
    train, test, notes = parts.choose(path, list(found))

    arrays: list[list[np.ndarray]] = []
    values: list[list[Any]] = []
    looks: _Looks = {}
    for name in [train, test] if test else [train]:
        rows = found[name].select_columns([images, labels])
        rows = rows.cast_column(images, datasets.Image(decode=False))
        pairs = ((row[images], row[labels]) for row in rows)
        part_arrays, part_values = _decode(path, name, pairs, size, looks)
        arrays.append(part_arrays)
        values.append(part_values)

    stacked = _stack(arrays)
    encoded, known = tables.encode(path, labels, features[labels], values)
    splits = [Split(*pair) for pair in zip(stacked, encoded, strict=True)]
    train_split, test_split = splits if test else hold_out(splits[0], 1 / 6, seed=0, stream=TEST)
    numbers = all(str(name).isdecimal() for name in known)
    [depth] = looks["depth"]
    notes += left_out + _notes_of_levels(arrays, train_split, depth)
    return RawData(
        train=train_split,
        test=test_split,
        classes=len(known),
        names=() if numbers else known,
        depth=depth,
        notes=notes,
        outside=revision is None and "outside" in looks,
    )


def _may_hold_images(feature: Any) -> bool:
    """Images, encoded files or paths of them; a format without types, as CSV, has none."""
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & feature.keys())
    encoded = ("string", "large_string", "binary", "large_binary")
    return tables.kind(feature) in ("Image", *encoded)


def parse_size(resize: int | str) -> Size:
    """Height and width, of "28x32", or of one number for both; anything else is refused.

    So are more than four digits, which are larger than any picture and would fill the memory.
    """
    found = re.fullmatch(r"0*([1-9]\d{0,3})(?:x0*([1-9]\d{0,3}))?", str(resize))
    if found is None:
        raise SubspanError(
            "resize must be a number of pixels up to 9999, or height x width as in 28x32, got "
            f"{resize!r}"
        )
    return int(found[1]), int(found[2] or found[1])


# "size" or "depth": each that was seen, and in which file; "outside": files that are not the set's.
_Looks = dict[str, dict[str, str]]


def _decode(
    path: str,
    part: str,
    pairs: Iterable[tuple[dict[str, Any], Any]],
    size: Size | None,
    looks: _Looks,
) -> tuple[list[np.ndarray], list[Any]]:
    """Decode one part: images of ``size`` that are alike in what ``looks`` holds, and labels."""
    arrays, values = [], []
    with tables.readable(path, "images", EXPECTED):
        for row, (encoded, value) in enumerate(pairs, start=1):
            name = (encoded or {}).get("path") or f"in row {row} of {part}"
            try:
                array = pixels.read(_content(encoded), size)
            except Exception as error:  # of a damaged file Pillow raises any
                cause = "" if isinstance(error, SubspanError) else f"{type(error).__name__}: "
                raise SubspanError(
                    f"cannot read the image {name} of {path} ({cause}{error}): "
                    "replace it, or leave it out"
                ) from error
            # At once: large photographs would fill the memory.
            sizes = looks.setdefault("size", {})
            sizes.setdefault("{}x{}".format(*array.shape[-2:]), name)
            if len(sizes) > 1:
                raise SubspanError(
                    f"all images of {path} must have one size, found {' and '.join(sizes)} "
                    "(height x width): give the one to resize them to, as in --resize 32 or "
                    "--resize 28x32"
                )
            depths = looks.setdefault("depth", {})
            depths.setdefault(pixels.DEPTHS[array.dtype.name], name)
            if len(depths) > 1:
                (one, first), (other, second) = depths.items()
                raise SubspanError(
                    f"all images of {path} must have one depth, for a level means another "
                    f"brightness in each: found {one} ({first}) and {other} ({second}): save them "
                    "alike"
                )
            if encoded["bytes"] is None and _is_outside(path, encoded["path"]):
                looks.setdefault("outside", {})[name] = part
            arrays.append(array)
            values.append(value)
    if not arrays:
        raise SubspanError(f"the part {part!r} of {path} must have images, got none: add some")
    return arrays, values


def _content(encoded: dict[str, Any]) -> bytes:
    """Return the bytes of an image file: in the row, on the disk, in an archive or on the Hub."""
    from datasets.utils.file_utils import xopen

    if encoded["bytes"] is not None:
        return encoded["bytes"]
    path = encoded["path"]
    if "://" not in path:
        return Path(path).read_bytes()
    with xopen(path, "rb") as file:
        return file.read()


def _is_outside(folder: str, file: str) -> bool:
    """Return whether a file is none of a folder's; those of the Hub have a revision."""
    return "://" not in file and Path(folder) not in Path(os.path.abspath(file)).parents


def _stack(parts: list[list[np.ndarray]]) -> list[Tensor]:
    """Each part as (N, C, H, W), uint8, or float32 where levels are deeper than 8 bits.

    Grey images among colour ones become RGB, and opaque ones among transparent ones get an opacity.
    """
    channels = {_channels(array) for part in parts for array in part}
    colours, alpha = 3 if channels & {3, 4} else 1, bool(channels & {2, 4})
    first = parts[0][0]
    dtype, opaque = (np.uint8, 0xFF) if first.dtype == np.uint8 else (np.float32, 0xFFFF)
    shape = (colours + alpha, *first.shape[-2:])
    stacked = [np.full((len(part), *shape), opaque, dtype) for part in parts]
    for images, part in zip(stacked, parts, strict=True):
        for image, array in zip(images, part, strict=True):
            if _channels(array) in (2, 4):
                image[:colours], image[colours] = array[:-1], array[-1]
            else:
                image[:colours] = array
    return [torch.from_numpy(images) for images in stacked]


def _channels(array: np.ndarray) -> int:
    return 1 if array.ndim == 2 else len(array)


def _notes_of_levels(parts: list[list[np.ndarray]], train: Split, depth: str) -> tuple[str, ...]:
    """Describe images that are not plain ones of 8 bits."""
    notes = []
    transparent = sum(_channels(array) in (2, 4) for part in parts for array in part)
    if transparent:
        channels = train.images.shape[1]
        notes.append(
            f"transparent images: {transparent} of {sum(map(len, parts))}; opacity is channel "
            f"{channels} of {channels}, and colours are as they are beneath it"
        )
    if depth != "8 bits":
        low, high = float(train.images.min()), float(train.images.max())
        notes.append(
            f"images of {depth}: their levels, {low:g} to {high:g} in the training part, are kept "
            "as they are, in float32"
        )
    return tuple(notes)
