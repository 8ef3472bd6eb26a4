"""From whatever ``datasets.load_dataset`` reads to tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from subspan.errors import SubspanError, unknown
from subspan.lab.data.images import RawData, Split
from subspan.lab.data.order import TEST, hold_out

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEST_SPLITS = ("test", "validation", "valid", "val", "dev")

Size = tuple[int, int]  # height and width


def read(
    path: str,
    *,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    size: Size | None = None,
) -> RawData:
    """Read and decode an image classification set.

    It is streamed: ``datasets`` then leaves no copy of it in a cache of its own.

    Args:
        path: a local folder or a name on the Hub.
        revision: the Hub's commit; None for a local folder.
        image_column: where the images are; None finds it.
        label_column: where the labels are; None finds it.
        size: what every image is resized to; None leaves them as they are.

    Raises:
        SubspanError: the set cannot be read, or is not one of equally large, labelled images.
    """
    import datasets

    datasets.disable_progress_bars()
    with _readable(path):
        parts = datasets.load_dataset(path, revision=revision, streaming=True)
        features = next(iter(parts.values())).features
        if features is None:  # a format without types, such as text
            features = dict.fromkeys(next(iter(next(iter(parts.values()))), {}))
    images = _column("image", path, features, datasets.Image, IMAGE_COLUMNS, image_column)
    labels = _column("label", path, features, datasets.ClassLabel, LABEL_COLUMNS, label_column)
    if not _may_hold_images(features[images]) or images == labels:
        found = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
        raise SubspanError(
            f"{path} must have a column of images and another of labels, got {images!r} and "
            f"{labels!r} of {found}: name the right ones with --image-column and --label-column"
        )
    names = getattr(features[labels], "names", None)
    train, test, notes = _choose_parts(path, list(parts))

    pixels: list[list[np.ndarray]] = []
    values: list[list[Any]] = []
    for name in [train, test] if test else [train]:
        rows = parts[name].select_columns([images, labels])
        rows = rows.cast_column(images, datasets.Image(decode=False))
        like = pixels[0][0].shape[-2:] if pixels else None
        pairs = ((row[images], row[labels]) for row in rows)
        arrays, part_values = _decode(path, name, pairs, size, like)
        pixels.append(arrays)
        values.append(part_values)

    stacked = _stack(pixels)
    encoded, known = _encode(path, values, names)
    splits = [Split(*pair) for pair in zip(stacked, encoded, strict=True)]
    train_split, test_split = splits if test else hold_out(splits[0], 1 / 6, seed=0, stream=TEST)
    numbers = all(str(name).isdecimal() for name in known)
    return RawData(train_split, test_split, len(known), notes, () if numbers else known)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn what ``datasets`` and its readers raise, which is of many types, into one sentence."""
    try:
        yield
    except SubspanError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise SubspanError(
            f"cannot read {path} as images ({cause}): expected a folder with one sub-folder of "
            "images per class, parquet files, or another layout that datasets.load_dataset knows"
        ) from error


def _column(
    kind: str,
    path: str,
    features: dict[str, Any],
    feature_type: type,
    usual: Sequence[str],
    asked: str | None,
) -> str:
    """The column asked for; else the only one of the type; else one by its usual name."""
    if asked is not None:
        if asked not in features:
            raise unknown(f"{kind} column of {path}", asked, features)
        return asked
    typed = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    if len(typed) == 1:
        return typed[0]
    for name in usual:
        if name in (typed or features):
            return name
    raise SubspanError(
        f"{path} has no column that is plainly the {kind}: expected one {feature_type.__name__}, "
        f"or one called {' or '.join(usual)}, found {', '.join(features)}: name the right one "
        f"with --{kind}-column, or of a folder of images make a sub-folder for each class, two at "
        "least"
    )


def _may_hold_images(feature: Any) -> bool:
    """Images, encoded files or paths of them; None is a column that does not say what it is."""
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & feature.keys())
    encoded = ("string", "large_string", "binary", "large_binary")
    return feature is None or _kind(feature) in ("Image", *encoded)


def _kind(feature: Any) -> str:
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def _choose_parts(path: str, names: list[str]) -> tuple[str, str | None, tuple[str, ...]]:
    """Which part is for training, which for the test (None: none is), and what to say of it."""
    if "train" not in names and len(names) > 1:
        raise SubspanError(
            f"{path} must have a part 'train', or one part only, found {', '.join(names)}"
        )
    train = "train" if "train" in names else names[0]
    test = next((name for name in TEST_SPLITS if name in names and name != train), None)
    if test is None:
        note = "no test part: 1/6 of the images, the same for every seed of a run, serve as it"
        return train, None, (note,)
    if test != "test":
        return train, test, (f"no test part: the part {test!r} serves as it",)
    return train, test, ()


def parse_size(resize: int | str) -> Size:
    """Height and width, of "28x32", or of one number for both.

    Raises:
        SubspanError: for anything else.
    """
    found = re.fullmatch(r"0*([1-9]\d*)(?:x0*([1-9]\d*))?", str(resize))
    if found is None:
        raise SubspanError(
            f"resize must be a number of pixels, or height x width as in 28x32, got {resize!r}"
        )
    return int(found[1]), int(found[2] or found[1])


def to_array(image: Picture, size: Size | None = None) -> np.ndarray:
    """Decode one image: uint8 (H, W) if it is grey, else RGB as (3, H, W).

    Args:
        image: of any mode.
        size: what it is resized to, whatever its shape; without steps where it becomes smaller.
    """
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them
        plain = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    else:
        plain = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if size:
        # Each pixel is the mean of all that it covers: Pillow's filters grow with the step.
        plain = plain.resize(size[::-1], Image.Resampling.BILINEAR)
    array = np.asarray(plain)
    return array if array.ndim == 2 else array.transpose(2, 0, 1)


def _decode(
    path: str, part: str, pairs: Iterable[tuple[dict[str, Any], Any]], size: Size | None,
    like: tuple[int, ...] | None,
) -> tuple[list[np.ndarray], list[Any]]:  # fmt: skip
    """One part's images, resized to ``size``, else all ``like`` the first; and its labels."""
    import datasets

    arrays, values = [], []
    decoder = datasets.Image()
    with _readable(path):
        for row, (encoded, value) in enumerate(pairs, start=1):
            try:
                array = to_array(decoder.decode_example(encoded), size)
            except Exception as error:  # of a damaged file Pillow raises any
                name = (encoded or {}).get("path") or f"in row {row} of {part}"
                raise SubspanError(
                    f"cannot read the image {name} of {path} ({type(error).__name__}: {error}): "
                    "replace it, or leave it out"
                ) from error
            like = like or array.shape[-2:]
            if array.shape[-2:] != like:  # at once: large photographs would fill the memory
                raise SubspanError(
                    f"all images of {path} must have one size, found {like[0]}x{like[1]} and "
                    f"{array.shape[-2]}x{array.shape[-1]} (height x width): give the one to "
                    "resize them to, as in --resize 32 or --resize 28x32"
                )
            arrays.append(array)
            values.append(value)
    if not arrays:
        raise SubspanError(f"the part {part!r} of {path} must have images, got none: add some")
    return arrays, values


def _stack(parts: list[list[np.ndarray]]) -> list[Tensor]:
    """Each part as uint8 (N, C, H, W); grey images among colour ones become RGB."""
    channels = 3 if any(array.ndim == 3 for part in parts for array in part) else 1
    size = parts[0][0].shape[-2:]
    stacked = [np.empty((len(part), channels, *size), np.uint8) for part in parts]
    for images, part in zip(stacked, parts, strict=True):
        for i, array in enumerate(part):
            images[i] = array
    return [torch.from_numpy(images) for images in stacked]


def _encode(
    path: str, parts: list[list[Any]], names: Sequence[str] | None
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Each part's labels as int64 (N,), and the names of the classes.

    Without known ``names``, the distinct values (integers or strings) are numbered in order.
    """
    every = [value for part in parts for value in part]
    types = {type(value) for value in every}
    if types not in ({int}, {bool}, {str}):
        found = ", ".join(sorted(kind.__name__ for kind in types))
        raise SubspanError(
            f"labels of {path} must all be integers or all strings, got {found}: name another "
            "column with --label-column, or leave out images without a label"
        )
    known = range(len(names)) if names else sorted(set(every))
    number = {value: i for i, value in enumerate(known)}
    if unlabelled := set(every) - set(number):
        raise SubspanError(
            f"labels of {path} must be in [0, {len(known)}), got {min(unlabelled)}: "
            "leave out images without a label"
        )
    encoded = [torch.tensor([number[value] for value in part]) for part in parts]
    return encoded, tuple(map(str, names or known))
