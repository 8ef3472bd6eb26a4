"""Files of models of LoRA factors: d numbers, and how the factors are made."""

import hashlib

import pytest
import torch

import subspan
from subspan import SubspanError
from subspan.checkpoint import inspect
from tests.adapters.networks import WORDS, Block, block, lora
from tests.golden.lora import PATH as GOLDEN


@pytest.fixture
def file(tmp_path):
    subspan.save(lora(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_a_file_holds_coordinates_head_and_recipe(file):
    header = inspect(file)
    assert header["lora"] == {"alpha": 3, "rank": 2, "targets": ["up", "down"]}
    assert header["tensors"] == {
        "coordinates": [10],
        "body.head.weight": [3, 8],
        "body.head.bias": [3],
    }
    assert header["weights"] == sum(p.numel() for p in block().parameters())
    model = subspan.load(file, block())
    assert torch.equal(model(WORDS), lora()(WORDS))
    assert model.subspace.lora == header["lora"]
    subspan.save(model, file.with_name("again"))
    assert file.with_name("again").read_bytes() == file.read_bytes()


def test_a_thousand_numbers_are_five_kilobytes(tmp_path):
    import torch.nn as nn

    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    model = subspan.lora(net, 1000, rank=8, targets=".*")
    assert subspan.save(model, tmp_path / "m.safetensors") < 4700


def test_another_network_is_refused_and_left_as_it_was(file):
    other = block()
    with torch.no_grad():
        other.up.weight += 1
    names = list(other.state_dict())
    with pytest.raises(SubspanError, match="trained from other initial weights"):
        subspan.load(file, other)
    assert list(other.state_dict()) == names
    assert type(other.up) is torch.nn.Linear
    with pytest.raises(SubspanError, match="is of a network of"):
        subspan.load(file, torch.nn.Linear(3, 3))
    same_size = torch.nn.Sequential(torch.nn.Linear(343, 1, bias=False))
    assert sum(p.numel() for p in same_size.parameters()) == inspect(file)["weights"]
    with pytest.raises(SubspanError, match="does not fit this network: unknown pattern in"):
        subspan.load(file, same_size)


def test_files_of_today_load_for_ever():
    """Factors, coordinates and their meaning: a file that was written when they were first made."""
    model = subspan.load(GOLDEN, Block)
    thetas = model.subspace.all()
    text = b"".join(thetas[name].detach().numpy().tobytes() for name in sorted(thetas))
    assert hashlib.sha256(text).hexdigest()[:32] == inspect(GOLDEN)["extra"]["digest"]
