"""PEFT beside a subspace: around its adapters, and its adapters on other layers of a network."""

import copy

import pytest
import torch

import subspan
from subspan import SubspaceModel, SubspanError
from tests.pretrained import bert, peft

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]

IDS = torch.tensor([[3, 7, 1, 9], [2, 2, 5, 0]])


@pytest.fixture(scope="module")
def original():
    return bert(num_hidden_layers=2).eval()


@pytest.fixture
def net(original):
    return copy.deepcopy(original)


def lora(net, *targets, **options):
    torch.manual_seed(1)
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=list(targets), **options))


def logits(net):
    with torch.no_grad():
        return net(input_ids=IDS).logits


def train(model, groups=None, steps=2):
    optimizer = torch.optim.Adam(groups or [p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()


# ---- a subspace around a PEFT model --------------------------------------------------------------


def around(net, **options):
    """A trained subspace of LoRA's factors."""
    model = SubspaceModel(lora(net, "query", "value", **options), 12)
    train(model, model.parameter_groups())
    return model.eval()


def test_the_coordinates_are_those_of_the_factors(net, original):
    model = around(net)
    rows = {row.tensor for row in model.summary().rows if row.compartment == "global"}
    assert len(rows) == 8
    assert all("lora_" in tensor for tensor in rows)
    assert [p.shape for p in model.parameters()] == [(12,)]
    assert not torch.equal(logits(model), logits(original))
    with model.at_base():
        assert torch.equal(logits(model), logits(original))  # B = 0


def test_adapters_are_disabled_and_enabled(net, original):
    model = around(net)
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(original))
    with torch.no_grad(), model.disable_adapter():
        pass
    assert torch.equal(logits(model), trained)
    train(model)  # coordinates are trained as before
    assert not torch.equal(logits(model.eval()), trained)


def test_adapters_are_saved_as_any_of_pefts(net, original, tmp_path):
    model = around(net)
    model.body.save_pretrained(tmp_path / "body")
    model.save_pretrained(tmp_path / "handle")
    for folder in ("body", "handle"):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / folder)
        assert torch.equal(logits(again), logits(model))


def test_a_file_of_coordinates_fits_the_same_adapters(net, original, tmp_path):
    model = around(net)
    subspan.save(model, tmp_path / "model.safetensors")
    twin = lora(copy.deepcopy(original), "query", "value")
    again = subspan.load(tmp_path / "model.safetensors", twin)
    assert torch.equal(logits(again.eval()), logits(model))


def test_merged_adapters(net, original):
    model = around(net)
    trained = logits(model)
    model.body.merge_adapter()
    torch.testing.assert_close(logits(model), trained)
    with pytest.raises(SubspanError, match="was changed after the network was wrapped"):
        subspan.checkpoint.contents(model)
    model.body.unmerge_adapter()
    torch.testing.assert_close(logits(model), trained)
    plain = model.merge().merge_and_unload()
    assert type(plain) is type(original)
    torch.testing.assert_close(logits(plain), trained)


def test_a_new_head_of_pefts_is_trained_fully(net):
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = SubspaceModel(peft.get_peft_model(net, config), 12, train_fully="head")
    fully = model.fully_trained()
    assert {name.rpartition(".")[2] for name in fully} == {"weight", "bias"}
    assert all("modules_to_save.default" in name for name in fully)
    before = {name: p.clone() for name, p in fully.items()}
    train(model, model.parameter_groups())
    assert not any(torch.equal(p, before[name]) for name, p in fully.items())


@pytest.mark.parametrize("handle", [False, True])
def test_a_network_that_is_wrapped_already_is_not_prepared_for_adapters(net, handle):
    """It would freeze the coordinates, and with checkpoints nobody would notice."""
    model = SubspaceModel(net, 12)
    given = model if handle else net
    with pytest.raises(SubspanError, match=r"would freeze the coordinates.*before the network"):
        peft.prepare_model_for_kbit_training(given)
    assert all(p.requires_grad for p in model.parameters())
    model.requires_grad_(False)
    peft.prepare_model_for_kbit_training(given)


# ---- PEFT on other layers of a network in a subspace ---------------------------------------------


@pytest.mark.parametrize("handle", [False, True])
def test_adapters_on_other_layers(net, original, handle, tmp_path):
    model = SubspaceModel(net, 12, targets="mlp")
    train(model)
    moved = logits(model.eval())
    both = lora(model if handle else net, "query", "value").eval()
    assert torch.equal(logits(both), moved)
    with pytest.raises(SubspanError, match=r"lora_A.* was added after the network was wrapped"):
        subspan.save(model, tmp_path / "model.safetensors")
    model.requires_grad_(True)  # PEFT has frozen all but its adapters
    trained = {id(p) for p in both.parameters() if p.requires_grad}
    assert {id(w) for w in model.coordinates.values()} <= trained
    before = [w.clone() for w in model.coordinates.values()]
    train(both)
    assert not any(
        torch.equal(w, b) for w, b in zip(model.coordinates.values(), before, strict=True)
    )
    both.eval()
    with both.disable_adapter():
        alone = logits(both)
    with both.disable_adapter(), model.at_base():
        assert torch.equal(logits(both), logits(original))
    together = logits(both)
    assert not torch.equal(alone, together)
    both.save_pretrained(tmp_path / "adapter")
    both.merge_adapter()
    torch.testing.assert_close(logits(both), together)
    both.unmerge_adapter()
    torch.testing.assert_close(logits(both), together)
    both.unload()
    torch.testing.assert_close(logits(model), alone)
    subspan.save(model, tmp_path / "model.safetensors")
    again = subspan.load(tmp_path / "model.safetensors", copy.deepcopy(original))
    again = peft.PeftModel.from_pretrained(again if handle else again.body, tmp_path / "adapter")
    torch.testing.assert_close(logits(again.eval()), together)


def test_an_adapter_on_a_layer_of_the_subspace(net):
    model = SubspaceModel(net, 12, targets="attention")
    train(model)
    moved = logits(model.eval())
    both = lora(net, "query").eval()
    assert torch.equal(logits(both), moved)
    with pytest.raises(SubspanError, match="would be lost"):
        both.merge_adapter()
    with pytest.raises(SubspanError, match="was replaced after the network was wrapped"):
        subspan.checkpoint.contents(model)


def test_adapters_that_were_there_before_are_trained_fully(net):
    model = SubspaceModel(
        lora(net, "query"), 12, targets=r".*intermediate\.dense\.weight", train_fully=".*lora_.*"
    )
    coordinates, factors = model.parameter_groups()
    assert len(factors["params"]) == 4
    before = [p.clone() for p in factors["params"]]
    train(model, [coordinates, factors])
    assert not any(torch.equal(p, b) for p, b in zip(factors["params"], before, strict=True))
