"""Levels of images of every mode and depth: none is lost without a word."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from subspan.errors import SubspanError
from subspan.training import data
from subspan.training.data import pixels
from tests.training.data.makers import encoded, folder_of, image_folder, tiff, wide_png

RNG = np.random.default_rng(0)


def file_of(image, kind="TIFF", **how):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


# ---- one image -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "value", "expected", "dtype"),
    [
        ("1", 1, 255, "uint8"),
        ("L", 7, 7, "uint8"),
        ("LA", (7, 255), 7, "uint8"),
        ("LA", (7, 0), [7, 0], "uint8"),
        ("La", (7, 255), 7, "uint8"),
        ("I;16", 7 * 256 + 255, 7 * 256 + 255, "uint16"),
        ("I;16L", 7 * 256 + 255, 7 * 256 + 255, "uint16"),
        ("I;16B", 7 * 256 + 255, 7 * 256 + 255, "uint16"),
        ("I", -70_000, -70_000, "int32"),
        ("F", -0.25, -0.25, "float32"),
        ("RGB", (1, 2, 3), [1, 2, 3], "uint8"),
        ("RGBX", (1, 2, 3, 0), [1, 2, 3], "uint8"),
        ("RGBA", (1, 2, 3, 255), [1, 2, 3], "uint8"),
        ("RGBA", (1, 2, 3, 0), [1, 2, 3, 0], "uint8"),
        ("P", 0, [0, 0, 0], "uint8"),
        ("PA", (0, 9), [0, 0, 0, 9], "uint8"),
        ("CMYK", (255, 0, 0, 0), [0, 255, 255], "uint8"),
        ("YCbCr", (100, 128, 128), [100, 100, 100], "uint8"),
        ("HSV", (0, 0, 100), [100, 100, 100], "uint8"),
        ("LAB", (137, 128, 128), [128, 128, 128], "uint8"),
    ],
)
def test_modes(mode, value, expected, dtype):
    array = pixels.to_array(Image.new(mode, (4, 3), value))
    channels = (len(expected),) if isinstance(expected, list) else ()
    assert (array.shape, array.dtype) == ((*channels, 3, 4), dtype)
    assert array[..., 0, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_one_colour_may_be_called_transparent(mode):
    """A GIF has this, and a PNG without an alpha channel."""
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    key = image.getpixel((0, 0))
    content = file_of(image, "PNG", transparency=key)
    opacity = pixels.read(content)[-1]
    assert opacity.tolist() == [[0, 255]]
    assert pixels.read(file_of(image, "PNG")).shape == ((1, 2) if mode in "1L" else (3, 1, 2))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pngs_of_16_bits(channels):
    levels = RNG.integers(0, 2**16, (5, 6, channels))
    array = pixels.read(wide_png(levels))
    assert array.dtype == "uint16"
    assert np.array_equal(np.atleast_3d(array.T).T, levels.transpose(2, 0, 1))
    if channels in (2, 4):
        levels[..., -1] = 0xFFFF
        assert pixels.read(wide_png(levels)).shape == ((5, 6) if channels == 2 else (3, 5, 6))


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_16_bits(order):
    levels = RNG.integers(0, 2**16, (5, 6, 3), np.uint16)
    array = pixels.read(tiff(levels, rows=2, order=order))
    assert np.array_equal(array, levels.transpose(2, 0, 1))


def test_colours_that_pillow_would_reduce():
    content = b"P6 2 1 4095 " + np.array([[5, 6, 7], [8, 9, 10]], ">u2").tobytes()
    with pytest.raises(SubspanError, match="Pillow reads only 8 bits of its deeper colours: save"):
        pixels.read(content)
    assert pixels.read(b"P6 1 1 255 " + bytes([5, 6, 7])).tolist() == [[[5]], [[6]], [[7]]]
    grey = pixels.read(b"P5 2 1 4095 " + np.array([5, 4095], ">u2").tobytes())
    assert grey[0, 1] == 65535
    file = io.BytesIO()
    Image.new("L", (2, 2), 7).save(file, "SGI", bpc=2)
    with pytest.raises(SubspanError, match="Pillow reads only 8 bits of its deeper colours"):
        pixels.read(file.getvalue())


def test_the_depth_of_a_jpeg_2000():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, "JPEG2000", irreversible=False)
    content = bytearray(file.getvalue())
    assert pixels.read(bytes(content))[:, 0, 0].tolist() == [1, 2, 3]
    content[content.index(b"\xff\x4f\xff\x51") + 42] = 15
    with pytest.raises(SubspanError, match="Pillow reads only 8 bits of its deeper colours"):
        pixels.read(bytes(content))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_images_after_the_first_are_not_lost(kind):
    first, second = (Image.new("L", (8, 8), value) for value in (0, 200))
    assert pixels.read(file_of(first, kind)).shape[-2:] == (8, 8)
    several = file_of(first, kind, save_all=True, append_images=[second, first])
    with pytest.raises(SubspanError, match="it has 3 images, an animation or pages, and a sample"):
        pixels.read(several)


def test_signs_that_pillow_misreads():
    """Pixels have 32 bits without a sign, or 8 with one."""
    levels = np.array([[[5], [6]]])
    assert pixels.read(tiff(levels.astype(np.uint32))).tolist() == [[5, 6]]
    for misread in ((levels + 2**31).astype(np.uint32),), (levels.astype(np.int8), {339: 2}):
        with pytest.raises(SubspanError, match="Pillow misreads the sign of its numbers"):
            pixels.read(tiff(*misread))


def test_signed_numbers_that_pillow_reads():
    levels = np.array([[[-5], [6]]])
    for dtype in (np.int16, np.int32):
        assert pixels.read(tiff(levels.astype(dtype), {339: 2})).tolist() == [[-5, 6]]


def turned():
    """A camera that was turned by a quarter says so in its file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *[(mode, "PNG") for mode in ("L", "I;16", "RGB", "RGBA", "P")],
        *[(mode, "TIFF") for mode in ("L", "I;16", "I", "F", "RGB", "RGBA")],
        *[(mode, "JPEG") for mode in ("L", "RGB", "CMYK")],
    ],
)
def test_the_camera_may_have_been_turned(mode, kind):
    content = file_of(Image.new(mode, (4, 3)), kind, exif=turned())
    assert pixels.read(content).shape[-2:] == (4, 3)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_the_camera_may_have_been_turned_before_16_bits(channels):
    levels = RNG.integers(0, 2**16, (3, 4, channels), np.uint16)
    expected = np.rot90(levels, -1).transpose(2, 0, 1)
    assert np.array_equal(pixels.read(wide_png(levels, turned().tobytes()[6:])), expected)
    if channels == 3:
        assert np.array_equal(pixels.read(tiff(levels, {274: 6})), expected)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_levels_that_are_no_numbers(spoilt):
    levels = np.full((3, 4), 0.5, np.float32)
    levels[1, 2] = spoilt
    with pytest.raises(SubspanError, match="pixels that are no finite numbers"):
        pixels.to_array(Image.fromarray(levels))


@pytest.mark.parametrize("sign", [1, -1])
def test_integers_that_float32_does_not_tell_apart(sign):
    exact = Image.new("I", (4, 3), sign * 2**24)
    assert pixels.to_array(exact)[0, 0] == sign * 2**24
    with pytest.raises(
        SubspanError, match="does not tell apart its levels, which go beyond 16,777"
    ):
        pixels.to_array(Image.new("I", (4, 3), sign * (2**24 + 1)))


# ---- resized -------------------------------------------------------------------------------------


def stripes(mode="L", period=2):
    """64 x 64, black and white in turns from column to column."""
    levels = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(period // 2).repeat(64)
    return Image.fromarray(levels[:64].repeat(64, 1).numpy()).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "LA", "RGBA", "I;16", "I", "F"])
def test_resizing_takes_the_mean_of_what_a_pixel_covers(mode):
    """Every fourth column, as without antialiasing, would be black or white."""
    image = stripes("L" if mode == "I;16" else mode)
    scale = 257 if mode == "I;16" else 1
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype("uint16") * 257)
    array = pixels.to_array(image, (8, 16))
    assert array.shape == ((3, 8, 16) if mode in ("RGB", "P", "RGBA") else (8, 16))
    assert array.dtype == {"I;16": "uint16", "I": "int32", "F": "float32"}.get(mode, "uint8")
    assert np.abs(array[..., 2:-2] / scale - 127.5).max() <= 0.5


def test_colours_are_resized_as_pillow_does():
    image = Image.fromarray(RNG.integers(0, 256, (31, 45, 3), np.uint8))
    expected = image.resize((12, 7), Image.Resampling.BILINEAR)
    assert np.array_equal(pixels.to_array(image, (7, 12)), np.asarray(expected).transpose(2, 0, 1))


def test_what_is_transparent_keeps_its_colour_when_it_is_resized():
    image = Image.new("RGBA", (8, 8), (200, 100, 50, 0))
    image.putpixel((0, 0), (200, 100, 50, 255))
    array = pixels.to_array(image, (4, 4))
    assert array[:3, 3, 3].tolist() == [200, 100, 50]
    assert 0 < array[3, 0, 0] < 255


def test_what_has_the_size_stays_as_it_is():
    image = stripes()
    assert np.array_equal(pixels.to_array(image, (64, 64)), np.asarray(image))
    assert pixels.to_array(image.crop((0, 0, 4, 3)), (6, 8)).shape == (6, 8)  # larger, too


# ---- a whole set ---------------------------------------------------------------------------------

DEEP = {
    "float in [0, 1]": ("F", 1.0, "tiff", "images of floating point: their levels, "),
    "float in [0, 255]": ("F", 255.0, "tiff", "images of floating point: their levels, "),
    "float outside": ("F", -1e6, "tiff", "images of floating point: their levels, -"),
    "16 bits": ("I;16", 65535, "png", "images of 16 bits: their levels, "),
    "12 bits in 16": ("I;16", 4095, "png", "images of 16 bits: their levels, "),
    "8 bits in 16": ("I;16", 255, "png", "images of 16 bits: their levels, "),
    "32 bits, signed": ("I", -100_000, "tiff", "images of 32 bits: their levels, -"),
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("resize", [None, 4])
def test_deep_images_keep_their_levels_and_their_scale(kind, resize, tmp_path):
    mode, top, suffix, note = DEEP[kind]
    dtype = {"F": np.float32, "I;16": np.uint16, "I": np.int32}[mode]

    def images(part, label):
        bright = {"cat": 0.2, "dog": 0.6}[label]
        return [
            Image.fromarray(((bright + 0.3 * RNG.random((8, 8))) * top).astype(dtype))
            for _ in range(12)
        ]

    pets = data.load(str(folder_of(tmp_path / "pets", images, suffix)), resize=resize)
    [said] = pets.notes
    assert said.startswith(note)
    assert said.endswith(" in the training part, are kept as they are, in float32")
    assert pets.train.images.dtype == torch.float32
    assert len(pets.train.images.unique()) > 60
    normal = pets.normalize(pets.train.images)
    assert abs(float(normal.mean())) < 1e-4
    assert abs(float(normal.std(correction=0)) - 1) < 1e-4
    # All images have one scale: one class stays three times as bright as the other.
    means = [float(pets.test.images[pets.test.labels == label].mean()) for label in (0, 1)]
    assert means[1] / means[0] == pytest.approx(0.75 / 0.35, rel=0.05)
    again = data.load(str(tmp_path / "pets"), resize=resize)  # from the cache
    assert torch.equal(again.train.images, pets.train.images)
    assert (again.notes, again.depth) == (pets.notes, pets.depth)


def test_colours_of_12_bits_in_16(tmp_path):
    levels = RNG.integers(0, 4096, (2, 12, 5, 6, 3))
    pets = data.load(
        str(
            folder_of(
                tmp_path / "pets", lambda _, label: map(wide_png, levels[int(label == "dog")])
            )
        )
    )
    expected = torch.from_numpy(levels).flatten(0, 1).permute(0, 3, 1, 2).float()
    assert torch.equal(pets.test.images, expected)


@pytest.mark.parametrize("deep", ["train", "test"])
@pytest.mark.parametrize(
    ("mode", "depth"), [("F", "floating point"), ("I;16", "16 bits"), ("I", "32 bits")]
)
def test_two_depths_in_one_set(deep, mode, depth, tmp_path):
    folder = image_folder(tmp_path / "pets")
    Image.new(mode, (4, 3)).save(folder / deep / "dog" / "11.tiff")
    (folder / deep / "dog" / "11.png").unlink()
    with pytest.raises(SubspanError) as refused:
        data.load(str(folder))
    said = str(refused.value)
    assert "must have one depth, for a level means another brightness in each" in said
    assert "found 8 bits (" in said
    assert "train/cat/00.png) and " in said
    assert f" and {depth} (" in said
    assert f"{deep}/dog/11.tiff): save them alike" in said


def test_a_level_that_is_no_number_is_refused_by_its_file(tmp_path):
    folder = image_folder(tmp_path / "pets")
    Image.new("F", (4, 3), np.nan).save(folder / "train" / "dog" / "11.tiff")
    with pytest.raises(SubspanError, match=r"image .*dog/11\.tiff of .*pets \(it has pixels that"):
        data.load(str(folder))


@pytest.mark.parametrize("colour", [0, 128, 255])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_is_drawn_in_opacity_alone(colour, mode, tmp_path):
    drawings = RNG.integers(0, 256, (12, 8, 8), np.uint8)

    def images(*_):
        for drawing in drawings:
            image = Image.new(mode, (8, 8), (*[colour] * (len(mode) - 1), 0))
            image.putalpha(Image.fromarray(drawing))
            yield image

    icons = data.load(str(folder_of(tmp_path / "icons", images)))
    channels = len(mode)
    assert icons.image_shape == (channels, 8, 8)
    assert torch.equal(icons.test.images[:12, -1], torch.from_numpy(drawings))
    assert (icons.test.images[:, :-1] == colour).all()
    [said] = icons.notes
    assert said.startswith(f"transparent images: 48 of 48; opacity is channel {channels} of ")
    assert icons.normalize(icons.test.images)[:, -1].std() > 0.5


def test_one_transparent_image_among_others(tmp_path):
    folder = image_folder(tmp_path / "pets")
    (folder / "test" / "cat" / "00.png").write_bytes(encoded((9, 8, 7, 6), "RGBA"))
    pets = data.load(str(folder))
    assert pets.image_shape == (4, 3, 4)
    assert pets.test.images[0, :, 0, 0].tolist() == [9, 8, 7, 6]
    assert pets.test.images[1, :, 0, 0].tolist() == [20, 20, 20, 255]
    assert "transparent images: 1 of 48; " in pets.notes[0]
    # One that hides nothing is like any other.
    (folder / "test" / "cat" / "00.png").write_bytes(encoded((9, 8, 7, 255), "RGBA"))
    assert data.load(str(folder)).image_shape == (3, 3, 4)
    assert data.load(str(folder)).notes == ()
