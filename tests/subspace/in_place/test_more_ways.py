"""Ways that people found round a network in a subspace: each is right now, or refused."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.optim import LBFGS

import subspan
from subspan import SubspaceModel, SubspanError
from tests.nets import scatter
from tests.subspace.in_place.network import Net, pair, same_function

pytestmark = pytest.mark.usefixtures("forming")

# ---- weights that are given ----------------------------------------------------------------------


def test_a_tensor_that_was_put_before_a_weight_is_used():
    model, merged, x = pair()
    for head in (model.body.head, merged.head):  # past the check that it is a Parameter
        vars(head)["weight"] = torch.ones(4, 16)
    torch.testing.assert_close(model(x), merged(x))
    del vars(model.body.head)["weight"], vars(merged.head)["weight"]
    torch.testing.assert_close(model(x), merged(x))


def test_a_functional_call_of_a_part_uses_what_it_is_given():
    model, merged, x = pair()
    net, hidden = model.body, merged.body(x)
    own = dict(net.head.named_parameters())
    torch.testing.assert_close(
        functional_call(net.head, own, (hidden,)).as_subclass(torch.Tensor), merged.head(hidden)
    )
    other = {name: torch.ones_like(p) for name, p in own.items()}
    torch.testing.assert_close(
        functional_call(net.head, other, (hidden,)), functional_call(merged.head, other, (hidden,))
    )
    whole = {f"head.{name}": p for name, p in other.items()}
    torch.testing.assert_close(
        functional_call(net, whole, (x,)), functional_call(merged, whole, (x,))
    )
    torch.testing.assert_close(functional_call(net, model.weights(), (x,)), merged(x))
    batched = {f"head.{name}": torch.stack([p, 2 * p]) for name, p in other.items()}
    torch.testing.assert_close(
        vmap(lambda p: functional_call(net, p, (x,)))(batched),
        vmap(lambda p: functional_call(merged, p, (x,)))(batched),
    )


class Conditioned(nn.Module):
    """One of its layers has the weight that another one computes, and its own beside it."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Linear(8, 32), nn.Linear(8, 4)

    def forward(self, x):
        table = self.table(x.mean(0)).view(4, 8) + self.layer.weight
        y = functional_call(self.layer, {"weight": table}, (x,))
        return y + F.linear(x, self.layer.weight)


@pytest.mark.heavy
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_weight_that_is_given_inside_of_a_call_with_coordinates_is_used(lora, everything):
    torch.manual_seed(0)
    net, x = Conditioned(), torch.randn(5, 8)
    subspan.lora(net, 20, rank=2, targets=[".*"]) if lora else SubspaceModel(net, 20)
    given = {
        name: torch.randn_like(p)
        for name, p in net.named_parameters()
        if name == "subspan_global" or everything
    }
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.data.copy_(given.get(name, p.data))
    torch.testing.assert_close(functional_call(net, given, (x,)), other(x))
    every = vmap(lambda x: functional_call(net, given, (x,)))
    torch.testing.assert_close(every(x[None])[0], other(x))
    compiled = torch.compile(lambda x: functional_call(net, given, (x,)), backend="aot_eager")
    torch.testing.assert_close(compiled(x), other(x))


@pytest.mark.heavy
def test_so_it_is_where_the_coordinates_of_one_tensor_alone_are_given():
    torch.manual_seed(0)
    net, x = Conditioned(), torch.randn(5, 8)
    coordinates = SubspaceModel(net, 20, compartments="tensor").coordinates
    for name in ("table/weight", "layer/weight"):
        w, key = torch.randn_like(coordinates[name]), f"subspan_{name}"
        other = copy.deepcopy(net)
        other.load_state_dict(net.state_dict() | {key: w})

        def call(w, key=key):
            return functional_call(net, {key: w}, (x,))

        torch.testing.assert_close(call(w), other(x))
        torch.testing.assert_close(torch.compile(call, backend="aot_eager")(w), other(x))


@pytest.mark.heavy
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda net, x: torch.compile(net, backend="aot_eager"),
        lambda net, x: torch.export.export(net, (x,), strict=False).module(),
    ],
    ids=["compile", "export"],
)
def test_a_functional_call_in_a_graph_uses_what_it_is_given(make, lora):
    class Given(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.table = net, nn.Parameter(torch.ones(4, 16))

        def forward(self, x):
            return functional_call(self.net, {"head.weight": self.table * 2}, (x,))

    torch.manual_seed(0)
    net = Net().eval()
    model = scatter(subspan.lora(net, 20, rank=2) if lora else SubspaceModel(net, 20)).eval()
    x, given = torch.randn(5, 8), Given(net)
    want = Given(model.merge())(x)
    torch.testing.assert_close(given(x), want)
    torch.testing.assert_close(make(given, x)(x), want)


def test_coordinates_that_come_and_go_inside_of_a_forward():
    """Objects of the same number follow each other in memory."""

    class Ensemble(Net):
        def forward(self, x):
            if not hasattr(self, "variants"):
                return super().forward(x)
            found, variants = [], self.variants
            del self.variants
            for k in range(4):
                found.append(functional_call(self, {"subspan_global": variants[k].clone()}, (x,)))
                gc.collect()
            return torch.stack(found)

    torch.manual_seed(0)
    model, x = SubspaceModel(Ensemble(), 20), torch.randn(5, 8)
    variants = torch.randn(4, 20)
    want = []
    for w in variants:
        with torch.no_grad():
            model.coordinates["global"].copy_(w)
        want.append(model.merge()(x))
    model.variants = variants
    gc.freeze()  # so that collections go over little
    torch.testing.assert_close(model(x), torch.stack(want))


# ---- θ₀ and θ by other names ---------------------------------------------------------------------


class Keeps(nn.Module):
    """A network that keeps its parameters in a list of its own."""

    def __init__(self, read):
        super().__init__()
        self.fc, self.read = nn.Linear(8, 8, bias=False), read
        self.kept = [self.fc.weight]

    def forward(self, x):
        return x @ self.read(self.kept[0])


READS = {
    "itself": lambda p: p,
    "t": lambda p: p.t(),
    "T": lambda p: p.T,
    "rows": lambda p: p[:, :4],
    "view": lambda p: p.view(8, 8),
    "reshape": lambda p: p.reshape(4, 16).view(8, 8),
    "split": lambda p: p.split(4, dim=1)[0],
    "unbind": lambda p: p.unbind(1)[0],
    "iteration": lambda p: next(iter(p)),
    "vector": lambda p: torch.cat([p.view(-1)]).view(8, 8),
}


@pytest.mark.parametrize("what", READS)
def test_parameters_that_are_held_elsewhere_are_refused_in_a_product(what):
    model = scatter(SubspaceModel(Keeps(READS[what]), 20))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(SubspanError, match=r"fc\.weight among"):
            model(torch.randn(3, 8))


def test_reading_parameters_for_their_shape_and_memory_is_allowed():
    model, _, x = pair()
    for p in model.body.parameters():
        p.new_zeros(3), p.new(2), torch.zeros_like(p), torch.ones(p.numel()).view_as(p)
        p.isnan().any(), (p == p).all(), p.dim(), p.stride(), p.detach().norm(), p.data.abs()
    optimizer = LBFGS(model.body.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < before


def test_states_of_all_weights_are_not_for_writing():
    class Partly(Net):
        def load_some(self, some):
            own = self.state_dict()
            for name, value in some.items():
                own[name].copy_(value)

    model = scatter(SubspaceModel(Partly(), 20))
    x = torch.randn(2, 8)
    for write in (
        lambda: model.load_some({"head.weight": torch.ones(4, 16)}),
        lambda: model.body.head.state_dict()["weight"].zero_(),
        lambda: model.body.head.weight.detach().split(2)[0].zero_(),
    ):
        same_function(model, x, write)


def test_a_gradient_of_a_computed_weight_is_that_of_coordinates():
    model, _, x = pair()
    head = model.body.head
    model(x).sum().backward()
    for look in (
        lambda: head.weight.grad,
        lambda: torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0),
        lambda: head.weight.register_hook(print),
        lambda: torch.autograd.grad(model(x).sum(), head.weight),
        lambda: torch.autograd.grad(model(x).sum(), [head.weight], allow_unused=True),
    ):
        with pytest.raises(SubspanError, match=r"head\.\w+ is computed"):
            look()
    weight = head.weight  # read once, and used
    (slope,) = torch.autograd.grad(nn.functional.linear(torch.ones(16), weight).sum(), weight)
    assert torch.equal(slope, torch.ones(4, 16))


# ---- a network that changes itself, or is changed ------------------------------------------------


def _copies(weight):
    weight.copy_(nn.functional.normalize(weight))


def _copies_data(weight):
    weight.data.copy_(nn.functional.normalize(weight))


def _sets_data(weight):
    weight.data = nn.functional.normalize(weight)


@pytest.mark.parametrize("write", [_copies, _copies_data, _sets_data])
def test_a_forward_that_writes_to_its_weights_is_refused(write):
    class Normalises(Net):
        def forward(self, x):
            with torch.no_grad():
                write(self.head.weight)
            return super().forward(x)

    model = scatter(SubspaceModel(Normalises(), 20))
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(SubspanError, match=r"changed a weight of its own .* \(head\.weight\)"),
        ):
            model(torch.randn(5, 8))
    scatter(SubspaceModel(Normalises(), 20, exclude="head"))(torch.randn(5, 8))


def test_a_weight_that_is_not_finite_was_not_written_to():
    net = Net()
    net.head.weight.data[0, 0] = torch.nan
    SubspaceModel(net, 20)(torch.randn(5, 8))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_are_renormalised_when_they_are_read(kind):
    torch.manual_seed(0)
    model = scatter(SubspaceModel(nn.Sequential(kind(11, 6, max_norm=0.5), nn.Linear(6, 2)), 20))
    words = torch.arange(20).view(4, 5) % 11
    torch.testing.assert_close(model(words), model.merge()(words))
    model(words).square().sum().backward()
    assert model.coordinates["global"].grad.any()


def test_hooks_and_attributes_of_parameters():
    net = Net()
    net.head.weight.scale = 3
    handle = net.head.weight.register_hook(lambda g: 0 * g)
    with pytest.raises(SubspanError, match=r"head\.weight has a hook on its"):
        SubspaceModel(net, 20)
    handle.remove()
    model = SubspaceModel(net, 20)
    assert net.head.weight.scale == 3
    net.head.register_forward_hook(lambda module, *_: seen.append(module.weight.scale))
    seen = []
    model(torch.randn(2, 8))
    assert seen == [3]
    assert copy.deepcopy(model).unwrap().head.weight.requires_grad


@pytest.mark.parametrize("way", ["overwrite", "swap"])
def test_conversions_that_make_new_parameters(way):
    setting = getattr(torch.__future__, f"set_{way}_module_params_on_conversion")
    model, merged, x = pair()
    setting(True)
    try:
        model.body.double()
    finally:
        setting(False)
    torch.testing.assert_close(model(x.double()).float(), merged(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge()(x.double()), model(x.double()))


def test_a_base_that_lost_its_values_or_digits_is_noticed(tmp_path):
    for convert in (
        lambda net: net.to("meta").to_empty(device="cpu"),
        lambda net: net.bfloat16().float(),
    ):
        model, _, _ = pair()
        convert(model.body)
        with pytest.raises(SubspanError, match="was changed after the network was wrapped"):
            subspan.save(model, tmp_path / "m")


@pytest.mark.parametrize(
    ("values", "change"),
    [
        (torch.rand(5, 4), lambda p: torch.rand(7, 4)),
        (torch.rand(5, 4), lambda p: p.data.reshape(4, 5)),
        (torch.arange(20), lambda p: p.data + 1),
        (torch.rand(300) * 1j, lambda p: p.data * 1j),
    ],
    ids=["more rows", "another shape", "integers", "complex"],
)
def test_what_is_not_trained_is_noticed_whatever_becomes_of_it(values, change, tmp_path):
    net = Net()
    net.table = nn.Parameter(values, requires_grad=False)
    model = SubspaceModel(net, 20, targets="head")
    model.state_dict()
    with torch.no_grad():
        net.table.data = change(net.table)
    model(torch.randn(2, 8)).sum().backward()
    for leave in (model.state_dict, lambda: subspan.save(model, tmp_path / "m")):
        with pytest.raises(SubspanError, match="θ₀ of table was changed after the network was w"):
            leave()


@pytest.mark.parametrize("way", ["mul add", "copy", "data"])
def test_moving_averages_over_all_parameters(way):
    """Rounding moves equal parameters by their last digits: that is no other base."""
    model, _, x = pair()
    mean = copy.deepcopy(model.body)
    for _ in range(50):
        with torch.no_grad():
            model.coordinates["global"].add_(0.01)
            for ours, theirs in zip(mean.parameters(), model.body.parameters(), strict=True):
                if way == "mul add":
                    ours.mul_(0.9).add_(theirs, alpha=0.1)
                elif way == "copy":
                    ours.copy_(0.9 * ours.detach() + 0.1 * theirs.detach())
                else:
                    ours.data = 0.9 * ours.data + 0.1 * theirs.data
    handle = SubspaceModel.of(mean)
    torch.testing.assert_close(handle.merge()(x), mean(x))
    other = SubspaceModel(copy.deepcopy(model).unwrap(), 20)
    other.load_state_dict(handle.state_dict())
    torch.testing.assert_close(other(x), mean(x), rtol=1e-4, atol=1e-5)


def test_bias_only_by_flags_is_refused():
    model, _, x = pair()
    for name, p in model.body.named_parameters():
        p.requires_grad = "bias" in name
    with pytest.raises(SubspanError, match=r"bias was set to True, but its coordinates"):
        model(x)


class Adjoint(torch.autograd.Function):
    """Two steps of an ODE, whose backward pass asks for gradients of the parameters given to it."""

    @staticmethod
    def forward(ctx, part, start, *parameters):
        ctx.part, first = part, start + part(start)
        ctx.save_for_backward(start, first, *parameters)
        return first + part(first)

    @staticmethod
    def backward(ctx, grad):
        *states, parameters = *ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        total = [torch.zeros_like(p) for p in parameters]
        for state in reversed(states):
            with torch.enable_grad():
                here = state.detach().requires_grad_()
                inputs = (here, *parameters)
                found = torch.autograd.grad(ctx.part(here), inputs, grad, allow_unused=True)
            grad = grad + found[0]
            total = [a + (0 if b is None else b) for a, b in zip(total, found[1:], strict=True)]
        return None, grad, *total


def test_a_function_of_autograd_that_runs_a_part_again():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

        def forward(self, x, adjoint):
            if adjoint:
                return Adjoint.apply(self.part, x, *self.part.parameters())
            x = x + self.part(x)
            return x + self.part(x)

    torch.manual_seed(0)
    model, x = scatter(SubspaceModel(Flow(), 20)), torch.randn(5, 8)
    grads = []
    for adjoint in (False, True):
        model.zero_grad()
        sum(model(k * x, adjoint).square().sum() for k in (1, 2)).backward()
        grads.append(model.coordinates["global"].grad.clone())
    model.zero_grad()
    part = model.body.part
    for k in (1, 2):
        Adjoint.apply(part, k * x, *part.parameters()).square().sum().backward()
    grads.append(model.coordinates["global"].grad)
    torch.testing.assert_close(grads[1:], [grads[0]] * 2)
    copy.deepcopy(model)


# ---- classes, containers, handles ----------------------------------------------------------------


def test_made_classes_make_ordinary_modules():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model, x = scatter(SubspaceModel(net, 20)), torch.randn(3, 8)
    merged = model.merge()
    assert type(net[0]) == nn.Linear  # noqa: E721
    assert {nn.Linear: "linear"}[type(net[0])] == "linear"
    assert type(net)() is not None
    torch.testing.assert_close(net[:2](x).as_subclass(torch.Tensor), merged[:2](x))
    torch.testing.assert_close(torch.Tensor(model[0](x)), merged[0](x))
    assert len(model) == 3
    assert [type(layer) for layer in model] == [type(layer) for layer in merged]
    fresh = type(net[0])(3, 2)
    assert type(fresh) is nn.Linear
    fresh.weight.data.zero_()

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterList([torch.rand(4) for _ in range(4)])

        def forward(self, x):
            return x * sum(self.scales[1:3])

    model = scatter(SubspaceModel(Listed(), 6))
    y = model(torch.ones(4))
    assert torch.equal(y, model.merge()(torch.ones(4)))
    assert y.requires_grad


def test_what_is_registered_through_the_handle_is_the_networks():
    model, _, _ = pair()
    model.register_buffer("table", torch.ones(2))
    model.add_module("extra", nn.Linear(2, 2))
    model.register_parameter("gain", nn.Parameter(torch.ones(1)))
    assert {"table", "extra", "gain"} <= set(dir(model.body)) & set(dir(model))
    for name in ("body", "recipe", "layout", "coordinates"):
        with pytest.raises(SubspanError, match=f"{name} is the SubspaceModel's own"):
            setattr(model, name, 3)


def test_the_state_of_an_ordinary_network_through_the_handle():
    model, merged, x = pair()
    torch.manual_seed(0)
    other = SubspaceModel(Net(), 20)
    other.load_state_dict(merged.state_dict(), strict=False)
    torch.testing.assert_close(other.eval()(x), model(x), rtol=1e-4, atol=1e-5)
    other = SubspaceModel(copy.deepcopy(model).unwrap(), 20)
    other.load_state_dict(model.body.state_dict())
    torch.testing.assert_close(other(x), model(x))


def test_copies_by_a_method_of_the_networks_own_are_refused():
    class Copies(Net):
        def __deepcopy__(self, memo):
            return Net()

    model = SubspaceModel(Copies(), 20)
    with pytest.raises(SubspanError, match="Copies has a __deepcopy__ of its own"):
        copy.deepcopy(model)


def clone_module(module):
    """Copy a module as MAML's libraries do: the same class and attributes, and other tensors."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__ | {
        "_parameters": {name: p.clone() for name, p in module._parameters.items()},
        "_buffers": {name: b.clone() for name, b in module._buffers.items()},
        "_modules": {name: clone_module(part) for name, part in module._modules.items()},
    }
    return clone


def test_copies_tensor_by_tensor_are_refused():
    model, _, x = pair()
    for original in (model, model.body):
        clone = clone_module(original)
        same_function(model, x, lambda clone=clone: clone(x))
    with pytest.raises(SubspanError, match="read from a module with a tensor of its own"):
        clone(x)


def test_a_file_is_not_loaded_around_a_model(tmp_path):
    model, _, x = pair()
    subspan.save(model, tmp_path / "m")
    for net in (model, model.body, nn.Sequential(model.body)):
        said = same_function(model, x, lambda net=net: subspan.load(tmp_path / "m", net))
        assert "in a subspace already" in said


def test_after_unwrapping_a_handle_is_of_no_use():
    model, _, x = pair()
    model.unwrap()
    for use in (lambda: model(x), lambda: list(model.parameters()), lambda: model.requires_grad_()):
        with pytest.raises(SubspanError, match="this SubspaceModel was unwrapped"):
            use()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parts_in_other_hands_are_refused(tmp_path):
    model, _, x = pair()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        said = same_function(model, x, lambda: DistributedDataParallel(model.body.head))
        assert "a part of a network in a subspace cannot be given to DDP" in said
    finally:
        torch.distributed.destroy_process_group()
    for scripted in (model.body, model.body.head):
        said = same_function(model, x, lambda net=scripted: torch.jit.script(net))
        assert "cannot be scripted" in said
    same_function(model, x, lambda: setattr(model.body.head, "weight", model.body.body[0].weight))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm"])
def test_what_computes_a_weight_is_not_taken_away(how):
    layer = nn.Linear(8, 8)
    if how == "prune":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    else:
        getattr(nn.utils, how)(layer)
    remove = {
        "prune": lambda: prune.remove(layer, "weight"),
        "weight_norm": lambda: nn.utils.remove_weight_norm(layer),
        "spectral_norm": lambda: nn.utils.remove_spectral_norm(layer),
    }
    model = scatter(SubspaceModel(nn.Sequential(layer).eval(), 20)).eval()
    same_function(model, torch.randn(3, 8), remove[how])
