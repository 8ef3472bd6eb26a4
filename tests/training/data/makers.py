"""Small image sets, made on the fly."""

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from subspan.training.data import Split


def encoded(value, mode="L", size=(4, 3)):
    """A PNG of one colour; ``size`` is width and height."""
    file = io.BytesIO()
    Image.new(mode, size, value).save(file, "PNG")
    return file.getvalue()


def wide_png(levels, exif=b""):
    """A PNG of 16 bits, which Pillow cannot write with colours: (H, W, C) of integers."""
    height, width, channels = levels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    # Every second row is given as differences from the row above, byte by byte.
    rows = levels.astype(">u2").view(np.uint8).reshape(height, -1)
    lines = [b"\0" + row.tobytes() for row in rows]
    lines[1::2] = [b"\2" + (b - a).tobytes() for a, b in zip(rows[::2], rows[1::2], strict=False)]
    told = {b"eXIf": exif} if exif else {}
    chunks = {b"IHDR": header, **told, b"IDAT": zlib.compress(b"".join(lines)), b"IEND": b""}
    checked = [
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


def tiff(levels, more=(), *, rows=2**15, order="<"):
    """A TIFF of levels (H, W, C) of any type, in strips of ``rows``, with ``more`` tags."""
    height, width, channels = levels.shape
    strips = [levels[i : i + rows] for i in range(0, height, rows)]
    strips = [strip.astype(strip.dtype.newbyteorder(order)).tobytes() for strip in strips]
    starts = 8 + np.cumsum([0, *map(len, strips)])
    tags = {
        256: width,
        257: height,
        258: [8 * levels.itemsize] * channels,
        259: 1,
        262: 2 if channels > 1 else 1,
        273: starts[:-1].tolist(),
        277: channels,
        278: rows,
        279: list(map(len, strips)),
        **dict(more),
    }
    body, entries = b"".join(strips), b""
    for number, values in sorted(tags.items()):
        wide = number in (273, 279)
        packed = np.array(values, f"{order}u{4 if wide else 2}").tobytes()
        entries += struct.pack(f"{order}HHI", number, 4 if wide else 3, np.size(values))
        if len(packed) > 4:
            entries += struct.pack(f"{order}I", 8 + len(body))
            body += packed
        else:
            entries += packed.ljust(4, b"\0")
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def folder_of(folder, images, suffix="png"):
    """Two parts of two classes; ``images(part, label)`` gives images, or the bytes of files."""
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i, image in enumerate(images(part, label)):
                file = folder / part / label / f"{i:02}.{suffix}"
                if isinstance(image, bytes):
                    file.write_bytes(image)
                else:
                    image.save(file)
    return folder


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
