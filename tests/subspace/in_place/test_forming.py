"""θ of a large network: formed when it is read, dropped after use, formed again in the backward."""

import copy
from functools import partial
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.func import jvp, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from subspan import SubspaceModel, SubspanError
from subspan.families import base
from subspan.subspace import formed, forming
from tests.nets import scatter


class Decoder(nn.Module):
    """Blocks with a tied head, perhaps under checkpoints."""

    def __init__(self, how=None):
        super().__init__()
        self.how = how
        self.words = nn.Embedding(11, 24)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))
            for _ in range(3)
        )

    def forward(self, x):
        x = self.words(x)
        for block in self.blocks:
            if self.how is None:
                x = x + block(x)
            elif callable(self.how):
                x = x + self.how(block, x, use_reentrant=False)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return x @ self.words.weight.T


WORDS = torch.arange(22).view(2, 11) % 11


def trained(monkeypatch, kept, how=None, dtype=torch.float32, autocast=False, **options):
    """Output and gradient of one backward pass."""
    monkeypatch.setattr(formed, "KEPT", kept)
    torch.manual_seed(0)
    model = scatter(SubspaceModel(Decoder(how).to(dtype), 50, **options))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(WORDS)
    out.float().square().mean().backward()
    return out.detach(), torch.cat([w.grad for w in model.coordinates.values()])


@pytest.mark.parametrize("options", [{}, {"compartments": "layer"}, {"compartments": "uniform:3"}])
@pytest.mark.parametrize("projection", ["hash", "rademacher", "fastfood"])
def test_the_same_numbers_as_if_all_were_kept(monkeypatch, projection, options):
    y, gradient = trained(monkeypatch, 1 << 22, projection=projection, **options)
    also, other = trained(monkeypatch, 0, projection=projection, **options)
    torch.testing.assert_close(also, y, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [0, 1 << 22])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_nothing(monkeypatch, kept, how, dtype, autocast):
    y, gradient = trained(monkeypatch, kept, dtype=dtype, autocast=autocast)
    also, other = trained(monkeypatch, kept, how, dtype, autocast)
    assert torch.equal(also, y)
    assert other.abs().sum() > 0
    assert_close_in(dtype, other, gradient)


POLICIES = {
    "products": [torch.ops.aten.addmm.default, torch.ops.aten.mm.default],
    "everything": lambda *_, **__: CheckpointPolicy.MUST_SAVE,
}


@pytest.mark.parametrize("kept", [0, 1 << 22])
@pytest.mark.parametrize("saved", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compartments", ["global", "uniform:3"])
def test_a_selective_checkpoint_changes_nothing(monkeypatch, kept, saved, dtype, compartments):
    """It pairs the operators of both runs in order; those that form θ are not in both."""
    contexts = partial(create_selective_checkpoint_contexts, POLICIES[saved])
    options = {"dtype": dtype, "compartments": compartments}
    y, gradient = trained(monkeypatch, kept, **options)
    also, other = trained(monkeypatch, kept, partial(checkpoint, context_fn=contexts), **options)
    assert torch.equal(also, y)
    torch.testing.assert_close(other, gradient)


def assert_close_in(dtype, gradient, expected):
    """Compare; a tied weight's two gradients are rounded to 16 bits before or after their sum."""
    digits = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
    assert (gradient - expected).norm() <= digits * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(monkeypatch, dtype):
    y, gradient = trained(monkeypatch, 1 << 22, dtype=dtype)
    also, other = trained(monkeypatch, 0, dtype=dtype)
    assert torch.equal(also, y)
    assert gradient.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close_in(dtype, other, gradient)


def test_a_second_derivative(monkeypatch):
    found = []
    for kept in (1 << 22, 0):
        monkeypatch.setattr(formed, "KEPT", kept)
        torch.manual_seed(0)
        model = scatter(SubspaceModel(Decoder(), 50))
        w = model.coordinates["global"]
        (first,) = torch.autograd.grad(model(WORDS).square().mean(), w, create_graph=True)
        first.square().sum().backward()
        found.append(w.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def peak(run):
    """The most bytes that PyTorch's allocator held at a time, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_one_tensor(monkeypatch, autocast, dtype):
    """θ, what it is formed from a block at a time, and its gradient; not eight of each."""
    monkeypatch.setattr(formed, "KEPT", 0)
    monkeypatch.setattr(base, "BLOCK", 1 << 12)
    net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8))).to(dtype)
    layer = copy.deepcopy(net[0])
    model, x = scatter(SubspaceModel(net, 30)), torch.randn(5, 256).to(dtype).requires_grad_()

    def step(network=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = (network or model)(x)
        y.float().square().mean().backward()

    def ordinary():  # its gradients, and what products of 16 bits take on this processor
        step(layer)

    step()
    ordinary()
    # A gradient freed under the profiler counts or not, by what lay at its address before.
    layer.weight.grad = None
    one = 256 * 256 * (2 if autocast else x.element_size())
    assert peak(step) < peak(ordinary) + 2.3 * one
    monkeypatch.setattr(formed, "KEPT", 1 << 22)
    model = scatter(SubspaceModel(model.unwrap(), 30))
    assert peak(step) > 8 * one


def test_coordinates_that_change_before_the_backward_pass(monkeypatch):
    monkeypatch.setattr(formed, "KEPT", 0)
    model = SubspaceModel(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), 30)
    y = model(torch.randn(2, 8)).sum()
    with torch.no_grad():
        model.coordinates["global"].add_(1)
    with pytest.raises(
        RuntimeError, match=r"coordinates of 1\.weight.* were modified by an inplace"
    ):
        y.backward()


@pytest.mark.parametrize("kept", [0, 1 << 22])
def test_data_that_are_given_before_the_backward_pass(monkeypatch, kept):
    """As in an ordinary network, they count from the next pass on."""
    monkeypatch.setattr(formed, "KEPT", kept)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    model, x = scatter(SubspaceModel(net, 30)), torch.randn(2, 8)

    def gradients(between):
        model.zero_grad()
        y = model(x).square().sum()
        between()
        y.backward()
        return model.coordinates["global"].grad.clone()

    def give():
        for p in net.parameters():
            p.data = p.data + 1

    torch.testing.assert_close(gradients(lambda: None), gradients(give))


def test_activations_that_change_before_the_backward_pass(monkeypatch):
    class Careless(nn.Sequential):
        def forward(self, x):
            x = self[0](x).exp()
            y = self[1](x)
            x.add_(1)
            return y

    monkeypatch.setattr(formed, "KEPT", 0)
    net = Careless(nn.Linear(8, 8), nn.Linear(8, 8))
    y = SubspaceModel(net, 30)(torch.randn(2, 8)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_hooks_around_a_call_see_what_is_saved(monkeypatch):
    monkeypatch.setattr(formed, "KEPT", 0)
    torch.manual_seed(0)
    model, x = (
        scatter(SubspaceModel(nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 8)), 30)),
        torch.rand(3, 8),
    )
    model(x).square().sum().backward()
    w = model.coordinates["global"]
    expected, w.grad = w.grad, None
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor

    def unpack(tensor):
        unpacked.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = model(x).square().sum()
    y.backward()
    assert torch.equal(w.grad, expected)
    assert (3, 8) in packed
    assert sorted(packed) == sorted(unpacked)
    assert not {(8, 9), (9, 8)} & set(packed)


def test_transforms_inside_of_a_forward_are_refused_with_the_way_out(monkeypatch):
    class Inner(nn.Linear):
        def forward(self, x):
            return torch.func.grad(lambda x: super(Inner, self).forward(x).sin().sum())(x)

    monkeypatch.setattr(formed, "KEPT", 0)
    model, x = scatter(SubspaceModel(Inner(8, 8), 30)), torch.rand(3, 8)
    with pytest.raises(SubspanError, match=r"disable_saved_tensors_hooks\(''\), which keeps them"):
        model(x)
    with torch.autograd.graph.disable_saved_tensors_hooks(""):
        y = model(x)
    torch.testing.assert_close(y, model.merge()(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own rules
def test_forward_derivatives_inside_of_a_forward(monkeypatch):
    """Autograd saves tensors without memory there, and θ is known by the place of its memory."""

    class Slopes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return vmap(lambda row: self.head(jvp(self.layer, (row,), (row,))[1]))(x)

    monkeypatch.setattr(formed, "KEPT", 0)
    torch.manual_seed(0)
    model, x = scatter(SubspaceModel(Slopes(), 30)), torch.rand(3, 8, requires_grad=True)
    found, want = (net(x).square().sum() for net in (model, model.merge()))
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(want, x))


def test_a_large_cell_is_formed_once_for_its_steps(monkeypatch):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.RNNCell(4, 4)

        def forward(self, x):
            hidden = torch.zeros(2, 4)
            for _ in range(6):
                hidden = self.cell(x, hidden)
            return hidden

    monkeypatch.setattr(formed, "KEPT", 39)  # of 40 weights: all but the last are kept
    formed_now, once = [], forming.form_values
    monkeypatch.setattr(
        forming, "form_values", lambda *a, **k: formed_now.append(1) or once(*a, **k)
    )
    model = scatter(SubspaceModel(Steps(), 10))
    with torch.no_grad():
        model(torch.rand(2, 4))
    large = len(formed_now)
    formed_now.clear()
    monkeypatch.setattr(formed, "KEPT", 40)
    model = scatter(SubspaceModel(Steps(), 10))
    assert not model.subspace.large
    with torch.no_grad():
        model(torch.rand(2, 4))
    assert len(formed_now) == 1
    assert large <= 24


def test_autocast_forms_theta_in_its_precision_only_for_layers_that_cast_it(monkeypatch):
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x) * self.layer.weight.norm()

    monkeypatch.setattr(formed, "KEPT", 0)
    torch.manual_seed(0)
    model, x = scatter(SubspaceModel(Norms(), 30)), torch.rand(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = model(x), model.merge()(x)
    assert torch.equal(y, expected)


def large(monkeypatch, *layers):
    """A model of more weights than are kept, where 2⁹ of them make a tensor small."""
    monkeypatch.setattr(formed, "KEPT", 1 << 18)
    torch.manual_seed(0)
    return scatter(SubspaceModel(nn.Sequential(*layers), 30))


def test_small_tensors_of_a_large_network_are_formed_together_and_once(monkeypatch):
    layers = [nn.Linear(300, 300) for _ in range(4)]
    model, x = large(monkeypatch, *layers), torch.randn(2, 300)
    formed_now, once = [], forming.form_values
    monkeypatch.setattr(
        forming, "form_values", lambda *a, **k: formed_now.append(a[2]) or once(*a, **k)
    )
    loss = model(x).square().mean()
    assert [len(group) for group in formed_now] == [1, 4, 1, 1, 1]
    loss.backward()
    merged = model.merge()
    merged(x).square().mean().backward()
    g = torch.cat([p.grad.flatten() for p in merged.parameters()])
    (w,), (p,) = model.parameters(), model.subspace.projections
    torch.testing.assert_close(w.grad, p.rmatvec(g), atol=1e-6, rtol=1e-4)


def test_autograd_gets_as_many_weights_as_the_largest_tensor_has(monkeypatch):
    layers = nn.Embedding(700, 300), nn.Linear(300, 400, False), nn.Linear(400, 300, False)
    model = large(monkeypatch, *layers)
    assert model.subspace.largest == 210_000
    again, made_again = formed.Formula.again, []
    monkeypatch.setattr(formed.Formula, "again", lambda f: made_again.append(f.name) or again(f))
    model(torch.arange(5)).sum().backward()
    assert made_again == ["2.weight"]  # 120,000 weights of the first and as many of the second


class Router(nn.Module):
    """A router that converts itself when it runs, as that of Switch Transformers does."""

    def __init__(self):
        super().__init__()
        self.inner, self.classifier = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.inner(x)
        self.classifier = self.classifier.to(torch.float32)
        return self.classifier(x.float())


@pytest.mark.parametrize("kept", [formed.KEPT, 0])
def test_a_part_that_is_converted_while_the_network_runs_has_its_new_precision(monkeypatch, kept):
    monkeypatch.setattr(formed, "KEPT", kept)
    model = scatter(SubspaceModel(Router().bfloat16(), 5))
    plain, x = model.merge(), torch.randn(4, 6, dtype=torch.bfloat16)
    out = model(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, model.merge()(x), rtol=0, atol=0)
    torch.testing.assert_close(out, plain(x), rtol=1e-2, atol=1e-2)
    out.sum().backward()
    assert model.coordinates["global"].grad.any()
