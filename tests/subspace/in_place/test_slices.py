"""Linear layers of a large weight: θ and its gradient in slices, never whole."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import subspan
from subspan import SubspaceModel, Variants
from subspan.subspace import formed, slices
from tests.nets import scatter

WIDTH, WORDS = 40, 300
HEAD = WIDTH * WORDS
X = torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH).sin()


class Net(nn.Module):
    """A head behind a small layer."""

    def __init__(self, how=None, bias=True):
        super().__init__()
        self.how, self.first = how, nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias)

    def forward(self, x):
        inside = self.first(x).tanh()
        if self.how is None:
            return self.head(inside)
        return checkpoint(self.head, inside, use_reentrant=self.how == "reentrant")


class Tied(nn.Module):
    """A head that shares its weight with a table, of which one row is padding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=1)
        self.head = nn.Linear(WIDTH, WORDS)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(x + self.words(torch.tensor([1, 299])).sum(0))


@pytest.fixture(autouse=True)
def sizes(monkeypatch, formed_sizes):
    """Let every network be large, with slices of seven rows; count what each call forms."""
    monkeypatch.setattr(formed, "KEPT", 0)
    monkeypatch.setattr(slices, "LARGE", WIDTH * WIDTH)
    monkeypatch.setattr(slices, "SLICE", 7 * WIDTH + 1)
    return formed_sizes


def trained(net, x=X, dim=50, autocast=False, **options):
    """Output, and gradients of the input and of the coordinates."""
    torch.manual_seed(0)
    own = net()
    x = x.detach().to(own.head.weight.dtype, copy=True).requires_grad_()
    model = scatter(SubspaceModel(own, dim, **options))
    with torch.autocast("cpu", enabled=autocast):
        out = model(x)
    out.float().square().sum().backward()
    return out.detach(), x.grad, torch.cat([w.grad for w in model.coordinates.values()])


def as_a_whole(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(slices, "LARGE", 1 << 40)
        return trained(*args, **kwargs)


NETS = {
    "bias": Net,
    "no bias": lambda: Net(bias=False),
    "tied, with padding": Tied,
    "64 bits": lambda: Net().double(),
    "16 bits": lambda: Net().bfloat16(),
    "checkpoint": lambda: Net("not reentrant"),
    "reentrant checkpoint": lambda: Net("reentrant"),
}


@pytest.mark.parametrize("dim", [50, 2000])
@pytest.mark.parametrize("kind", NETS)
def test_the_same_numbers_as_of_the_whole_weight(monkeypatch, sizes, kind, dim):
    found = trained(NETS[kind], dim=dim)
    assert sizes.count(7 * WIDTH) == 2 * (WORDS // 7)  # once in the backward pass
    assert HEAD not in sizes
    expected = as_a_whole(monkeypatch, NETS[kind], dim=dim)
    assert sizes.count(HEAD) >= 2
    digits = 1e-2 if kind == "16 bits" else 1e-5
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert (ours - theirs).norm() <= digits * theirs.norm()


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (2, 3, WIDTH), (0, WIDTH)])
def test_inputs_of_any_number_of_dimensions(monkeypatch, sizes, shape):
    torch.manual_seed(1)
    x = torch.randn(shape)
    found = trained(Net, x)
    assert HEAD not in sizes
    torch.testing.assert_close(found, as_a_whole(monkeypatch, Net, x), rtol=1e-4, atol=1e-5)


def test_autocast_forms_slices_in_its_dtype(monkeypatch, sizes):
    found = trained(Net, autocast=True)
    assert sizes.count(7 * WIDTH) == 2 * (WORDS // 7)  # a cast copy would not be formed again
    assert HEAD not in sizes
    expected = as_a_whole(monkeypatch, Net, autocast=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_slices_of_a_gradient_in_16_bits_are_added_in_float32(monkeypatch):
    class Head(Net):
        def forward(self, x):
            return self.head(x)

    monkeypatch.setattr(slices, "SLICE", 1)  # 300 gradients of the input
    _, x, _ = trained(lambda: Head().bfloat16())
    _, exact, _ = as_a_whole(monkeypatch, lambda: Head().bfloat16())
    assert (x - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_a_second_derivative(monkeypatch, sizes):
    def second():
        torch.manual_seed(0)
        model = scatter(SubspaceModel(Net(), 50))
        w = model.coordinates["global"]
        (first,) = torch.autograd.grad(model(X).square().mean(), w, create_graph=True)
        first.square().sum().backward()
        return w.grad

    found = second()
    assert HEAD not in sizes
    monkeypatch.setattr(slices, "LARGE", 1 << 40)
    torch.testing.assert_close(found, second(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["forward", "many rows", "at base", "variant", "orthogonal"])
def test_otherwise_the_whole_weight_is_formed(sizes, way):
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    net = Net()
    net.head = Own(WIDTH, WORDS) if way == "forward" else net.head
    projection = "orthogonal" if way == "orthogonal" else "hash"
    model = scatter(SubspaceModel(net, 50, projection=projection))
    x = X.repeat(10, 1) if way == "many rows" else X
    with torch.no_grad():
        expected = model.merge()(x)
        sizes.clear()
        if way == "at base":
            with model.at_base():
                model(x)
        elif way == "variant":
            variants = Variants(model)
            variants.add("one", model.coordinates["global"])
            model.eval()
            with variants.use("one"):
                torch.testing.assert_close(model(x), expected)
        else:
            torch.testing.assert_close(model(x), expected)
    assert 7 * WIDTH not in sizes


def test_transforms_and_functional_calls():
    torch.manual_seed(0)
    model = scatter(SubspaceModel(Net(), 50))
    key, w = next((n, p) for n, p in model.named_parameters() if "global" in n)
    with torch.no_grad():
        expected = model(X)
        apart = torch.vmap(lambda x: model(x.unsqueeze(0))[0])(X)
        torch.testing.assert_close(apart, expected)
    found = torch.func.functional_call(model, {key: w.detach().clone()}, (X,))
    torch.testing.assert_close(found, expected)
    along = torch.eye(3).unsqueeze(-1) * torch.ones(3, 3, WORDS)
    y = model(X[:3])
    apart = [torch.autograd.grad(y, w, v, retain_graph=True)[0] for v in along]
    (found,) = torch.autograd.grad(y, w, along, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(apart))


def test_coordinates_that_have_changed_meanwhile_have_no_gradient():
    model = SubspaceModel(Net(), 50)
    x = X.clone().requires_grad_()
    loss = model(x).square().sum()
    with torch.no_grad():
        model.coordinates["global"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_input_of_another_width_is_what_it_is_to_pytorch():
    with pytest.raises(RuntimeError, match=f"{WIDTH}x{WORDS}"):
        SubspaceModel(nn.Linear(WIDTH, WORDS), 50)(torch.ones(2, 3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_layouts_are_what_they_are_to_the_layer():
    torch.manual_seed(0)
    model = scatter(SubspaceModel(nn.Sequential(nn.Linear(WIDTH, WORDS), nn.Identity()), 50))
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(model(X.to_sparse()), expected)
        rows = model(torch.nested.nested_tensor([X[:2], X[2:]]))
        torch.testing.assert_close(torch.cat(rows.unbind()), expected)


def test_a_layer_with_large_factors_multiplies_by_them(monkeypatch, sizes):
    monkeypatch.setattr(slices, "LARGE", 1)
    torch.manual_seed(0)
    model = scatter(subspan.lora(Net(), 20, rank=2, targets=["first", "head"]))
    torch.testing.assert_close(model(X), model.merge()(X), rtol=1e-4, atol=1e-5)
    assert max(sizes) == 2 * WORDS  # B, which is formed as a whole


@pytest.mark.heavy
def test_a_copy_and_a_compiled_network_compute_the_same():
    torch.manual_seed(0)
    model = scatter(SubspaceModel(Net(), 50))
    expected = model(X)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), expected)
