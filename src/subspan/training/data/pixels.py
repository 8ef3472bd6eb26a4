"""From an image file to the levels that it holds: none is lost, or the image is refused."""

from __future__ import annotations

import re
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from subspan.errors import SubspanError

Size = tuple[int, int]  # height and width

# What a level means to an image, by the type of its array.
DEPTHS = {"uint8": "8 bits", "uint16": "16 bits", "int32": "32 bits", "float32": "floating point"}
EXACT = 2**24  # float32, in which networks compute, tells integers up to here apart

_WITH_ALPHA = {"LA": "LA", "La": "LA", "PA": "RGBA", "RGBA": "RGBA", "RGBa": "RGBA"}
_OF_SEVERAL = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")  # JPEGs of cameras add previews
_ORIENTATION, _SAMPLE_FORMAT, _UNSIGNED, _SIGNED = 0x0112, 339, 1, 2


def read(content: bytes, size: Size | None = None) -> np.ndarray:
    """Return the levels of an image file, see `to_array`.

    Raises:
        SubspanError: Pillow would read other levels than the file has, or it has several images.
        Exception: of any type, from Pillow, where the file is damaged.
    """
    image: Any = Image.open(BytesIO(content))
    if image.format in _OF_SEVERAL and (count := getattr(image, "n_frames", 1)) > 1:
        raise SubspanError(
            f"it has {count} images, an animation or pages, and a sample is one: save each of them "
            "in a file of its own"
        )
    wide = _wide_colours(image, content)
    if wide is not None:
        return _finish(wide, size)
    sign = image.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] if image.format == "TIFF" else None
    image = _loaded(image)
    lowest = np.asarray(image).min() if image.mode == "I" else 0
    if (image.mode, sign) == ("L", _SIGNED) or (lowest < 0 and sign == _UNSIGNED):
        raise SubspanError("Pillow misreads the sign of its numbers: save it in another format")
    return to_array(image, size)


def to_array(image: Image.Image, size: Size | None = None) -> np.ndarray:
    """Return the levels of one image of any mode.

    It is resized to ``size``, whatever its shape; without steps where it becomes smaller. Levels
    are (H, W) if it is grey, else RGB as (3, H, W); where it is transparent, its opacity is one
    channel more: (2, H, W) or (4, H, W). They are of a type in `DEPTHS`: levels that float32 does
    not tell apart are refused, as are some that are no numbers.
    """
    mode = image.mode
    if mode.startswith("I;16"):
        return _finish(np.asarray(image).astype(np.uint16), size)
    if mode in ("I", "F"):
        return _finish(np.asarray(image), size)
    if mode in _WITH_ALPHA or "transparency" in image.info:
        plain = image.convert(_WITH_ALPHA.get(mode, "LA" if mode in ("1", "L") else "RGBA"))
    else:
        plain = image.convert("L" if mode in ("1", "L") else "RGB")
    return _finish(np.asarray(plain), size)


def _finish(array: np.ndarray, size: Size | None) -> np.ndarray:
    """Channels first, resized, without an opacity that hides nothing; refused if not exact."""
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise SubspanError("it has pixels that are no finite numbers")
    if array.dtype == np.int32 and max(int(array.max()), -int(array.min())) > EXACT:
        raise SubspanError(f"float32 does not tell apart its levels, which go beyond {EXACT:,}")
    if array.ndim == 2:
        return _resized(array, size)
    channels = array.transpose(2, 0, 1)
    if len(channels) in (2, 4) and (channels[-1] == np.iinfo(array.dtype).max).all():
        channels = channels[:-1]
    if size:
        channels = np.stack([_resized(channel, size) for channel in channels])
    return channels[0] if len(channels) == 1 else channels


def _resized(channel: np.ndarray, size: Size | None) -> np.ndarray:
    """One channel, each pixel the mean of all that it covers: Pillow's filters grow with the step.

    An opacity is no factor here: channels that are weighed by it would lose what is transparent.
    """
    if not size:
        return channel
    plain = Image.fromarray(channel.astype(np.int32) if channel.dtype == np.uint16 else channel)
    resized = plain.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized).astype(channel.dtype)


def _loaded(image: Any) -> Image.Image:
    """Return the pixels, turned as the camera was held: as ``datasets`` decodes an image."""
    image.load()
    turned = image.getexif().get(_ORIENTATION) is not None
    return ImageOps.exif_transpose(image) if turned else image


def _wide_colours(image: Any, content: bytes) -> np.ndarray | None:
    """Colours of 16 bits, uint16 (H, W, C); None where the image has none.

    Pillow has no mode for them: it reads the high byte of each level. Told that the bytes come in
    the other order, it reads the low one.

    Raises:
        SubspanError: the image has such colours in a layout that cannot be read in this way.
    """
    if image.mode not in ("L", "LA", "RGB", "RGBA", "RGBX", "CMYK"):
        return None
    kinds = {_raw(tile) for tile in image.tile}
    found = [re.fullmatch(r"(\w+);16([BLN])", kind) for kind in kinds]
    if not any(found) and not _reduced(image, content):
        return None
    if len(kinds) > 1 or not found[0] or found[0][1] not in ("LA", "RGB", "RGBA", "RGBX"):
        raise SubspanError(
            "Pillow reads only 8 bits of its deeper colours: save it with 8 bits a channel, or as "
            "PNG"
        )
    family, order = found[0].groups()
    if family == "LA":  # as four bytes: both of the level, and both of the opacity
        four = np.asarray(_as(image, "RGBA")).astype(np.uint16)
        return four[..., ::2] << 8 | four[..., 1::2]
    low = _as(Image.open(BytesIO(content)), f"{family};16{'L' if order == 'B' else 'B'}")
    high = np.asarray(_loaded(image)).astype(np.uint16)
    return high << 8 | np.asarray(low)


def _raw(tile: Any) -> str:
    """Return the layout in which Pillow is about to read a tile's pixels, such as "RGB;16B"."""
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _as(image: Any, raw: str) -> Image.Image:
    """Return the image's pixels, read as if the file had them in another layout."""
    tiles = []
    for tile in image.tile:
        arguments = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
        tiles.append(tile._replace(args=arguments))
    image.tile = tiles
    return _loaded(image)


def _reduced(image: Any, content: bytes) -> bool:
    """Return whether a decoder is about to map deeper levels to 8 bits by itself."""
    if image.format == "JPEG2000":  # the depth of the first channel, in the marker SIZ
        start = content.find(b"\xff\x4f\xff\x51")
        return start >= 0 and (content[start + 42] & 0x7F) + 1 > 8
    if image.format == "PPM":
        return any(tile[0].startswith("ppm") and tile[3][1] > 0xFF for tile in image.tile)
    return any(tile[0] == "SGI16" for tile in image.tile)
