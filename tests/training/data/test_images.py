"""Statistics, normalisation and devices."""

import pytest
import torch

from subspan.training import data
from subspan.training.data.images import statistics


def test_statistics_are_those_of_the_training_part():
    digits = data.load("digits")
    pixels = digits.train.images.double() / 255
    torch.testing.assert_close(digits.mean, pixels.mean().float().reshape(1))
    torch.testing.assert_close(digits.std, pixels.std(correction=0).float().reshape(1))
    normal = digits.normalize(digits.train.images)
    assert normal.dtype == torch.float32
    assert abs(normal.mean()) < 1e-5
    assert abs(normal.std() - 1) < 1e-3


def test_statistics_are_per_channel_and_floored():
    images = torch.zeros(4, 2, 3, 3, dtype=torch.uint8)
    images[:2, 0], images[:, 1] = 255, 51
    mean, std = statistics(images)
    torch.testing.assert_close(mean, torch.tensor([0.5, 0.2]))
    torch.testing.assert_close(std, torch.tensor([0.5, 1 / 255]))


def test_to_moves_every_tensor():
    moved = data.load("digits").to("meta")
    tensors = [moved.mean, moved.std]
    for split in (moved.train, moved.validation, moved.test):
        tensors += [split.images, split.labels]
    assert {t.device.type for t in tensors} == {"meta"}


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1.0, 1e3), (1e30, 1e30)])
def test_statistics_of_floats(scale, offset, monkeypatch):
    images = torch.rand(4, 2, 3, 5) * scale + offset
    for piece in (7, 2**20):
        monkeypatch.setattr("subspan.training.data.images.PIECE", piece)
        mean, std = statistics(images)
        pixels = images.double().transpose(0, 1).flatten(1) / 255
        torch.testing.assert_close(mean, pixels.mean(1).float())
        torch.testing.assert_close(std, pixels.std(1, correction=0).float())


@pytest.mark.parametrize("level", [0.0, 0.1, -3e4])
def test_a_constant_channel_of_floats_is_no_signal(level):
    mean, std = statistics(torch.full((4, 1, 3, 3), level))
    assert abs((torch.tensor(level) / 255 - mean) / std) < 0.2
