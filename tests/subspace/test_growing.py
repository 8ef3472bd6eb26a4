"""Growing d in place: θ stays, the subspaces are nested, and optimizers go on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import subspan
from subspan import SubspaceModel, SubspanError
from subspan.subspace.growing import refine


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.BatchNorm1d(11), nn.Linear(11, 3))


def make_model(dim=5, **options):
    model = SubspaceModel(make_net(), dim, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for w in model.coordinates.values():
            w.normal_()
    return model


def step(model, optimizer, times=1):
    torch.manual_seed(3)
    for _ in range(times):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 7)).square().mean()
        loss.backward()
        optimizer.step()


def thetas(model):
    return {name: theta.detach().clone() for name, theta in model.weights().items()}


@pytest.mark.parametrize("dims", [(5, 10), (1, 7, 21), (3, 12, 24, 120)])
def test_theta_stays_to_rounding_where_buckets_divide_unevenly(dims):
    # D = 146 weights, of which no d here is a divisor.
    model = make_model(dims[0])
    before = thetas(model)
    for dim in dims[1:]:
        subspan.grow(model, dim)
        assert sum(w.numel() for w in model.coordinates.values()) == dim
    for name, theta in thetas(model).items():
        unit = torch.finfo(theta.dtype).eps * before[name].abs().clamp(min=1)
        assert ((theta - before[name]).abs() <= 2 * unit).all(), name


def test_entries_of_p_w_differ_by_one_unit_in_the_last_place_at_most():
    projection = subspan.projection("hash", out_dim=61_706, in_dim=25, seed=3)
    w = torch.randn(25, generator=torch.Generator().manual_seed(0))
    entries = projection.matvec(w)
    for dim in (50, 100, 300):
        after = subspan.projection("hash", out_dim=61_706, in_dim=dim, seed=3)
        grown = after.matvec(refine(w, projection, after))
        unit = torch.nextafter(entries.abs(), torch.tensor(torch.inf)) - entries.abs()
        assert ((grown - entries).abs() <= unit).all()
    quarter = subspan.projection("hash", out_dim=2000, in_dim=100, seed=3)
    whole = subspan.projection("hash", out_dim=2000, in_dim=25, seed=3)
    assert torch.equal(quarter.matvec(refine(w, whole, quarter)), whole.matvec(w))


def test_a_grown_model_is_the_model_of_that_dimension(tmp_path):
    model = make_model(5, train_fully="2.weight", exclude="3.bias")
    subspan.grow(model, 20)
    other = SubspaceModel(make_net(), 20, train_fully="2.weight", exclude="3.bias")
    assert model.recipe == other.recipe
    assert (model.layout, model.base_fingerprint) == (other.layout, other.base_fingerprint)
    assert torch.equal(model.fingerprint, other.fingerprint)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 7)
    assert torch.equal(model(x), other(x))
    subspan.save(model, tmp_path / "grown.safetensors")
    loaded = subspan.load(tmp_path / "grown.safetensors", make_net())
    assert torch.equal(model(x), loaded.train()(x))
    assert torch.equal(model.unwrap()[0].weight, make_net()[0].weight)


def test_grown_factors_of_lora_and_padding_are_read_again(tmp_path):
    def build():
        layers = nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3)
        return nn.Sequential(nn.Embedding(9, 7, padding_idx=2), *layers)

    for name, wrap in (
        ("lora", lambda dim: subspan.lora(build(), dim, rank=2, alpha=3)),
        ("padding", lambda dim: SubspaceModel(build(), dim)),
    ):
        torch.manual_seed(0)
        model = wrap(5)
        with torch.no_grad():
            next(iter(model.coordinates.values())).normal_()
        torch.manual_seed(0)
        x, before = torch.arange(9), model(torch.arange(9))
        subspan.grow(model, 10)
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
        torch.manual_seed(0)
        assert model.layout == wrap(10).layout
        subspan.save(model, tmp_path / name)
        torch.manual_seed(0)
        assert torch.equal(subspan.load(tmp_path / name, build())(x), model(x))


@pytest.mark.parametrize(
    ("rules", "dims", "grown", "expected"),
    [
        ("layer", [2, 1, 3], [4, 1, 9], {"dim": [4, 1, 9]}),
        ("layer", [2, 1, 3], 18, {"dim": [6, 3, 9]}),
        ({"0": 2, ".*": 4}, None, 12, {"compartments": [["0", 4], [".*", 8]], "dim": None}),
    ],
)
def test_compartments_grow_each(rules, dims, grown, expected):
    model = make_model(dims, compartments=rules)
    before = thetas(model)
    subspan.grow(model, grown)
    for name, theta in thetas(model).items():
        torch.testing.assert_close(theta, before[name], rtol=1e-6, atol=1e-6)
    assert {key: model.recipe[key] for key in expected} == expected
    again = SubspaceModel(make_net(), **model.recipe)
    assert again.layout == model.layout


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_next_step_of_adam_is_the_one_that_it_would_have_made(decay):
    """With no new gradient, memory alone moves θ: it must move it as before."""
    model = make_model(5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=decay)
    step(model, optimizer, 3)
    twin = copy.deepcopy(model)
    its = torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=decay)
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (w,) = model.coordinates.values()
    old = dict(optimizer.state[w])
    subspan.grow(model, 20, optimizer)
    (now,) = model.coordinates.values()
    state = optimizer.state[now]
    assert w not in optimizer.state
    assert state["step"] == old["step"]
    # m = Aᵀ m', and v' repeats v.
    sizes = [torch.bincount(torch.arange(146) % d, minlength=d).double() for d in (5, 20)]
    a = (sizes[1] / sizes[0].repeat(4)).sqrt()
    m = (a * state["exp_avg"]).view(4, 5).sum(0)
    torch.testing.assert_close(m.float(), old["exp_avg"])
    assert torch.equal(state["exp_avg_sq"], old["exp_avg_sq"].repeat(4))
    for some, one in ((model, optimizer), (twin, its)):
        for p in some.parameters():
            p.grad = torch.zeros_like(p)
        one.step()
    for name, theta in thetas(model).items():
        torch.testing.assert_close(theta, thetas(twin)[name], rtol=1e-5, atol=1e-6)


def test_squares_of_gradients_are_of_one_size_at_every_d():
    """The derivation of v' = v: over signs, the mean square of g does not depend on d."""
    g = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = []
    for dim in (16, 64, 256):
        squares = [
            subspan.projection("hash", out_dim=4096, in_dim=dim, seed=seed).rmatvec(g).square()
            for seed in range(40)
        ]
        means.append(float(torch.stack(squares).mean()))
    assert all(abs(mean - float(g.square().mean())) < 0.15 for mean in means), means


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
        lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    ],
)
def test_optimizers_go_on_with_the_new_coordinates(make):
    model = make_model(5, train_fully="3.bias")
    optimizer = make(model.parameters())
    step(model, optimizer, 2)
    subspan.grow(model, 10, optimizer)
    before = thetas(model)
    step(model, optimizer, 2)
    (w,) = model.coordinates.values()
    assert w.grad is not None
    assert w.shape == (10,)
    assert any(not torch.equal(theta, before[name]) for name, theta in thetas(model).items())
    assert {tuple(v.shape) for v in optimizer.state[w].values() if v.dim()} == {(10,)}


def test_an_optimizer_that_was_left_out_refuses_its_next_step():
    model = make_model(5)
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    subspan.grow(model.body, 10)  # the network alone will do
    with pytest.raises(SubspanError, match="give it to grow"):
        step(model, optimizer)
    step(model, torch.optim.Adam(model.parameters()))


def test_an_optimizer_that_holds_its_list_of_parameters_goes_on():
    model = make_model(5)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.01, max_iter=2)
    subspan.grow(model, 10, optimizer)
    before = thetas(model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(8, 7)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert any(not torch.equal(theta, before[name]) for name, theta in thetas(model).items())


def test_a_quantiser_rounds_the_new_coordinates():
    model = make_model(5)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    subspan.optim.Quantiser(model, optimizer, bits=3, steps=1, after=1)
    step(model, optimizer)
    subspan.grow(model, 10, optimizer)
    step(model, optimizer)
    (w,) = model.coordinates.values()
    assert (w / optimizer.param_groups[0]["quantiser_step"]).frac().abs().max() < 1e-5
    refused(model, 20, optimizer, match=r"grow before it begins, or remove\(\) it")


def test_what_holds_on_to_the_old_coordinates_is_refused():
    model = make_model(5)
    loss = model(torch.ones(8, 7)).square().mean()
    subspan.grow(model, 10)
    with pytest.raises(SubspanError, match=r"call backward\(\) before"):
        loss.backward()
    (w,) = model.coordinates.values()
    for register in (w.register_hook, w.register_post_accumulate_grad_hook):
        handle = register(lambda _: None)
        refused(model, 20, match="have hooks")
        handle.remove()
    model = make_model(1)  # whose state might be taken for numbers that are not of coordinates
    optimizer = torch.optim.Rprop(model.parameters())
    step(model, optimizer)
    refused(model, 2, optimizer, match="Rprop keeps 'prev'")
    optimizer = torch.optim.Adam(model.parameters())
    net = model.unwrap()
    net(torch.ones(8, 7)).sum().backward()
    with pytest.raises(SubspanError, match="taken out of the network"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's own, of an import
def test_an_optimizer_that_divides_its_parameters_is_refused(tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    meeting = f"file://{tmp_path}/meet"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        model = make_model(5)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        refused(model, 10, optimizer, match="optimizers of its own")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.heavy
def test_compiled_code_sees_the_new_coordinates():
    torch._dynamo.reset()
    model = make_model(5).eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 7)
    compiled(x)
    subspan.grow(model, 10)
    with torch.no_grad():
        next(iter(model.coordinates.values()))[7:].add_(1)
    torch.testing.assert_close(compiled(x), model(x))


def refused(model, dim, optimizer=None, match=""):
    before, recipe = model.state_dict(), dict(model.recipe)
    with pytest.raises(SubspanError, match=match):
        subspan.grow(model, dim, optimizer)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before | after)
    assert model.recipe == recipe


def test_what_is_not_nested_is_refused_and_nothing_changes():
    refused(make_model(5), 12, match="from 5 to 12.*multiple of the one before, as 10")
    refused(make_model(5), 3, match="from 5 to 3.*as 10")
    refused(make_model(5), 5, match="from 5 to 5.*as 10")
    refused(make_model([2, 1, 3], compartments="layer"), [2, 1, 3], match="from 6 to 6")
    refused(make_model(5), 160, match="146 weights")
    refused(make_model(5), [10, 20], match="2 dimensions for 1")
    refused(make_model(5), 0, match="positive integer")
    layers = make_model([2, 1, 3], compartments="layer")
    refused(layers, [4, 1, 4], match="from 3 to 4 in compartment '3'")
    refused(make_model(5, projection="fastfood"), 10, match="'fastfood' cannot grow")
    other = torch.optim.Adam(make_net().parameters())
    refused(make_model(5), 10, other, match="does not train these coordinates")
    model = make_model(5)
    optimizer = torch.optim.Adadelta(model.parameters())
    step(model, optimizer)
    refused(model, 10, optimizer, match="Adadelta keeps 'acc_delta'")
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    (moments,) = optimizer.state.values()
    moments["exp_avg"] = moments["exp_avg"].as_subclass(type("FewBits", (torch.Tensor,), {}))
    refused(model, 10, optimizer, match="Adam keeps 'exp_avg'")
    with pytest.raises(SubspanError, match="only a SubspaceModel"):
        subspan.grow(make_net(), 10)


def test_a_network_with_variants_is_refused():
    model = make_model(5)
    subspan.Variants(model)
    refused(model, 10, match="has variants")
