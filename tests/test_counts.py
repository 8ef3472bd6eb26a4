"""Counts against arithmetic, and against the tensors that are there."""

from __future__ import annotations

import pytest
from torch.optim import SGD, Adam

import subspan
from subspan import SubspaceModel, count
from subspan.layers import factorize, merge
from subspan.optim import DLRT
from subspan.training import nets
from tests.nets import batch, build

# Erratum of Schotthöfer 2022, LeNet5: ranks, the published count, the numbers really stored.
LENET5 = [
    ([10, 23, 62], 37_445, 98_700),
    ([10, 20, 48], 30_278, 78_850),
    ([9, 16, 37], 24_542, 62_305),
    ([9, 16, 28], 20_033, 50_605),
    ([8, 8, 15], 13_091, 29_260),
    ([4, 6, 8], 9_398, 18_880),
    ([2, 4, 4], 7_250, 12_490),
    ([2, 2, 3], 6_647, 10_090),
]
BIASES = 20 + 50 + 500 + 10


@pytest.mark.parametrize(("ranks", "published", "true"), LENET5)
def test_lenet5_as_published_and_in_truth(ranks, published, true):
    layers = dict(zip(("conv1", "conv2", "fc1"), ranks, strict=True))
    net = factorize(nets.build("lenet5-caffe"), rank=layers, exclude="fc2", init="random")
    found = count(net)
    assert found.published["'params eval' of Schotthöfer 2022"] == published
    assert found.inference == true + BIASES
    assert found.dense == 430_500 + BIASES
    sides = [(20, 25), (50, 500), (500, 800)]
    train = sum(5 * r * (n + m) + 12 * r * r for r, (n, m) in zip(ranks, sides, strict=True))
    assert found.published["'params train' of Schotthöfer 2022"] == train + 10_000
    assert found.stored == found.inference + sum(r * r for r in ranks)
    plain = merge(net, factors=True)
    assert sum(p.numel() for p in plain.parameters()) == found.inference
    assert found.compression == pytest.approx(1 - found.inference / found.dense)


def test_training_counts_gradients_and_the_optimizers_state():
    net = build("mlp")
    assert count(net) == subspan.counts.Counts(212, 212, 212, 424)
    optimizer = Adam(net.parameters())
    net(batch("mlp")).sum().backward()
    optimizer.step()
    assert count(net, optimizer).training == 4 * 212
    net[0].requires_grad_(False)
    assert count(net).training == 212 + 68


def test_training_of_factors():
    net = factorize(build("mlp"), rank=2)
    numbers = 2 * (8 + 16 + 2) + 2 * (16 + 4 + 2) + 20
    assert count(net).training == 2 * numbers
    optimizer = DLRT(net, 0.1, base="adam")
    net(batch("mlp")).sum().backward()
    optimizer.step()
    assert count(net, optimizer).training == 4 * numbers


def test_buffers_are_stored_and_not_trained():
    net = build("cnn")
    parameters = sum(p.numel() for p in net.parameters())
    assert count(net).stored == parameters + 4 + 4 + 1
    assert count(net).inference == parameters


def test_a_subspace_is_its_coordinates():
    model = SubspaceModel(build("mlp"), 12, train_fully="2.bias")
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    model(batch("mlp")).sum().backward()
    optimizer.step()
    found = count(model, optimizer)
    assert (found.dense, found.inference, found.stored) == (212, 16, 16)
    assert found.training == 212 + 3 * 16


def test_tied_weights_count_once():
    net = build("tied")
    assert count(net).dense == sum(p.numel() for p in net.parameters())


def test_a_table():
    ranks = {"conv1": 8, "conv2": 8, "fc1": 15}
    net = factorize(nets.build("lenet5-caffe"), rank=ranks, exclude="fc2")
    lines = str(count(net)).splitlines()
    assert lines[0].split() == ["dense", "network", "431,080", "100.00%"]
    assert lines[1].split() == ["to", "run", "it", "29,840", "6.92%"]
    assert lines[4].split()[-2:] == ["13,091", "3.04%"]
