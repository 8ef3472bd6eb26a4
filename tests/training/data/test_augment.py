"""Random changes of training images: what they keep, how far they go, and where they are named."""

import pytest
import torch

from subspan import SubspanError
from subspan.training.data import augment
from subspan.training.data.augment import CHANGES, affine, changes, crop, flip
from tests.runs import record_of


@pytest.fixture
def digits():
    torch.manual_seed(0)
    return torch.randint(1, 256, (400, 2, 16, 24), dtype=torch.uint8)


@pytest.mark.parametrize("name", CHANGES)
def test_shape_and_levels_stay(name, digits):
    changed = CHANGES[name](digits)
    assert changed.shape == digits.shape
    assert 0 <= changed.min() <= changed.max() <= 255.01
    assert not torch.equal(changed, digits.to(changed.dtype))


@pytest.mark.parametrize("name", CHANGES)
def test_the_generator_decides(name, digits):
    torch.manual_seed(1)
    first, second = CHANGES[name](digits), CHANGES[name](digits)
    torch.manual_seed(1)
    assert torch.equal(CHANGES[name](digits), first)
    assert not torch.equal(second, first)


def test_flip_turns_half_of_the_images(digits):
    flipped = flip(digits)
    turned = (flipped == digits.flip(3)).all(dim=(1, 2, 3))
    assert torch.equal(flipped[~turned], digits[~turned])
    assert 0.4 < turned.float().mean() < 0.6


def test_crop_shifts_by_up_to_an_eighth(digits):
    """Each image is found again at one of (2 · 2 + 1) · (2 · 3 + 1) places, all of them in use."""
    cropped, places = crop(digits), set()
    wide = torch.nn.functional.pad(digits, (3, 3, 2, 2))
    for image, around in zip(cropped, wide, strict=True):
        found = [
            (y, x)
            for y in range(5)
            for x in range(7)
            if torch.equal(around[:, y : y + 16, x : x + 24], image)
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) == 35


def test_affine_moves_a_point_as_far_as_it_says():
    """A point in the middle moves by the shift alone, at most a fourteenth of the picture."""
    images = torch.zeros(300, 1, 57, 57)
    images[:, :, 28, 28] = 255
    torch.manual_seed(0)
    levels = affine(images)[:, 0]
    at = torch.arange(57.0) - 28
    total = levels.sum(dim=(1, 2))
    for dim in (1, 2):
        moved = (levels.sum(dim=dim) * at).sum(dim=1) / total
        assert 3 < moved.abs().max() < 57 / 14 * 1.4
        assert abs(moved.mean()) < 0.5


def test_affine_turns_without_bending(monkeypatch):
    """Where nothing else is changed, points keep their distance and their right angle."""
    for limit in ("SCALE", "SHEAR", "SHIFT"):
        monkeypatch.setattr(augment, limit, 0.0)
    monkeypatch.setattr(augment, "ANGLE", 0.5)
    images = torch.zeros(100, 2, 57, 57)
    images[:, 0, 28, 44], images[:, 1, 44, 28] = 255, 255  # 16 pixels to the right, and below
    torch.manual_seed(0)
    levels = affine(images)
    at = torch.arange(57.0) - 28
    total = levels.sum(dim=(2, 3))
    x, y = ((levels.sum(dim=dim) * at).sum(dim=2) / total for dim in (2, 3))
    assert ((x**2 + y**2).sqrt() - 16).abs().max() < 0.5
    assert (x[:, 0] * x[:, 1] + y[:, 0] * y[:, 1]).abs().max() < 0.1 * 16**2
    assert y[:, 0].abs().max() > 6


def test_names():
    assert changes("crop,flip") == changes(["crop", "flip"]) == [crop, flip]
    assert changes(None) == []
    with pytest.raises(SubspanError, match="unknown change of images 'fleep': did you mean flip"):
        changes("crop,fleep")
    with pytest.raises(SubspanError, match="augment has a change twice: flip,flip"):
        changes("flip,flip")


def test_the_record_names_them_and_the_file_does_not(cli, in_tmp_path):
    """A trained network reads images as they are."""
    command = ["train", "--net", "mlp-8", "--epochs", "1", "--dim", "5", "--lr", "0.3"]
    assert cli(*command, "--out", "plain").code == 0
    assert cli(*command, "--out", "changed", "--augment", "[crop,flip]").code == 0
    plain, changed = record_of(in_tmp_path / "plain"), record_of(in_tmp_path / "changed")
    assert (plain["config"].get("augment"), changed["config"]["augment"]) == (
        None,
        ["crop", "flip"],
    )
    assert plain["checkpoint_bytes"] == changed["checkpoint_bytes"]
    assert plain["history"][0]["train_loss"] != changed["history"][0]["train_loss"]
    assert "--augment" not in cli("eval", "--help").out
    said = cli(*command, "--out", "wrong", "--augment", "blur")
    assert (said.code, (in_tmp_path / "wrong").exists()) == (2, False)
    assert "unknown change of images 'blur'" in said.err
