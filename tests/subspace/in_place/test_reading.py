"""Whoever reads a weight of a network in a subspace gets θ; those who share it and copy it, too."""

import asyncio
import copy
import functools
import inspect
import pickle
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.optim import SGD

import subspan
from subspan import SubspaceModel, SubspanError
from subspan.subspace import formed
from tests.nets import NETS, batch, build, scatter, wrap
from tests.subspace.in_place.network import Net, pair

pytestmark = pytest.mark.usefixtures("forming")

every_net = pytest.mark.parametrize("name", NETS)


def test_the_network_is_still_itself():
    plain, net = build("cnn"), build("cnn")
    before = dict(net.named_parameters())
    hook = []
    net.conv.register_forward_hook(lambda *_: hook.append(1))
    SubspaceModel(net, 12)
    assert isinstance(net, NETS["cnn"])
    assert isinstance(net.conv, nn.Conv2d)
    assert str(net) == str(plain)
    assert type(net).__qualname__ == type(plain).__qualname__
    assert inspect.signature(net.forward) == inspect.signature(plain.forward)
    now = dict(net.named_parameters())
    assert list(now) == ["subspan_global", *before]
    for name, p in before.items():
        assert now[name] is p
        assert isinstance(p, nn.Parameter)
        assert (p.device, p.dtype, p.requires_grad) == (torch.device("cpu"), torch.float32, False)
    assert list(dict(net.named_buffers())) == ["subspan_fingerprint", *dict(plain.named_buffers())]
    net(batch("cnn"))
    assert hook


def reads():
    yield "the network", lambda net, x: net(x)
    yield "its forward", lambda net, x: net.forward(x)
    yield "its parts", lambda net, x: net.head(net.body(x))
    yield "a part of a part", lambda net, x: net.head(net.body[1](net.body[0](x)))
    yield "a weight", lambda net, x: nn.functional.linear(x, net.body[0].weight)
    yield "its transpose", lambda net, x: x @ net.body[0].weight.t()
    yield "getattr", lambda net, x: getattr(net.head, "bias")  # noqa: B009
    yield "__getattr__", lambda net, x: net.head.__getattr__("bias")
    yield "a property", lambda net, x: net.scale
    yield "a generator", lambda net, x: list(net.stream(x))[-1]
    yield "a coroutine", lambda net, x: asyncio.run(net.answer(x))
    yield "a call inside a call", lambda net, x: net(x, depth=2)
    yield "parameters of a part", lambda net, x: net.part_penalty()
    yield "vmap", lambda net, x: vmap(net)(x)
    yield "a part's state", lambda net, x: net.body.state_dict()["0.weight"]


@pytest.mark.parametrize(("what", "read"), list(reads()), ids=[name for name, _ in reads()])
@pytest.mark.parametrize("through", ["network", "handle"])
def test_every_read_gives_theta(what, read, through):
    model, merged, x = pair()
    if through == "handle" and what == "a call inside a call":
        model.load_state_dict(model.state_dict())
    net = model.body if through == "network" else model
    if through == "handle" and what in ("its parts", "a part of a part", "a weight"):
        net = model.body  # the handle's own body is the network, not the network's part
    if through == "handle" and what in ("its transpose", "parameters of a part", "a part's state"):
        net = model.body
    got, want = read(net, x), read(merged, x)
    torch.testing.assert_close(torch.Tensor(got.detach()), want.detach(), rtol=1e-6, atol=1e-6)
    base = read(copy.deepcopy(model).unwrap(), x)
    assert not torch.allclose(base, want)
    if what != "a part's state":
        assert got.requires_grad
        (slope,) = torch.autograd.grad(got.sum(), [model.coordinates["global"]])
        assert slope.any()


def test_the_gradient_is_the_same_by_every_way():
    model, _, x = pair()
    (w,) = model.coordinates.values()
    ways = [
        model(x),
        model.body(x),
        model.body.head(model.body.body(x)),
        list(model.stream(x))[-1],
        asyncio.run(model.answer(x)),
    ]
    want, *others = [torch.autograd.grad(way.square().sum(), w)[0] for way in ways]
    for other in others:
        torch.testing.assert_close(other, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["step", "fused", "data", "load", "lora", "grow"])
def test_a_weight_that_was_read_before_its_coordinates_changed_is_out_of_date(what):
    """A parameter would have followed: a penalty on what was read before a loop, say."""
    model, _, x = pair()
    if what == "lora":
        model = scatter(subspan.lora(Net(), 20, rank=2, targets=".*"))
    net = model.body
    kept = net.head.weight
    views = [kept, kept[0], kept.T, kept.detach()]
    copies = [kept.detach().clone(), copy.deepcopy(kept)]
    [view.sum() for view in views]
    if what == "load":
        scatter(twin := copy.deepcopy(model))
        model.load_state_dict(twin.state_dict())
    elif what == "grow":
        subspan.grow(model, 40)
    elif what == "data":
        for w in model.parameters():
            w.data = w.data + 1
    else:
        optimizer = SGD(model.parameters(), lr=0.1, fused=what == "fused")
        model(x).square().sum().backward()
        optimizer.step()
    for view in views:
        assert view.dtype == torch.float32
        for use in (
            lambda v=view: v.square(),
            lambda v=view: torch.add(1, v),
            lambda v=view: str(v),
        ):
            with pytest.raises(SubspanError, match=r"head\.weight was read before its coordinates"):
                use()
    assert torch.equal(*copies)
    net.head.weight.sum()
    with model.at_base():
        base = net.head.weight
    base.sum()
    model.unwrap()


KEPT = {
    "attribute": (lambda w: w, lambda kept: kept),
    "view": (lambda w: w.t(), lambda kept: kept.t()),
    "list": (lambda w: [w], lambda kept: kept[0]),
    "function": (
        lambda w: partial(nn.functional.linear, weight=w),
        lambda kept: kept.keywords["weight"],
    ),
}


class Keeping(nn.Module):
    """A network that reads a weight at its first call, and keeps it for those that follow."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.head, self.kept = nn.Linear(8, 8), nn.Linear(8, 4), None
        self.keep, self.use = KEPT[how]

    def forward(self, x):
        if self.kept is None:
            self.kept = self.keep(self.layer.weight)
        return self.head(nn.functional.linear(x, self.use(self.kept), self.layer.bias))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("how", KEPT)
def test_a_weight_that_the_network_keeps_from_a_call_is_refused_when_it_is_out_of_date(how, graph):
    torch.manual_seed(0)
    model, x = scatter(SubspaceModel(Keeping(how), 20)), torch.randn(5, 8)
    with torch.set_grad_enabled(graph):
        want = model(x)
    torch.testing.assert_close(model(x), want)
    with model.at_base(), pytest.raises(SubspanError, match=r"layer\.weight was read before"):
        model(x)
    scatter(model)
    with pytest.raises(
        SubspanError, match=r"layer\.weight was read before its coordinates changed"
    ):
        model(x)
    model.body.kept = None
    model(x)


def test_a_weight_that_is_kept_at_each_call_may_be_penalised():
    class Noting(Keeping):
        def forward(self, x):
            self.kept = None
            return super().forward(x)

    torch.manual_seed(0)
    model, x = scatter(SubspaceModel(Noting("attribute"), 20)), torch.randn(5, 8)
    optimizer = SGD(model.parameters(), 0.01)
    for _ in range(2):
        merged = model.merge()
        optimizer.zero_grad()
        for net in (model, merged):
            (net(x).sum() + net.kept.square().sum()).backward()
        slope = torch.cat([p.grad.flatten() for p in merged.parameters()])
        want = model.projections[0].rmatvec(slope)
        torch.testing.assert_close(model.coordinates["global"].grad, want, rtol=1e-4, atol=1e-5)
        optimizer.step()


def test_code_that_asks_for_device_and_dtype():
    torch.manual_seed(0)
    net = Net().bfloat16()
    model = SubspaceModel(net, 20)
    assert net.kind == (torch.device("cpu"), torch.bfloat16)  # not that of coordinates
    assert model.kind == net.kind
    assert next(net.parameters()).device.type == "cpu"
    assert (
        sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in Net().parameters()) + 20
    )


def test_the_shape_of_a_weight_is_a_size():
    net = wrap("cnn").body
    base = net.get_parameter("conv.weight")
    for tensor in (net.conv.weight, net.conv.weight.data, base, base.data, base.view(-1)):
        assert tensor.shape.numel() == tensor.size().numel() == base.numel()


def test_coordinates_that_change_during_a_call_are_seen():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            first = self.fc(x)
            with torch.no_grad():
                self.get_parameter("subspan_global").mul_(2)
            return first, self.fc(x)

    torch.manual_seed(0)
    model = scatter(SubspaceModel(Twice(), 4))
    want = model.merge().fc(torch.ones(1, 4))
    first, second = model(torch.ones(1, 4))
    assert torch.equal(first, want)
    assert torch.equal(second, model.merge().fc(torch.ones(1, 4)))
    assert not torch.equal(first, second)


def test_a_graph_that_is_wanted_inside_no_grad():
    class Inner(Net):
        def forward(self, x):
            with torch.no_grad():
                features = self.body(x)
                self.head(features)
            with torch.enable_grad():
                return self.head(features)

    model = SubspaceModel(Inner(), 20)
    with torch.no_grad():
        out = model(torch.randn(5, 8))
    assert out.requires_grad
    model(torch.randn(5, 8)).sum().backward()
    assert model.coordinates["global"].grad.any()


def test_threads_get_right_answers_and_the_base_stays():
    """4 threads and 240 calls, of the network, of parts, with and without gradients."""
    model, _, x = pair()
    base = {name: p.detach().clone() for name, p in model.body.named_parameters()}
    with torch.no_grad():
        want = model(x)
    wrong, barrier = [], threading.Barrier(4)

    def serve(n):
        barrier.wait()
        for i in range(60):
            with torch.set_grad_enabled(i % 2 == 0):
                ways = model, model.body, lambda x: model.body.head(model.body.body(x))
                if not torch.allclose(ways[(i + n) % 3](x), want, atol=1e-6):
                    wrong.append(i)

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(torch.equal(p, base[name]) for name, p in model.body.named_parameters())


def test_a_module_that_two_networks_share():
    torch.manual_seed(0)
    encoder = nn.Linear(8, 16)
    actor, critic = (
        nn.Sequential(encoder, nn.Linear(16, 4)),
        nn.Sequential(encoder, nn.Linear(16, 1)),
    )
    model, x = scatter(SubspaceModel(actor, 20)), torch.randn(5, 8)
    torch.testing.assert_close(critic(x), critic[1](model.merge()[0](x)))
    critic(x).sum().backward()
    assert model.coordinates["global"].grad.any()
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    assert torch.equal(before["0.weight"], model.merge()[0].weight)
    with pytest.raises(SubspanError, match=r"0 is in a subspace already: merge or unwrap"):
        SubspaceModel(critic, 5)
    optimizer = SGD(critic.parameters(), lr=0.1)
    with pytest.raises(SubspanError, match=r"the optimizer has 0.weight, which is frozen"):
        optimizer.step()
    optimizer = SGD([*critic[1].parameters(), *model.parameters()], lr=0.1)
    optimizer.step()
    assert not torch.equal(critic.state_dict()["0.weight"], before["0.weight"])


def test_a_gan_that_freezes_its_discriminator_in_turns():
    torch.manual_seed(0)
    generator = SubspaceModel(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8)), 10)
    critic = SubspaceModel(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), 10)
    optimizers = [SGD(net.body.parameters(), lr=0.1) for net in (generator, critic)]
    for step, flag in enumerate((True, False, True)):
        for p in critic.body.parameters():
            p.requires_grad = flag
        before = [net.weights()["0.weight"].detach().clone() for net in (generator, critic)]
        critic.body(generator.body(torch.randn(6, 4))).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(generator.weights()["0.weight"], before[0])
        assert torch.equal(critic.weights()["0.weight"], before[1]) is not flag, step
    for net in (generator, critic):
        net.requires_grad_(False)
        net.requires_grad_(True)
        assert next(net.parameters()).requires_grad


def test_a_teacher_and_a_student():
    model, merged, x = pair()
    teacher = copy.deepcopy(model)
    teacher.requires_grad_(False)
    part = copy.deepcopy(model.body.head)  # of a part alone
    features = merged.body(x)
    torch.testing.assert_close(
        torch.Tensor(part(features).detach()), merged.head(features).detach()
    )
    loss = (model(x) - teacher(x)).square().sum() + 0.1 * model(x).sum()
    loss.backward()
    assert model.coordinates["global"].grad.any()
    assert all(p.grad is None for p in teacher.body.parameters())
    SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(teacher(x), merged(x))
    torch.testing.assert_close(
        torch.Tensor(part(features).detach()), merged.head(features).detach()
    )


@every_net
def test_copies_and_pickles_of_the_network_itself(name):
    model, x = scatter(wrap(name)).eval(), batch(name)
    for twin in (copy.deepcopy(model.body), pickle.loads(pickle.dumps(model.body))):
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            twin.get_parameter("subspan_global").mul_(-1)
        assert not torch.equal(twin(x), model(x))
        handle = SubspaceModel.of(twin)
        assert torch.equal(handle.merge()(x), twin(x))
        assert list(handle.unwrap().state_dict()) == list(build(name).state_dict())


class Functions(nn.Module):
    """A network whose functions and hooks use its layers."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), nn.ReLU()
        fc = self.fc
        self.ways = {"closure": [lambda x: self.fc(x)], "default": lambda x, layer=fc: layer(x)}
        self.named = lambda x, *, layer=fc: layer(x)
        self.part = functools.partial(lambda x, run: run(x), run=fc.forward)
        self.act.register_forward_hook(lambda module, args, out: out + fc(args[0]))
        self.kept = functools.lru_cache(lambda n: fc.weight[n])

        def again(x, n=2):
            return x if n == 0 else again(fc(x), n - 1)

        self.again = again

    def forward(self, x):
        (closure,), default = self.ways.values()
        return self.act(closure(x)) + default(x) + self.named(x) + self.part(x) + self.again(x)


def test_functions_and_hooks_of_a_copy_use_its_own_layers():
    torch.manual_seed(0)
    model, x = scatter(SubspaceModel(Functions(), 12)), torch.randn(3, 8)
    want = model(x).detach()
    around = nn.Sequential(model.body, nn.ReLU())
    twins = [copy.deepcopy(model), model.merge(), copy.deepcopy(model.body)]
    twins += [copy.deepcopy(around)[0], copy.deepcopy([model.body.act, model.body])[1]]
    base = copy.deepcopy(model).unwrap()(x)
    scatter(model, 2)
    for twin in twins:
        torch.testing.assert_close(twin(x), want)
        twin(x).sum().backward()
    assert all(w.grad is None for w in model.coordinates.values())
    assert not torch.allclose(model(x), want)
    torch.testing.assert_close(model(x), model.merge()(x))
    torch.testing.assert_close(model.unwrap()(x), base)


class Twice(nn.Module):
    """A module around another one, whose attributes it hands on."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)

    def forward(self, x):
        return self.inside(x) * 2


def test_a_copy_of_what_hands_attributes_on_is_one_of_it():
    model, _, x = pair()
    around = [Twice(model), Twice(model.body)]
    model.body.head = Twice(model.body.head)
    want = model(x).detach()
    twins = [copy.deepcopy(net) for net in around]
    merged, twin = model.merge(), copy.deepcopy(model)
    scatter(model, 2)
    for net in (merged, twin):
        torch.testing.assert_close(net(x), want)
        assert type(net.head) is Twice
    for net in twins:
        assert type(net) is Twice
        torch.testing.assert_close(net(x), 2 * want)


def test_a_weight_that_cannot_be_computed_is_no_theta0(monkeypatch):
    """Python asks Module.__getattr__, which has θ₀, where a descriptor raises AttributeError."""
    model, _, x = pair()

    def fail(*_):
        raise AttributeError("of something inside")

    monkeypatch.setattr("subspan.subspace.forming.form_theta", fail)
    for read in (lambda: model(x), lambda: model.body.head.weight, lambda: model.body.head(x)):
        with pytest.raises(RuntimeError, match=r"\.\w+ could not be computed"):
            read()


def test_what_a_thread_keeps_during_a_call_is_its_own():
    model, _, x = pair()
    seen = []

    def look(*_):
        seen.append(len(vars(formed.now).get("calls", ())))

    def from_another_thread(*_):
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    model.body.head.register_forward_hook(from_another_thread)
    model(x)
    look()
    assert seen == [1, 0, 0]
