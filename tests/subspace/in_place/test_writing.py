"""A write to a network in a subspace acts on it, or is refused before anything changes."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Adam

import subspan
from subspan import SubspaceModel, SubspanError
from tests.nets import scatter
from tests.subspace.in_place.network import Net, pair, same_function

WRITES = {
    "data": lambda net: net.head.weight.data.zero_(),
    "a row of data": lambda net: net.head.weight.data[0].zero_(),
    "item": lambda net: net.head.weight.__setitem__(0, 1.0),
    "detach": lambda net: net.head.bias.detach().fill_(3),
    "augmented": lambda net: net.head.weight.data.__imul__(2),
    "set data": lambda net: setattr(net.head.weight, "data", torch.zeros(4, 16)),
    "copy": lambda net: torch.no_grad()(lambda: net.head.weight.copy_(torch.ones(4, 16)))(),
    "init": lambda net: nn.init.xavier_uniform_(net.head.weight),
    "apply": lambda net: net.apply(
        lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None
    ),
    "reset_parameters": lambda net: net.head.reset_parameters(),
    "out": lambda net: torch.add(torch.ones(4), 1, out=net.head.bias.detach()),
    "foreach": lambda net: torch._foreach_mul_([net.head.weight.detach()], 2.0),
    "all_reduce": lambda net: dist.all_reduce(net.head.weight.data),
    "broadcast": lambda net: dist.broadcast(net.head.weight.detach(), 1),
    "a parameter": lambda net: setattr(net.head, "weight", nn.Parameter(torch.ones(4, 16))),
    "none": lambda net: net.head.register_parameter("bias", None),
    "delete": lambda net: delattr(net.head, "weight"),
    "by __getattr__": lambda net: net.head.__getattr__("weight").data.fill_(0.3),
    "prune": lambda net: prune.l1_unstructured(net.head, "weight", 0.5),
    "weight_norm": lambda net: nn.utils.weight_norm(net.head),
    "spectral_norm": lambda net: nn.utils.spectral_norm(net.head),
    "parametrize": lambda net: nn.utils.parametrizations.weight_norm(net.head),
    "orthogonal": lambda net: nn.utils.parametrizations.orthogonal(net.head),
    "quantise": lambda net: torch.ao.quantization.quantize_dynamic(net, {nn.Linear}),
    "a part's state": lambda net: net.head.load_state_dict(nn.Linear(16, 4).state_dict()),
    "freeze a part": lambda net: net.body.requires_grad_(False),
    "freeze a weight": lambda net: net.head.weight.requires_grad_(False),
    "flag of a weight": lambda net: setattr(net.head.weight, "requires_grad", False),
    "flags of a part": lambda net: [
        setattr(p, "requires_grad", False) for p in net.body.parameters()
    ],
    "data parallel": lambda net: net._replicate_for_data_parallel(),
    "penalty over all": lambda net: net.penalty(),
    "norms of all": lambda net: torch._foreach_norm(list(net.parameters())),
    "a decomposition": lambda net: torch.linalg.svd(net.get_parameter("head.weight")),
    "a product": lambda net: torch.ones(4) @ net.get_parameter("head.weight"),
    "a norm of all": lambda net: torch.no_grad()(net.penalty)(),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantization.*")
@pytest.mark.parametrize("what", WRITES)
def test_what_would_have_no_effect_is_refused(what):
    model, _, x = pair()
    said = same_function(model, x, lambda: WRITES[what](model.body))
    assert len(said.split()) > 12  # what was asked, why it cannot be right, and what to do


@pytest.mark.parametrize(
    "read",
    [
        lambda net: net.head.weight.detach().numpy(),
        lambda net: net.head.weight.data[0].numpy(),
        lambda net: net.head.weight.numpy(force=True).T,
        lambda net: net.head.state_dict()["weight"].numpy(),
        lambda net: np.asarray(net.head.weight.detach()),
    ],
)
def test_an_array_of_a_weight_is_read_only(read):
    model, merged, _ = pair()
    array, want = read(model.body), read(merged)
    np.testing.assert_array_equal(array, want)
    want[...] = 0  # is a change of an ordinary network
    assert not merged.head.weight.detach().numpy().all()
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 0


def test_an_array_that_is_a_copy_may_be_written_to():
    weight = pair()[0].body.head.weight.detach()
    for copied in (weight.__array__(np.float64), weight.clone().numpy()):
        copied[...] = 0


def test_a_parameter_that_is_made_of_a_weight_is_ones_own():
    model, _, x = pair()
    before = model(x)
    head, other = model.body.head, nn.Linear(16, 2)
    other.weight = nn.Parameter(head.weight.data[:2])
    for p in (*head.parameters(), *other.parameters()):
        own = p if p.shape[0] == 2 else nn.Parameter(p)
        assert type(own) is nn.Parameter
        assert own.is_leaf
        assert own.requires_grad
        own.grad = torch.ones_like(own)
        SGD([own], lr=0.1).step()
    assert torch.equal(model(x), before)
    with pytest.raises(SubspanError, match=r"head\.weight is computed .* cannot be replaced"):
        head.weight = nn.Parameter(head.weight[:2])


def test_memory_of_a_weight_is_not_given_to_another_library():
    weight = pair()[0].body.head.weight.detach()
    for take in (torch.from_dlpack, np.from_dlpack):
        with pytest.raises(SubspanError, match=r"\(__dlpack__\) would be lost: give it \.detach"):
            take(weight)
        assert (take(weight.clone()) == take(weight, copy=True)).all()


def test_reading_a_weight_is_not_writing_to_it():
    model, merged, _ = pair()
    weight, want = model.body.head.weight, merged.head.weight
    for read in (
        lambda w: w.data,
        lambda w: w.detach().clone().zero_() + w,
        lambda w: w.data[0],
        lambda w: copy.deepcopy(w),
        lambda w: pickle.loads(pickle.dumps(w.detach())),
        lambda w: w.numpy(force=True),
        lambda w: w.tolist(),
        lambda w: w.sum(),
        lambda w: w.double(),
        lambda w: nn.Parameter(w.data),
        lambda w: nn.Parameter(w.detach().clone()),
        repr,
        lambda w: w.shape,
    ):
        read(weight), read(want)
    own = nn.Parameter(weight.detach().clone())
    SGD([own], lr=0.1)
    own.sum().backward()
    with torch.no_grad():
        own.add_(1)
    torch.testing.assert_close(weight.detach().as_subclass(torch.Tensor), want.detach())


def test_a_part_that_is_frozen_by_name_is_refused_at_the_next_call():
    model, _, x = pair()
    for name, p in model.body.named_parameters():
        if name.startswith("body"):
            p.requires_grad = False
    for use in (lambda: model(x), lambda: model.body.head(torch.ones(16))):
        with pytest.raises(SubspanError, match=r"requires_grad of body.0.weight was set to False"):
            use()
    for name, p in model.body.named_parameters():
        if name.startswith("body"):
            p.requires_grad_(True)
    model(x).sum().backward()


def test_a_part_that_is_trained_may_be_unfrozen():
    model, _, x = pair()
    for p in model.body.head.parameters():
        p.requires_grad = True
        p.requires_grad_()
    model(x).sum().backward()


def test_attributes_of_the_network_are_written_through_the_handle():
    model, merged, x = pair()
    model.flag = True
    assert model.body.flag is model.flag is True
    torch.testing.assert_close(model(x), 2 * merged(x))
    model.note = "new"
    assert model.body.note == "new"
    del model.note
    assert not hasattr(model.body, "note")
    model._private = 3
    assert model.body._private == 3
    model.body._private += 1
    assert model._private == 4
    del model._private
    assert not hasattr(model.body, "_private")
    model.eval()
    assert not model.training


@pytest.mark.parametrize("lora", [False, True])
def test_an_attribute_of_a_weight_stays_as_that_of_a_parameter(lora):
    net = Net()
    model = subspan.lora(net, 9, rank=2, targets=".*") if lora else SubspaceModel(net, 20)
    for read in (lambda: net.head.weight, lambda: dict(net.head.named_parameters())["weight"]):
        assert not hasattr(read(), "note")
        read().note = "decays"
        assert read().note == net.get_parameter("head.weight").note == "decays"
        model(torch.randn(5, 8))
        del read().note
    net.head.weight.note, net.head.weight.doubled = "decays", 2 * net.head.weight  # in a graph
    assert model.merge().head.weight.doubled.shape == (4, 16)
    assert model.unwrap().head.weight.note == "decays"


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: model.reset_classifier(7),
        lambda model: model.body.reset_classifier(7),
        lambda model: setattr(model, "head", nn.Linear(16, 7)),
        lambda model: setattr(model.body, "head", nn.Linear(16, 7)),
    ],
)
def test_a_new_head_is_the_head_and_is_noticed_when_saving(replace, tmp_path):
    model, merged, x = pair()
    replace(model)
    assert model(x).shape == (5, 7)
    now = model.merge()
    assert torch.equal(now(x), model(x))
    assert torch.equal(now.body[0].weight, merged.body[0].weight)
    with pytest.raises(SubspanError, match=r"head\.(weight|bias) was (replaced|added) after"):
        subspan.save(model, tmp_path / "m")
    with pytest.raises(SubspanError, match=r"head\.\w+ was replaced after the network was wrapped"):
        model.state_dict()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"exclude": "head"}, {"train_fully": "head"}], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        lambda net: weight_norm(net.head),
        lambda net: setattr(net, "head", nn.Identity()),
        lambda net: setattr(net.head, "bias", None),
    ],
    ids=["weight_norm", "Identity", "no bias"],
)
def test_a_parameter_that_is_taken_out_is_noticed_when_saving(options, change, tmp_path):
    """Though it is not trained in the subspace; its coordinates would mean another function."""
    model, _, x = pair(**options)
    change(model.body)
    now = model(x)
    assert torch.equal(model.merge()(x), now)
    model.load_state_dict(model.state_dict())
    with pytest.raises(SubspanError, match=r"head\.\w+ was taken out of the network after it was"):
        subspan.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    model.unwrap()(x)


def changes():
    yield "in place", lambda net: net.get_parameter("head.weight").data.zero_()
    yield "no_grad", lambda net: torch.no_grad()(lambda: net.head._parameters["weight"].add_(1))()
    yield "init", lambda net: nn.init.zeros_(dict(net.named_parameters())["head.weight"])
    yield "init by name", lambda net: nn.init.normal_(net.get_parameter("head.weight"))
    yield "init of data", lambda net: nn.init.uniform_(net.get_parameter("head.weight").data)
    yield "half and back", lambda net: dict(net.named_parameters())["head.weight"].data.mul_(1.001)


@pytest.mark.parametrize(("what", "change"), list(changes()), ids=[name for name, _ in changes()])
def test_another_base_is_noticed_by_name(what, change, tmp_path):
    model, _, x = pair()
    change(model.body)
    assert torch.equal(model.merge()(x), model(x))
    for use in (
        lambda: subspan.save(model, tmp_path / "m"),
        model.state_dict,
        model.body.state_dict,
    ):
        with pytest.raises(SubspanError, match=r"θ₀ of head.weight was changed after"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.clamp_(-0.01, 0.01),
        lambda p: p.clamp_(max=0.01),
        lambda p: p.detach_().renorm_(2, 0, 1.0),
        lambda p: p.mul_(torch.rand_like(p) > 0.5),
        lambda p: p.data.__imul__(torch.ones_like(p.data)),
        lambda p: p.data.__setitem__(p.data.abs() < 0.1, 0),
        lambda p: p.masked_fill_(p.data > 0, 0),
        lambda p: p.data.round_(decimals=2),
        lambda p: torch._foreach_clamp_max_([p], 0.01),
        lambda p: torch._foreach_mul_([p.data], [torch.zeros_like(p.data)]),
        lambda p: p.detach().clamp_(-0.01, 0.01),
        lambda p: setattr(p, "data", p.data.clamp(-0.01, 0.01)),
        lambda p: setattr(p, "data", torch.where(p.data > 0, p.data, 0)),
        lambda p: p.data.copy_(p.data.sign() * 0.01),
        lambda p: p.copy_((p.detach() > 0).float() * p.detach()),
        lambda p: p.data.copy_(nn.functional.normalize(p.data, dim=1)),
        lambda p: p.data.tril_(),
        # some of them alone: pruned by indices, rows that begin anew
        lambda p: p.data.__setitem__(0, 0),
        lambda p: p.__setitem__((slice(None), slice(3)), 0),
        lambda p: p.data.view(-1).__setitem__(p.data.abs().view(-1).argsort()[:20], 0),
        lambda p: p.data.view(-1).index_fill_(0, torch.arange(3), 0),
        lambda p: p[0].zero_(),
        lambda p: nn.init.normal_(p.data[0]),
        lambda p: p.data.mT[1].mul_(2),
        lambda p: [row.add_(1) for row in p.data],
        lambda p: p.data.view(-1).split(10)[1].fill_(0),
        lambda p: p.detach().T.clamp_(-0.01, 0.01),
    ],
)
def test_bounds_and_masks_of_the_base_are_refused(change):
    """They are not those of the weight: a critic's weights were not clipped, nor pruned ones 0."""
    model, _, x = pair()
    before = model(x).detach()
    with (
        torch.no_grad(),
        pytest.raises(SubspanError, match=r"weight among parameters\(\) is θ₀.*a"),
    ):
        change(model.body.get_parameter("head.weight"))
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "follow",
    [
        lambda target, p: target.copy_(p),
        lambda target, p: target.copy_(p.data),
        lambda target, p: target.mul_(0.9).add_(p, alpha=0.1),
        lambda target, p: target.lerp_(p, 0.1),
        lambda target, p: torch._foreach_lerp_([target], [p], 0.1),
    ],
)
def test_the_base_is_not_copied_to_another_networks_parameter(follow):
    """A target network that is an ordinary one would follow θ₀."""
    model, merged, _ = pair()
    base, target = model.body.get_parameter("head.weight"), merged.head.weight
    with (
        torch.no_grad(),
        pytest.raises(SubspanError, match=r"weight among parameters\(\) is θ₀.*re"),
    ):
        follow(target, base)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.coordinates["global"].mul_(2)
        for mine, p in zip(other.body.parameters(), model.body.parameters(), strict=True):
            follow(mine, p)
        torch._foreach_copy_(list(other.body.parameters()), list(model.body.parameters()))
    torch.testing.assert_close(other.merge().head.weight, model.merge().head.weight)


def test_what_does_the_same_to_base_and_coordinates_is_not_refused():
    model, merged, x = pair()
    with torch.no_grad():
        for p in model.body.parameters():  # what is made of it and not written back
            p.data.abs().mul_(p.data.abs()).clamp_(0, 1)
            torch.zeros_like(p).copy_(p.data.clamp(0, 1))
        for net in (model.body, merged):
            for p in net.parameters():
                p.data.mul_(0.5).div_(2)
                p *= torch.tensor(3.0)
                torch._foreach_mul_([p], 1 / 3)
                p.data.copy_(p.data * 2)
                p.data[:] = p.data[...] / 2
                p.data.view(-1).add_(0.1).sub_(0.1)
    torch.testing.assert_close(model(x), merged(x))
    data = model.body.get_parameter("head.weight").data
    assert type(pickle.loads(pickle.dumps(data))) is type(copy.deepcopy(data)) is torch.Tensor


def test_an_array_of_the_base_is_read_only():
    """Writing to it would not change the weight, as no change of θ₀ in place does."""
    model, _, _ = pair()
    base = model.body.get_parameter("head.weight")
    for array in (base.numpy(), base.data.numpy(), base.detach().numpy(), np.asarray(base.data)):
        assert array.shape == (4, 16)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    base.data.clone().numpy()[0] = 0


def test_a_loop_that_unfreezes_all_does_not_train_what_stays():
    model, _, x = pair(exclude="head")
    net = model.body
    for flag in (False, True):
        for p in net.parameters():
            p.requires_grad_(flag)
    with pytest.raises(SubspanError, match=r"requires_grad of head\.\w+, which stays at θ₀, was s"):
        model(x)
    net.head.requires_grad_(False)
    model(x)
    for flag in (False, True):
        model.requires_grad_(flag)
    model(x)
    assert not net.head.weight.requires_grad


def test_a_loop_that_unfreezes_all_passes_empty_parameters_by():
    net, x = Net(), torch.randn(5, 8)
    net.empty = nn.Parameter(torch.empty(0, 3))
    model = SubspaceModel(net, 20)
    for flag in (False, True):
        net.requires_grad_(flag)
        assert model(x).requires_grad is flag


def test_a_frozen_weight_that_is_trained_besides_is_noticed(tmp_path):
    model, _, x = pair(exclude="head")
    model.body.head.requires_grad_(True)
    optimizer = SGD(model.body.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    with pytest.raises(SubspanError, match=r"θ₀ of head.bias, head.weight was changed"):
        subspan.save(model, tmp_path / "m")


def test_moving_and_converting_is_no_change(tmp_path):
    for convert in (
        lambda m: m.double(),
        lambda m: m.to("cpu"),
        lambda m: m.body.bfloat16(),
    ):
        model, _, _ = pair()
        convert(model)
        model.state_dict()
        subspan.save(model, tmp_path / "m")


@pytest.mark.parametrize("stepped", [False, True])
def test_an_optimizer_of_before_is_refused_at_its_first_step(stepped):
    SubspaceModel(Net(), 20)  # from the first on, steps are looked at
    net, x = Net(), torch.randn(5, 8)
    optimizer = Adam(net.parameters())
    if stepped:
        net(x).sum().backward()
        optimizer.step()
    model = SubspaceModel(net, 20)
    model(x).sum().backward()
    with pytest.raises(SubspanError, match=r"the optimizer has .* frozen .*: make it anew"):
        optimizer.step()
    model.unwrap()(x).sum().backward()
    optimizer.step()


def test_a_gradient_of_before_moves_and_clips_nothing():
    net, x = Net(), torch.randn(5, 8)
    net(x).square().sum().backward()
    model = SubspaceModel(net, 20, exclude="body.0", train_fully="head.bias")
    bias = net.head.bias.grad.clone()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["head.bias"]
    model(x).sum().backward()
    Adam(net.parameters()).step()
    assert not torch.equal(net.head.bias.grad, bias)
    model.state_dict()  # θ₀ is what it was


def test_a_gradient_of_the_base_is_refused():
    """Surgery on gradients, a server's gradients: a step would move θ₀ beside its coordinates."""
    model, _, _ = pair()
    for p in model.body.parameters():
        p.grad = None
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    base = model.body.get_parameter("head.weight")
    for name in ("grad", "_grad"):
        with pytest.raises(SubspanError, match=r"head\.weight among parameters\(\) is.*gradient"):
            setattr(base, name, torch.zeros_like(base))
    assert base.grad is None


def test_an_optimizer_of_parts_is_refused():
    model, _, _ = pair()
    parts = [{"params": model.body.body.parameters()}, {"params": model.body.head.parameters()}]
    for grad in (True, False):  # without one a weight that is read is a leaf
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(SubspanError, match=r"body\.0\.weight is computed, and an optimizer has"),
        ):
            Adam(parts)


def test_the_network_and_the_handle_train_alike():
    torch.manual_seed(0)
    one, x = SubspaceModel(Net(), 20, train_fully="head.bias"), torch.randn(5, 8)
    other = copy.deepcopy(one).body
    for net in (one, other):
        optimizer = Adam(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    assert torch.equal(one(x), other(x))


def test_what_is_added_is_in_a_state_and_cannot_be_in_a_file(tmp_path):
    model, _, _ = pair()
    model.body.adapter = nn.Linear(4, 4)
    assert "adapter.weight" in model.body.state_dict()
    assert "body.adapter.weight" in dict(model.named_parameters())
    with pytest.raises(SubspanError, match=r"adapter.weight was added after the network was wrap"):
        subspan.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    del model.body.adapter
    subspan.save(model, tmp_path / "m")


def test_a_forward_that_replaces_coordinates_or_sets_flags():
    class Sets(Net):
        def forward(self, x):
            hidden = self.body(x)
            self.how()
            return self.head(hidden)

    torch.manual_seed(0)
    model, x = scatter(SubspaceModel(Sets(), 20)), torch.randn(5, 8)
    w, hidden = model.coordinates["global"], model.merge().body(x)
    model.body.how = lambda: setattr(w, "data", w.data * 0)
    y = model(x)
    torch.testing.assert_close(y, model.merge().head(hidden))  # w is 0 by now
    model.body.how = lambda: [p.requires_grad_(p.dim() == 1) for p in model.body.parameters()]
    with pytest.raises(SubspanError, match="was set to False, but its coordinates"):
        model(x)
