"""Trainer and PEFT: adapters in a subspace, and on a network that is in one."""

import pytest
import torch

from subspan import SubspaceModel, SubspanError
from tests.nets import scatter
from tests.pretrained import bert, peft, transformers
from tests.trainers.test_trainer import CLASSES, IDS, arguments, both, trained, trainer

pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 2, "init_lora_weights": False}


def adapted(**options):
    """A network with LoRA on queries and values, and a head."""
    torch.manual_seed(1)
    return peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", **LORA | options))


@both
def test_a_subspace_of_adapters(through, tmp_path):
    """A Trainer resumes exactly; what it saves of the network are ordinary adapters."""
    given = {"wrap": {"targets": ".*lora_.*"}, "save_strategy": "steps", "save_steps": 2}
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


def test_adapters_on_a_network_in_a_subspace(tmp_path):
    """PEFT freezes coordinates. Where they are trained nevertheless, Trainer would lose them."""
    model = scatter(SubspaceModel(bert(), 20, targets=["query", "value"]))
    before = trained(model)
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
    model.requires_grad_(True)
    with pytest.raises(SubspanError, match="without the coordinates that are trained beside"):
        running.save_model(tmp_path / "lost")
