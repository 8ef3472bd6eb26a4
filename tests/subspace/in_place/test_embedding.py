"""Embeddings of large networks: the rows of θ that are looked up, and no others."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from subspan import SubspaceModel
from subspan.subspace import embedding, formed
from tests.nets import scatter

ROWS, WIDTH = 211, 24
WORDS = torch.tensor([[0, 3, 3, 210], [0, 0, 7, 120], [5, 3, 9, 0]])


class Net(nn.Module):
    """A table with padding, and one more on the same words."""

    def __init__(self, how=None, **options):
        super().__init__()
        self.how = how
        self.words, self.more = nn.Embedding(ROWS, WIDTH, **options), nn.Embedding(ROWS, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        if self.how is None:
            found = self.words(ids)
        else:
            found = checkpoint(self.words, ids, use_reentrant=self.how == "reentrant")
        return self.head((found + self.more(ids)).tanh().sum(1))


class Tied(Net):
    """Another layer shares the table."""

    def forward(self, ids):
        return self.words(ids).sum(1) @ self.words.weight.T


@pytest.fixture(autouse=True)
def every_network_is_large(monkeypatch):
    monkeypatch.setattr(formed, "KEPT", 0)


def trained(net, dim=50, ids=WORDS, **options):
    """Output, and gradient of the coordinates."""
    torch.manual_seed(0)
    model = scatter(SubspaceModel(net(), dim, **options))
    out = model(ids)
    out.float().square().sum().backward()
    return out.detach(), torch.cat([w.grad for w in model.coordinates.values()])


def as_a_whole(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "SAVING", 1 << 40)
        return trained(*args, **kwargs)


NETS = {
    "padding": lambda: Net(padding_idx=0),
    "no padding": Net,
    "sparse": lambda: Net(sparse=True),
    "tied": Tied,
    "tied, with padding": lambda: Tied(padding_idx=0),
    "16 bits": lambda: Net(padding_idx=0).bfloat16(),
    "checkpoint": lambda: Net("not reentrant", padding_idx=0),
}


@pytest.mark.parametrize("dim", [50, 2000])  # with signs in the kernel's table, and without
@pytest.mark.parametrize("kind", NETS)
def test_the_same_numbers_as_of_all_rows(monkeypatch, formed_sizes, kind, dim):
    out, gradient = trained(NETS[kind], dim)
    assert (ROWS * WIDTH in formed_sizes) == ("tied" in kind)
    expected, theirs = as_a_whole(monkeypatch, NETS[kind], dim)
    assert formed_sizes.count(ROWS * WIDTH) >= 2
    assert torch.equal(out, expected)
    digits = 1e-2 if kind == "16 bits" else 1e-5
    assert (gradient - theirs).norm() <= digits * theirs.norm()


@pytest.mark.parametrize("padding", [0, None])
def test_a_reentrant_checkpoint(monkeypatch, padding):
    ids = WORDS.clone()

    class Outer(Net):
        def forward(self, ids):
            first = self.more(ids).tanh()
            found = checkpoint(lambda x: x + self.words(ids), first, use_reentrant=True)
            return self.head(found.sum(1))

    def net():
        return Outer(padding_idx=padding)

    out, gradient = trained(net, ids=ids)
    expected, theirs = as_a_whole(monkeypatch, net, ids=ids)
    assert torch.equal(out, expected)
    torch.testing.assert_close(gradient, theirs, rtol=1e-5, atol=1e-6)


def test_a_padding_row_that_another_layer_shares_has_no_gradient_of_the_look_up(monkeypatch):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(ROWS, WIDTH, padding_idx=2)
            self.again = nn.Embedding(ROWS, WIDTH)
            self.again.weight = self.words.weight

        def forward(self, ids):
            return (self.words(ids) + self.again(ids)).sum(1)

    ids = torch.tensor([[2, 3], [2, 4]])
    out, gradient = trained(Shared, ids=ids)
    expected, theirs = as_a_whole(monkeypatch, Shared, ids=ids)
    assert torch.equal(out, expected)
    torch.testing.assert_close(gradient, theirs, rtol=1e-5, atol=1e-6)


def test_a_second_derivative(monkeypatch):
    def second():
        torch.manual_seed(0)
        model = scatter(SubspaceModel(Net(padding_idx=0), 50))
        w = model.coordinates["global"]
        (first,) = torch.autograd.grad(model(WORDS).square().mean(), w, create_graph=True)
        first.square().sum().backward()
        return w.grad

    found = second()
    monkeypatch.setattr(embedding, "SAVING", 1 << 40)
    torch.testing.assert_close(found, second(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({"max_norm": 1.0}, WORDS),
        ({"scale_grad_by_freq": True}, WORDS),
        ({}, torch.arange(ROWS).view(1, -1)),
        ({}, torch.empty(3, 0, dtype=torch.int64)),
    ],
    ids=["max_norm", "scale_grad_by_freq", "all words", "no word"],
)
def test_otherwise_the_whole_table_is_formed(formed_sizes, options, ids):
    trained(lambda: Net(**options), ids=ids)
    assert ROWS * WIDTH in formed_sizes


@pytest.mark.parametrize("word", [-1, ROWS])
def test_a_word_outside_of_the_table_is_what_it_is_to_pytorch(word):
    model = SubspaceModel(Net(), 50)
    with pytest.raises(IndexError, match="index out of range in self"):
        model(torch.tensor([[word, 3]]))


def test_other_families_and_reads_without_a_graph(monkeypatch):
    torch.manual_seed(0)
    model = scatter(SubspaceModel(Net(), 50, projection="rademacher"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(WORDS), twin(WORDS))
        assert torch.equal(model(WORDS), model.merge()(WORDS))


def test_coordinates_of_a_functional_call():
    torch.manual_seed(0)
    model = SubspaceModel(Net(), 50)
    w = torch.randn(50)
    given = {name: w for name, _ in model.named_parameters() if "global" in name}
    assert len(given) == 1
    found = torch.func.functional_call(model, given, (WORDS,))
    with torch.no_grad():
        model.coordinates["global"].copy_(w)
    assert torch.equal(found, model(WORDS))


def test_a_transform_around_the_call():
    torch.manual_seed(0)
    model = scatter(SubspaceModel(Net(), 50))
    with torch.no_grad():
        apart = torch.vmap(lambda ids: model(ids.unsqueeze(0))[0])(WORDS)
        torch.testing.assert_close(apart, model(WORDS))


def test_many_gradients_in_one_backward_pass(formed_sizes):
    torch.manual_seed(0)
    model = scatter(SubspaceModel(Net(padding_idx=0), 50))
    (w,), y = model.coordinates.values(), model(WORDS)
    assert ROWS * WIDTH not in formed_sizes
    along = torch.eye(9).view(9, 3, 3)
    expected = torch.stack([torch.autograd.grad(y, w, v, retain_graph=True)[0] for v in along])
    for vmap in (torch.vmap, None):
        if vmap:
            found = vmap(lambda v: torch.autograd.grad(y, w, v, retain_graph=True)[0])(along)
        else:
            (found,) = torch.autograd.grad(y, w, along, is_grads_batched=True)
        torch.testing.assert_close(found, expected)


def test_a_class_with_a_forward_of_its_own_keeps_it():
    class Doubled(nn.Embedding):
        def forward(self, words):
            return 2 * super().forward(words)

    torch.manual_seed(0)
    net = Net()
    net.words = Doubled(ROWS, WIDTH)
    model = scatter(SubspaceModel(net, 50))
    assert torch.equal(model(WORDS), model.merge()(WORDS))
