"""LoRA factors beside weights of bitsandbytes or torchao, which stay as they are."""

import copy

import pytest
import torch
from torch import nn

import subspan
from subspan import SubspanError
from tests.nets import scatter
from tests.subspace.test_quantised import BITSANDBYTES, bytes_of, dense, network, same

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LORA = {"rank": 4, "targets": ["fc", "out"]}
WORDS = torch.arange(12).view(3, 4) % 11


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_the_base_is_untouched_and_the_function_is_pefts(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    # In evaluation mode some processors make bitsandbytes round its scales anew.
    net, plain = network(kind), network(kind)
    before, first = bytes_of(net), net(WORDS)
    model = subspan.lora(net, 20, **LORA)
    assert torch.equal(net(WORDS), first)
    scatter(model)
    out = model(WORDS)
    assert not torch.equal(out, first)
    assert same(bytes_of(net), before)
    subspan.export_lora(model, tmp_path)
    plain.is_loaded_in_4bit, plain.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    there = peft.PeftModel.from_pretrained(plain, tmp_path).train()
    assert torch.equal(there(WORDS), out)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_training_saving_copies_and_the_way_back(kind, tmp_path):
    model = subspan.lora(network(kind), 20, **LORA)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(WORDS).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(copy.deepcopy(model)(WORDS), model(WORDS))
    subspan.save(model, tmp_path / "m.safetensors")
    assert torch.equal(subspan.load(tmp_path / "m.safetensors", network(kind))(WORDS), model(WORDS))
    with pytest.raises(SubspanError, match="no quantised tensors"):
        subspan.load(tmp_path / "m.safetensors", dense(kind))
    merged = model.merge()
    assert type(merged.fc) is type(merged.out) is nn.Linear
    if kind not in BITSANDBYTES or kind == "nf4":  # whose int8 layers round their input, too
        torch.testing.assert_close(merged(WORDS), model(WORDS), rtol=1e-3, atol=1e-3)
    before = bytes_of(network(kind))
    assert same(bytes_of(model.unwrap()), before)


def test_a_part_keeps_factors_that_the_quantised_weight_does_not_have():
    model = subspan.lora(network("torchao-int8"), 20, **LORA)
    assert {"weight", "subspan_A", "subspan_B"} <= model.body.fc.state_dict().keys()
