"""LoRA factors in two processes, by DDP and by FSDP2: the training of one on the joint batch."""

import functools

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import subspan
from subspan import SubspanError
from tests.adapters.networks import LORA, block
from tests.ranks import go_through

pytestmark = pytest.mark.heavy

WORDS = torch.arange(24).view(4, 6) % 11


def model_of():
    """All layers have factors, and nothing is trained fully, which FSDP would shard."""
    options = LORA | {"targets": ["up", "down", "head"], "train_fully": None}
    return subspan.lora(block(torch.float64), 12, **options)


def train(model, x, large=False):
    subspace = model.subspace if hasattr(model, "subspace") else model.module.subspace
    subspace.large = large
    optimizer = SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {name: w.detach().clone() for name, w in subspace.coordinates().items()}


def rows(rank, world):
    return WORDS[rank * len(WORDS) // world : (rank + 1) * len(WORDS) // world]


def ddp(rank, world):
    return train(DistributedDataParallel(model_of()), rows(rank, world))


def sharded():
    model = model_of()
    for layer in model.body.children():
        fully_shard(layer)
    fully_shard(model.body)
    return model


def fsdp(rank, world, large):
    return train(sharded(), rows(rank, world), large)


def reading(rank, world):
    """A weight outside of a call, and what would make a whole network."""
    model, said = sharded(), {}
    for name, act in (("weight", lambda: model.body.up.weight), ("merge", model.merge)):
        try:
            act()
        except SubspanError as error:
            said[name] = str(error)
    return said


SCENARIOS = {
    "ddp": ddp,
    "fsdp": functools.partial(fsdp, large=False),
    "fsdp large": functools.partial(fsdp, large=True),
    "reading": reading,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return go_through(__name__, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp large"])
def test_training_is_that_of_one_process(way, ranks):
    alone = train(model_of(), WORDS)
    assert all(w.abs().max() > 0.01 for w in alone.values())
    for rank in ranks:
        torch.testing.assert_close(rank[way], alone)


def test_whole_weights_of_shards_are_refused(ranks):
    for rank in ranks:
        assert "is sharded and has LoRA factors beside it" in rank["reading"]["weight"]
        assert "merge" in rank["reading"]
