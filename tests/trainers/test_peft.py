"""PEFT beside a subspace: adapters in it, beside it, and on a network that is in one."""

import pytest
import torch

import subspan
from subspan import SubspaceModel, SubspanError
from tests.nets import scatter
from tests.pretrained import bert, transformers
from tests.trainers.test_trainer import CLASSES, IDS, arguments, both, trained, trainer

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 2, "init_lora_weights": False}


def adapted(**options):
    """A network with LoRA on queries and values, and a head."""
    torch.manual_seed(1)
    return peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", **LORA | options))


@both
def test_a_subspace_of_adapters(through, tmp_path):
    """A Trainer resumes exactly; what it saves of the network are ordinary adapters."""
    given = {"wrap": {"targets": "lora_"}, "save_strategy": "steps", "save_steps": 2}
    whole, first = trainer(adapted(), through, tmp_path / "whole", **given)
    first.train()
    assert trained(whole).numel() == 20
    again, second = trainer(adapted(), through, tmp_path / "again", **given)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(trained(again), trained(whole))
    whole.eval()
    logits = whole(input_ids=IDS).logits
    whole.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, logits)
    with whole.disable_adapter():
        torch.testing.assert_close(whole(input_ids=IDS).logits, bert().eval()(input_ids=IDS).logits)
    torch.testing.assert_close(whole(input_ids=IDS).logits, logits)


def test_adapters_beside_a_subspace(tmp_path):
    def build():
        net = adapted(target_modules=["key"])
        return SubspaceModel(net, 20, targets=["query", "value"], train_fully=["lora_"])

    model = build()
    assert {name for name in model.fully_trained() if "lora_" not in name} == set()
    running = transformers.Trainer(model, arguments(tmp_path), train_dataset=CLASSES)
    running.train()
    subspan.save(model, tmp_path / "both.safetensors")
    model.eval()
    loaded = subspan.load(tmp_path / "both.safetensors", adapted(target_modules=["key"])).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert trained(model)[:20].any()


def test_adapters_on_a_network_in_a_subspace(tmp_path):
    """Its coordinates are frozen then, as all that is not PEFT's; else PEFT would lose them."""
    model = scatter(SubspaceModel(bert(), 20, targets=["query", "value"]))
    before = model.coordinates["global"].detach().clone()
    net = peft.get_peft_model(model.body, peft.LoraConfig(target_modules=["key"], **LORA))
    running = transformers.Trainer(
        net, arguments(tmp_path, label_names=["labels"]), train_dataset=CLASSES
    )
    running.train()
    running.save_model(tmp_path / "adapter")
    assert torch.equal(model.coordinates["global"], before)
    other = scatter(SubspaceModel(bert(), 20, targets=["query", "value"]))
    loaded = peft.PeftModel.from_pretrained(other.body, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, net.eval()(input_ids=IDS).logits)
    model.coordinates["global"].requires_grad_(True)
    with pytest.raises(SubspanError, match="would save its adapters without the coordinates"):
        net.save_pretrained(tmp_path / "lost")


def test_adapters_on_layers_that_are_trained():
    """They compute what they should; a file would not say where coordinates belong."""
    model = scatter(SubspaceModel(bert(), 20, targets=["query", "value"])).eval()
    want = model(input_ids=IDS).logits
    net = peft.get_peft_model(model.body, peft.LoraConfig(target_modules=["query"], r=2)).eval()
    torch.testing.assert_close(net(input_ids=IDS).logits, want)
    with pytest.raises(SubspanError, match="was replaced after the network was wrapped"):
        subspan.save(model, "nowhere.safetensors")
