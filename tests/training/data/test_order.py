"""The held-out parts and the batches."""

from itertools import chain

import pytest
import torch

from subspan.errors import SubspanError
from subspan.training import data
from subspan.training.data import order
from tests.training.data.makers import image_folder, numbered


def test_hold_out_is_disjoint_and_depends_on_the_seed_alone():
    rest, held = order.hold_out(numbered(600), 1 / 12, seed=3, stream=order.VALIDATION)
    assert (len(rest), len(held)) == (550, 50)
    assert sorted(torch.cat([rest.labels, held.labels]).tolist()) == list(range(600))
    assert torch.equal(held.images[:, 0, 0, 0], held.labels.to(torch.uint8))
    assert rest.labels.tolist() == sorted(rest.labels.tolist())
    again, other = (
        order.hold_out(numbered(600), 1 / 12, seed=seed, stream=order.VALIDATION)[1].labels
        for seed in (3, 4)
    )
    assert torch.equal(again, held.labels)
    assert not torch.equal(other, held.labels)


def test_splits_and_orders_never_change():
    """Published runs were made with these, whatever the versions of the libraries."""
    held = order.hold_out(numbered(1000), 0.01, seed=0, stream=order.VALIDATION)[1]
    assert held.labels.tolist() == [32, 38, 167, 223, 224, 352, 623, 655, 720, 810]
    [batch] = labels_of(numbered(10), 10, epoch=1)
    assert batch == [3, 2, 5, 4, 9, 7, 1, 8, 0, 6]


def test_hold_out_nothing():
    rest, held = order.hold_out(numbered(5), 0, seed=0, stream=order.VALIDATION)
    assert (len(rest), len(held)) == (5, 0)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan"), 0.01, 0.99])
def test_hold_out_leaves_both_sides_a_sample(fraction):
    with pytest.raises(SubspanError, match=r"share in \[0, 1\) .* of 20 samples"):
        order.hold_out(numbered(20), fraction, seed=0, stream=order.VALIDATION)


def test_validation_is_drawn_from_the_training_part(tmp_path):
    folder = str(image_folder(tmp_path / "pets"))
    pets = data.load(folder, validation=0.25, seed=5)
    other = data.load(folder, validation=0.25, seed=6)
    assert (len(pets.train), len(pets.validation)) == (18, 6)

    def samples(*splits):
        levels = torch.cat([split.images[:, 0, 0, 0] for split in splits])
        labels = torch.cat([split.labels for split in splits])
        return sorted(zip(levels.tolist(), labels.tolist(), strict=True))

    assert samples(pets.train, pets.validation) == samples(pets.test)
    assert samples(pets.validation) != samples(other.validation)


def labels_of(split, batch_size, **options):
    options = {"seed": 0, "epoch": 0, **options}
    parts = data.batches(len(split), batch_size, **options)
    return [split.select(index).labels.tolist() for index, _ in parts]


def flat(lists):
    return list(chain.from_iterable(lists))


def test_an_epoch_is_every_sample_once():
    split = numbered(103)
    labels = labels_of(split, 10)
    assert [len(batch) for batch in labels] == [10] * 10 + [3]
    assert len(labels) == data.steps_per_epoch(len(split), 10)
    seen = flat(labels)
    assert sorted(seen) == list(range(103))
    assert seen != list(range(103))


def test_images_and_labels_stay_together():
    split = numbered(103)
    for index, _ in data.batches(103, 10, seed=0, epoch=0):
        images, labels = split.select(index).images, split.select(index).labels
        assert images.dtype == torch.uint8
        assert images.shape == (len(labels), 1, 2, 2)
        assert torch.equal(images[:, 0, 1, 1], labels.to(torch.uint8))


def test_order_is_a_function_of_seed_and_epoch():
    split = numbered(64)
    orders = {(s, e): labels_of(split, 64, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)}
    assert orders[1, 0] == labels_of(split, 64, seed=1, epoch=0)
    assert len({tuple(batch[0]) for batch in orders.values()}) == 4


def test_order_does_not_depend_on_the_batch_size():
    split = numbered(60)
    assert flat(labels_of(split, 60)) == flat(labels_of(split, 7))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("size", [103, 97, 104])
def test_ranks_partition_each_global_batch(world, size):
    """And their weighted means average to that of the whole."""
    wholes = list(data.batches(size, 8, seed=0, epoch=0))
    assert all(weight == 1 for _, weight in wholes)
    values = torch.rand(size, dtype=torch.float64)
    ranks = [
        list(data.batches(size, 8, seed=0, epoch=0, rank=r, world=world)) for r in range(world)
    ]
    assert {len(rank) for rank in ranks} == {len(wholes)}
    for step, (whole, _) in enumerate(wholes):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([index for index, weight in parts if weight]), whole)
        assert min(len(index) for index, _ in parts) >= 1
        assert step == len(wholes) - 1 or {weight for _, weight in parts} == {1}
        mean = sum(weight * values[index].mean() for index, weight in parts) / world
        assert float(mean) == pytest.approx(float(values[whole].mean()), rel=1e-12)


def test_the_seed_of_batches_is_checked_at_the_call():
    with pytest.raises(SubspanError, match="seed must be an integer"):
        data.batches(20, 8, seed=-1, epoch=0)
