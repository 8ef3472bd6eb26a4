"""Names in PEFT's configuration: what it takes for another module is refused, or named apart."""

import copy
import re

import pytest
import torch
from torch import nn

import subspan
from subspan import SubspanError
from tests.nets import scatter


def test_what_peft_would_store_whole_cannot_have_a_lora(tmp_path):
    net = nn.Sequential()
    net.add_module("pre_head", nn.Linear(8, 8))
    net.add_module("head", nn.Linear(8, 3))
    model = subspan.lora(net, 4, rank=2, targets=["pre_head"], train_fully=["head"])
    with pytest.raises(SubspanError, match="ends with 'head' for one that is stored whole, so tha"):
        subspan.export_lora(model, tmp_path / "lora")


@pytest.mark.heavy
def test_what_peft_would_take_for_experts_cannot_have_a_lora(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    sizes |= {"vocab_size": 20, "num_hidden_layers": 2, "intermediate_size": 16}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=2, mlp_only_layers=[0])
    net = transformers.Qwen3MoeForCausalLM(config)
    model = subspan.lora(net, 4, rank=2)  # of the layer without experts, too
    said = r"'gate_proj' in a network of the type 'qwen3_moe' .* model\.layers\.0\.mlp\.gate_proj"
    with pytest.raises(SubspanError, match=said):
        subspan.export_lora(model, tmp_path / "lora")
    model.unwrap()
    subspan.export_lora(subspan.lora(net, 4, rank=2, targets="attention"), tmp_path / "lora")


@pytest.mark.heavy
def test_a_layer_that_is_read_and_not_called_cannot_have_a_lora(tmp_path):
    """PEFT's layer has the weight without the LoRA."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4}
    net = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, time_step_rank=2))
    model = subspan.lora(net, 4, rank=2, exclude="out_proj")
    with pytest.raises(SubspanError, match=r"'mamba' reads the weight of .*\.dt_proj and does not"):
        subspan.export_lora(model, tmp_path / "lora")
    model.unwrap()
    model = subspan.lora(net, 4, rank=2, exclude=["out_proj", "dt_proj"])
    subspan.export_lora(model, tmp_path / "lora")


def tree(*paths):
    """A network of linear layers with these names, which are called one after the other."""
    net = Chain()
    for path in paths:
        *containers, name = path.split(".")
        inside = net
        for each in containers:
            if each not in inside._modules:
                inside.add_module(each, Chain())
            inside = inside._modules[each]
        inside.add_module(name, nn.Linear(6, 6))
    return net


class Chain(nn.Module):
    def forward(self, x):
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("layers", "fully", "said"),
    [
        (["b.aa.c"], ["a"], r"ends with 'a' \(b\.aa\) for one that .* b\.aa\.c cannot have a LoRA"),
        (["b.ba"], ["a"], r"ends with 'a' for one that is stored whole, so that b\.ba cannot"),
        (["b"], ["c.c", "c.d.e"], r""),
        (["b"], ["a", "c.a"], r""),
        (["fc"], ["b.t"], r""),
        (["b", "xfc"], ["fc.c.d"], r""),
        (["fc"], ["A"], r"ends with 'A' \(fc\.lora_A\) for one .* fc cannot have a LoRA"),
        (["fc"], ["t"], r"ends with 't' \(fc\.lora_A\.default\) for one .* fc cannot have a LoRA"),
    ],
    ids=str,
)
def test_what_peft_would_take_for_another_module_is_refused_or_right(layers, fully, said, tmp_path):
    """PEFT compares ends of names: containers, its own modules, and one module in another."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    net = tree(*layers, *fully)
    base, x = copy.deepcopy(net), torch.randn(3, 6)
    exact = [re.escape(f"{name}.") + ".*" for name in fully]
    model = scatter(subspan.lora(net, 10, rank=2, targets=layers, train_fully=exact))
    with torch.no_grad():
        for p in model.fully_trained().values():
            p.add_(0.3)
    if said:
        with pytest.raises(SubspanError, match=said):
            subspan.export_lora(model, tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
        return
    subspan.export_lora(model, tmp_path / "lora")
    assert torch.equal(peft.PeftModel.from_pretrained(base, tmp_path / "lora")(x), model(x))


def test_one_module_that_is_stored_whole_cannot_lie_in_another(tmp_path):
    net = tree("b", "c")
    net.c.add_module("c", nn.Linear(6, 6))
    model = subspan.lora(net, 4, rank=2, targets=["b"], train_fully=["c"])
    with pytest.raises(SubspanError, match=r"it cannot store c\.c in it, too: write the network"):
        subspan.export_lora(model, tmp_path / "lora")
