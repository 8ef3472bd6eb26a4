"""Small image sets, made on the fly."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from subspan.lab.data import Split


def encoded(value, mode="L", size=(4, 3)):
    """A PNG of one colour; ``size`` is width and height."""
    file = io.BytesIO()
    Image.new(mode, size, value).save(file, "PNG")
    return file.getvalue()


def image_folder(folder, *, parts=("train", "test"), count=12, mode="L", size=(4, 3)):
    """Classes cat and dog; image i of a class has level 20 i, or colour (20 i, 1, 2)."""
    for part in parts:
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                value = 20 * i if mode == "L" else (20 * i, 1, 2)
                (folder / part / label / f"{i:02}.png").write_bytes(encoded(value, mode, size))
    return folder


def parquet_folder(folder, *, parts=("train", "test"), **columns):
    folder.mkdir()
    for part in parts:
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")
    return folder


def as_structs(images):
    return [{"bytes": image, "path": None} for image in images]


def numbered(size):
    """A split whose sample i has label i and pixels i mod 256."""
    labels = torch.arange(size)
    return Split(labels.to(torch.uint8).reshape(-1, 1, 1, 1).repeat(1, 1, 2, 2), labels)
