"""A network in a subspace stays a network: whoever reads a weight gets θ, and what cannot be right
is refused before anything is changed."""

import asyncio
import copy
import inspect
import itertools
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jvp, vmap
from torch.nn.utils import prune
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import subspan
from subspan import SubspaceModel, SubspanError, projections
from tests.nets import NETS, batch, build, scatter, wrap

every_net = pytest.mark.parametrize("name", NETS)


class Net(nn.Module):
    """What people write around their layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.head = nn.Linear(16, 4)
        self.flag = False

    def forward(self, x, depth=0):
        x = self.head(self.body(x)) * (2 if self.flag else 1)
        return x if depth == 0 else self(torch.cat([x, x], -1), depth - 1)

    @property
    def scale(self):
        return self.head.weight.norm()

    def stream(self, x):
        for layer in (self.body, self.head):
            x = layer(x)
            yield x

    async def answer(self, x):
        await asyncio.sleep(0)
        return self.head(self.body(x))

    def penalty(self):
        return sum(p.square().sum() for p in self.parameters())

    def part_penalty(self):
        return sum(p.square().sum() for p in self.body.parameters())

    @property
    def kind(self):
        return next(self.parameters()).device, next(p.dtype for p in self.parameters())

    def save_pretrained(self, path):
        torch.save({name: value for name, value in self.state_dict().items()}, path)  # noqa: C416

    def reset_classifier(self, classes):
        self.head = nn.Linear(16, classes)


def pair(**options):
    """A model whose coordinates are not zero, and its merged network; evaluation mode."""
    torch.manual_seed(0)
    model = scatter(SubspaceModel(Net(), 20, **options)).eval()
    return model, model.merge(), torch.randn(5, 8)


# ---- reading: whoever reads a weight gets θ ------------------------------------------------------


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
        model(x), model.body(x), model.body.head(model.body.body(x)), list(model.stream(x))[-1],
        asyncio.run(model.answer(x)),
    ]  # fmt: skip
    want, *others = [torch.autograd.grad(way.square().sum(), w)[0] for way in ways]
    for other in others:
        torch.testing.assert_close(other, want, rtol=1e-5, atol=1e-5)


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


# ---- networks that share, copy and teach ---------------------------------------------------------


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


# ---- every kind of network, every family ---------------------------------------------------------


class Block(nn.Module):
    """A residual block as of torchvision, with a shortcut."""

    def __init__(self, inside, outside):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, 2, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, groups=2, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1, 2)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class Vision(nn.Module):
    """A vision Transformer as of timm: parameters of the outermost module, layer scales."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token, self.position = (
            nn.Parameter(torch.zeros(1, 1, 16)),
            nn.Parameter(torch.rand(1, 5, 16)),
        )
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(2)])
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for scale, block in zip(self.scale, self.blocks, strict=True):
            x = x + scale * block(x)
        return self.head(self.norm(x)[:, 0])


class Bag(nn.Module):
    """Embeddings with padding, by rows and in bags."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(11, 6, padding_idx=0, sparse=True)
        self.bags = nn.EmbeddingBag(11, 6, padding_idx=2)
        self.gru = nn.GRU(6, 6, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.gru(self.rows(x))[0].sum(1).add(self.bags(x).repeat(1, 2))


IMAGES, WORDS = torch.rand(3, 3, 8, 8), torch.arange(20).view(4, 5) % 11
KINDS = {
    "torchvision": (
        lambda: nn.Sequential(Block(3, 8), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, 4)), IMAGES
    ),
    "timm": (Vision, IMAGES),
    "bag": (Bag, WORDS),
    "seq2seq": (lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True), None),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))), batch("mlp")
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.ConvTranspose3d(3, 4, 2), nn.GroupNorm(2, 4)),
        torch.rand(2, 3, 2, 2, 2),
    ),
    **{name: (NETS[name], batch(name)) for name in NETS},
}  # fmt: skip


@pytest.mark.parametrize("family", projections())
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_its_merged_network(kind, family):
    make, x = KINDS[kind]
    inputs = (torch.rand(2, 5, 8), torch.rand(2, 4, 8)) if x is None else (x,)
    torch.manual_seed(0)
    model = scatter(SubspaceModel(make(), 12, projection=family)).eval()
    merged = model.merge()
    want = merged(*inputs)
    assert not torch.allclose(copy.deepcopy(model).unwrap()(*inputs), want)
    for net in (model, model.body):
        assert (net(*inputs) - want).abs().max() <= 1e-6 * want.abs().max()


# ---- writing: it acts on the network, or is refused ----------------------------------------------


def same_function(model, x, run):
    """Whether a refusal leaves the model as it was."""
    want, names = model(x), list(model.body.state_dict())
    with pytest.raises(SubspanError) as refusal:
        run()
    assert torch.equal(model(x), want)
    assert list(model.body.state_dict()) == names
    return str(refusal.value)


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
    "a parameter": lambda net: setattr(net.head, "weight", nn.Parameter(torch.ones(4, 16))),
    "none": lambda net: net.head.register_parameter("bias", None),
    "delete": lambda net: delattr(net.head, "weight"),
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
    "a norm of all": lambda net: torch.no_grad()(net.penalty)(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantization.*")
@pytest.mark.parametrize("what", WRITES)
def test_what_would_have_no_effect_is_refused(what):
    model, _, x = pair()
    said = same_function(model, x, lambda: WRITES[what](model.body))
    assert len(said.split()) > 12  # what was asked, why it cannot be right, and what to do


def test_reading_a_weight_is_not_writing_to_it():
    model, merged, _ = pair()
    weight, want = model.body.head.weight, merged.head.weight
    for read in (
        lambda w: w.data, lambda w: w.detach().clone().zero_() + w, lambda w: w.data[0],
        lambda w: copy.deepcopy(w), lambda w: pickle.loads(pickle.dumps(w.detach())),
        lambda w: w.numpy(force=True), lambda w: w.tolist(), lambda w: w.sum(),
        lambda w: w.double(),
        lambda w: nn.Parameter(w.data), lambda w: nn.Parameter(w.detach().clone()), repr,
        lambda w: w.shape,
    ):  # fmt: skip
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
    assert not hasattr(model.body, "_private")
    model.eval()
    assert not model.training


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: model.reset_classifier(7), lambda model: model.body.reset_classifier(7),
        lambda model: setattr(model, "head", nn.Linear(16, 7)),
        lambda model: setattr(model.body, "head", nn.Linear(16, 7)),
    ],
)  # fmt: skip
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


def changes():
    yield "in place", lambda net: net.get_parameter("head.weight").data.zero_()
    yield "no_grad", lambda net: torch.no_grad()(lambda: net.head._parameters["weight"].add_(1))()
    yield "init", lambda net: nn.init.zeros_(dict(net.named_parameters())["head.weight"])
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
        lambda m: m.body.bfloat16().float(),
    ):
        model, _, _ = pair()
        convert(model)
        model.state_dict()
        subspan.save(model, tmp_path / "m")


# ---- optimizers ----------------------------------------------------------------------------------


def test_an_optimizer_of_before_is_refused_at_its_first_step():
    net, x = Net(), torch.randn(5, 8)
    optimizer = Adam(net.parameters())
    model = SubspaceModel(net, 20)
    model(x).sum().backward()
    with pytest.raises(SubspanError, match=r"the optimizer has .* frozen .*: make it anew"):
        optimizer.step()
    model.unwrap()(x).sum().backward()
    optimizer.step()


def test_an_optimizer_of_parts_is_refused():
    model, _, _ = pair()
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        Adam([{"params": model.body.body.parameters()}, {"params": model.body.head.parameters()}])


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


# ---- states --------------------------------------------------------------------------------------


def test_the_networks_own_methods_save_an_ordinary_network(tmp_path):
    model, merged, x = pair(train_fully="head")
    for save in (model.save_pretrained, model.body.save_pretrained):
        save(tmp_path / "net.pt")
        state = torch.load(tmp_path / "net.pt", weights_only=True)
        assert list(state) == list(Net().state_dict())
        plain = Net()
        plain.load_state_dict(state)
        assert torch.equal(plain(x), merged(x))


def test_a_method_that_goes_round_through_others(tmp_path):
    import safetensors.torch

    class Hub(Net):
        def save_pretrained(self, path):
            safetensors.torch.save_model(self, str(path))

    model = scatter(SubspaceModel(Hub(), 20)).eval()
    model.save_pretrained(tmp_path / "m")
    plain = Net()
    safetensors.torch.load_model(plain, str(tmp_path / "m"))
    assert torch.equal(plain(torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_states_of_the_network_are_small_and_load_back():
    model, _, x = pair()
    state = model.body.state_dict()
    assert list(state) == ["subspan_global", "subspan_fingerprint"]
    assert all(value.is_floating_point() for value in state.values())
    torch.manual_seed(0)
    other = SubspaceModel(Net(), 20).body
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    assert other.load_state_dict(state) == nn.Module().load_state_dict({})  # all keys match
    with pytest.raises(RuntimeError, match=r"Missing key.*subspan_global"):
        other.load_state_dict({})


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_all_weights_is_loaded_as_coordinates(assign):
    for name, family in itertools.product(NETS, ("hash", "rademacher", "kronecker")):
        model = scatter(
            wrap(name, "layer" if name != "raw" else "uniform:3", projection=family)
        ).eval()
        complete = model.merge().state_dict()
        other = wrap(name, "layer" if name != "raw" else "uniform:3", projection=family)
        other.body.load_state_dict(complete, assign=assign)
        torch.testing.assert_close(
            other.eval()(batch(name)), model(batch(name)), rtol=1e-4, atol=1e-5
        )
        for key, w in other.coordinates.items():
            torch.testing.assert_close(w, model.coordinates[key], rtol=1e-3, atol=1e-4)
        other.state_dict()  # the base is the same


def test_a_state_outside_of_the_subspace_is_refused():
    model, _, x = pair()
    torch.manual_seed(9)
    said = same_function(model, x, lambda: model.body.load_state_dict(Net().state_dict()))
    assert "do not lie in this model's subspace" in said
    some = {"head.weight": torch.ones(4, 16)}
    said = same_function(model, x, lambda: model.body.load_state_dict(some, strict=False))
    assert "or some of the weights only" in said


def averages():
    yield "a sum", lambda states: {k: sum(s[k] for s in states) / len(states) for k in states[0]}
    yield (
        "a mean",
        lambda states: {k: torch.stack([s[k].float() for s in states]).mean(0) for k in states[0]},
    )
    yield (
        "weighted",
        lambda states: {
            k: sum(c * s[k] for c, s in zip((0.1, 0.6, 0.3), states, strict=True))
            for k in states[0]
        },
    )
    yield (
        "moving",
        lambda states: {
            k: 0.7 * (0.7 * states[0][k] + 0.3 * states[1][k]) + 0.3 * states[2][k]
            for k in states[0]
        },
    )


@pytest.mark.parametrize(("what", "mean"), list(averages()), ids=[name for name, _ in averages()])
@pytest.mark.parametrize("through", ["network", "handle"])
def test_an_average_of_states_is_a_state(what, mean, through):
    torch.manual_seed(0)
    net = build("cnn")
    clients = [SubspaceModel(copy.deepcopy(net), 20) for _ in range(3)]
    for n, client in enumerate(clients):
        scatter(client, scale=0.1 * (n + 1))
    of = (lambda m: m.body) if through == "network" else (lambda m: m)
    server = SubspaceModel(copy.deepcopy(net), 20)
    states = [of(client).state_dict() for client in clients]
    of(server).load_state_dict(mean(states))
    key = "subspan_global" if through == "network" else "coordinates.global"
    torch.testing.assert_close(server.coordinates["global"].detach(), mean(states)[key])
    server.state_dict()
    other = SubspaceModel(build("cnn"), 20, seed=1)
    with pytest.raises(SubspanError, match="the projection or its compartments"):
        of(server).load_state_dict(mean([*states[:2], of(other).state_dict()]))


@pytest.mark.parametrize("through", ["network", "handle"])
@pytest.mark.parametrize(
    "options", [{}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}]
)
def test_averaged_models(through, options):
    model = wrap("mlp")
    net = model if through == "handle" else model.body
    averaged, seen = AveragedModel(net, **options), []
    for n in range(3):
        scatter(model, scale=0.2 * (n + 1))
        averaged.update_parameters(net)
        seen.append(model.coordinates["global"].detach().clone())
    twin = averaged.module if through == "handle" else SubspaceModel.of(averaged.module)
    if "multi_avg_fn" in options:
        want = 0.9 * (0.9 * seen[0] + 0.1 * seen[1]) + 0.1 * seen[2]
    else:
        want = torch.stack(seen).mean(0)
    torch.testing.assert_close(twin.coordinates["global"].detach(), want)
    assert torch.equal(averaged.eval()(batch("mlp")), twin.merge()(batch("mlp")))
    twin.state_dict()


def test_subspan_sees_coordinates_whatever_it_is_given(tmp_path):
    model, merged, x = pair()
    assert subspan.save(model.body, tmp_path / "a") == subspan.save(model, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert subspan.count(model.body) == subspan.count(model)
    torch.manual_seed(0)
    net = Net()
    subspan.load(tmp_path / "a", net)
    assert torch.equal(net.eval()(x), merged(x))


# ---- transforms and other ways to differentiate --------------------------------------------------


def parameters(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


FORWARD_MODE = pytest.mark.filterwarnings(  # of PyTorch's own rules
    "ignore:.torch.jit.script. is deprecated", "ignore:There is a performance drop"
)


@FORWARD_MODE
@torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the one with all derivatives
@pytest.mark.parametrize("through", ["network", "handle"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder", "raw"])
@pytest.mark.parametrize("compartments", ["global", "uniform:3"])
def test_transforms_of_torch_func(through, name, compartments):
    model = scatter(wrap(name, compartments, torch.float64)).train(name != "cnn")
    net, x = (model if through == "handle" else model.body), batch(name, torch.float64)
    given = parameters(net)

    def loss(given, x):
        return functional_call(net, given, (x[None],)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(given, x)
    for i in range(len(x)):
        want = torch.autograd.grad(loss(given, x[i]), list(given.values()))
        for found, one in zip(per_sample.values(), want, strict=True):
            torch.testing.assert_close(found[i], one)

    ensemble = {key: torch.randn(3, *w.shape, dtype=w.dtype) for key, w in given.items()}
    out = vmap(lambda some: functional_call(net, some, (x,)))(ensemble)
    for i in range(3):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for w, own in zip(twin.parameters(), ensemble.values(), strict=True):
                w.copy_(own[i])
        torch.testing.assert_close(out[i], twin.merge()(x))

    along = {key: torch.randn_like(w) for key, w in given.items()}
    given = {key: w.detach() for key, w in given.items()}
    _, found = jvp(lambda some: functional_call(net, some, (x,)), (given,), (along,))
    h = 1e-6
    ends = [
        functional_call(net, {key: w + s * h * along[key] for key, w in given.items()}, (x,))
        for s in (1, -1)
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-6)


@FORWARD_MODE
def test_jacobians_and_hessians():
    model, x = scatter(wrap("mlp", dtype=torch.float64)), batch("mlp", torch.float64)
    w = model.coordinates["global"].detach()

    def loss(w):
        return functional_call(model, {"coordinates.global": w}, (x,)).square().sum()

    backward = torch.autograd.functional.hessian(loss, w)
    torch.testing.assert_close(torch.func.hessian(loss)(w), backward)
    torch.testing.assert_close(jacfwd(grad(loss))(w), backward)
    assert backward.abs().sum() > 0


def test_gradients_of_the_base_in_a_functional_call():
    """A base that is given, and wants a gradient, has the dense one."""
    model, merged, x = pair()
    given = {name: p.detach().clone().requires_grad_() for name, p in model.body.named_parameters()}
    functional_call(model.body, given, (x,)).square().sum().backward()
    merged(x).square().sum().backward()
    for name, p in merged.named_parameters():
        torch.testing.assert_close(given[name].grad, p.grad)
    assert given["subspan_global"].grad.any()


@FORWARD_MODE
def test_forward_mode_with_a_random_basis_over_coordinates():
    model, x = scatter(wrap("mlp")), batch("mlp")
    twin = copy.deepcopy(model)
    steps = []
    for net, estimator in ((model, "forward"), (twin, "gradient")):
        optimizer = subspan.optim.RandomBases(net.parameters(), 6, lr=0.1, estimator=estimator)

        def closure(net=net, estimator=estimator):
            loss = net(x).square().mean()
            if estimator == "gradient":
                loss.backward()
            return loss

        optimizer.step(closure)
        steps.append(optimizer.coordinates.clone())
    torch.testing.assert_close(*steps)
    assert steps[0].any()


# ---- unusual parameters --------------------------------------------------------------------------


def test_padding_rows_stay_as_in_ordinary_training():
    torch.manual_seed(0)
    model = scatter(SubspaceModel(Bag(), 12))
    net, base = model.body, copy.deepcopy(model).unwrap()
    for name, row in (("rows", 0), ("bags", 2)):
        theta, theta0 = net.get_submodule(name).weight, base.get_submodule(name).weight
        assert torch.equal(theta[row], theta0[row])
        others = [i for i in range(11) if i != row]
        assert not torch.equal(theta[others], theta0[others])
    assert model.recipe["padding"] == "keep"
    moving = scatter(SubspaceModel(copy.deepcopy(base), 12, padding="train"))
    assert not torch.equal(moving.body.rows.weight[0], base.rows.weight[0])
    assert "padding" not in moving.recipe
    with pytest.raises(SubspanError, match="unknown padding 'no'"):
        SubspaceModel(base, 12, padding="no")


def test_the_gradient_knows_of_rows_that_stay():
    torch.manual_seed(0)
    model = SubspaceModel(nn.Sequential(nn.Embedding(5, 4, padding_idx=1)).double(), 6)
    p = model.projections[0].dense().clone()
    p[4:8] = 0
    slope = torch.randn(5, 4, dtype=torch.float64)
    (found,) = torch.autograd.grad((model.body[0].weight * slope).sum(), [*model.parameters()])
    torch.testing.assert_close(found, p.T @ slope.flatten())


def test_a_tied_padding_row_moves_since_it_has_a_gradient():
    net = nn.Module()
    net.embed, net.head = nn.Embedding(5, 4, padding_idx=1), nn.Linear(4, 5, bias=False)
    net.head.weight = net.embed.weight
    model = scatter(SubspaceModel(net, 6))
    assert "padding" not in model.recipe
    assert not torch.equal(net.embed.weight[1], model.subspace.stored("embed.weight").detach()[1])


def test_a_file_from_before_moves_its_padding_rows(tmp_path):
    torch.manual_seed(0)
    base = Bag()
    new = scatter(SubspaceModel(copy.deepcopy(base), 12))
    old = scatter(SubspaceModel(copy.deepcopy(base), 12, padding="train"))
    for model in (new, old):
        subspan.save(model, tmp_path / "m")
        loaded = subspan.load(tmp_path / "m", copy.deepcopy(base))
        assert torch.equal(loaded(WORDS), model(WORDS))
        assert loaded.recipe == model.recipe
    assert not torch.equal(new(WORDS), old(WORDS))
    with pytest.raises(SubspanError, match="the projection or its compartments"):
        new.load_state_dict(old.state_dict())


def unusual():
    class Packed(nn.Parameter):
        def unpacked(self):
            return self * self.scale

    class Kind(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.fc = Packed(torch.randn(4, 4)), nn.Linear(4, 4)
            self.q.scale = 2.0

        def forward(self, x):
            return self.fc(x @ self.q.unpacked())

    shared = torch.randn(6)
    overlapping = nn.ParameterList([nn.Parameter(shared[:4]), nn.Parameter(shared[2:])])
    scripted = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    expanded = nn.ParameterList(
        [nn.Parameter(torch.ones(1).expand(4)), nn.Parameter(torch.ones(3))]
    )
    integers = nn.ParameterList([nn.Parameter(torch.arange(4), requires_grad=False),
                                 nn.Parameter(torch.ones(3))])  # fmt: skip
    complex_ = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.complex64))])
    yield Kind(), {}, "q is a Packed, a parameter of a kind of its own: exclude it"
    yield overlapping, {}, "0 and 1 share memory and are two parameters"
    yield scripted, {}, "1.weight belongs to a part that TorchScript compiled"
    yield expanded, {}, "0 is expanded"
    yield integers, {"targets": ["0"]}, "0 is torch.int64 and P w is real"
    yield integers, {"train_fully": "0"}, "0 is torch.int64 and has no gradient"
    yield complex_, {}, "0 is torch.complex64 and P w is real"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("n", range(7))
def test_unusual_parameters_are_refused_before_anything_changes(n):
    net, options, message = list(unusual())[n]
    before = [(name, p, p.requires_grad, type(p)) for name, p in net.named_parameters()]
    kinds = [type(module) for module in net.modules()]
    with pytest.raises(SubspanError, match=message):
        SubspaceModel(net, 3, **options)
    assert before == [(name, p, p.requires_grad, type(p)) for name, p in net.named_parameters()]
    assert kinds == [type(module) for module in net.modules()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_unusual_parameters_that_stay_are_left_as_they_are():
    net = next(iter(unusual()))[0]
    net.q.requires_grad_(False)
    x, q = torch.randn(3, 4), net.q
    want = net(x)
    model = SubspaceModel(net, 5)
    assert torch.equal(model(x), want)
    assert model.body.q is q
    part = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    model = scatter(SubspaceModel(part, 5, exclude="1"))
    torch.testing.assert_close(model(x), part[1](part[0](x)))


def test_strided_and_scalar_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.strided = nn.Parameter(torch.rand(8)[::2])
            self.turned = nn.Parameter(torch.rand(3, 4).T)
            self.scalar = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return (x * self.strided) @ self.turned * self.scalar

    torch.manual_seed(0)
    net, x = Odd(), torch.randn(5, 4)
    plain = copy.deepcopy(net)
    model = SubspaceModel(net, 5)
    assert torch.equal(model(x), plain(x))
    scatter(model)
    assert torch.equal(model.merge()(x), model(x))
    assert torch.equal(model.unwrap()(x), plain(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "prune", "kept"])
def test_weights_that_a_hook_computes(how):
    class Keeps(nn.Linear):
        def forward(self, x):
            self.last = [super().forward(x)]
            return self.last[0]

    layer = Keeps(8, 8) if how == "kept" else nn.Linear(8, 8)
    if how == "prune":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    elif how != "kept":
        getattr(nn.utils, how)(layer)
    model, x = scatter(SubspaceModel(nn.Sequential(layer).eval(), 20)), torch.randn(3, 8)
    y = model(x)
    y.sum().backward()
    assert model.coordinates["global"].grad.any()
    for net in (model.merge(), copy.deepcopy(model), copy.deepcopy(model.body)):
        torch.testing.assert_close(net(x), y)


def test_under_another_default_device_and_mode():
    net, x = Net(), torch.randn(5, 8)
    with torch.device("meta"):
        model = SubspaceModel(net, 20)
    assert {p.device.type for p in net.parameters()} == {"cpu"}
    model(x).sum().backward()
    with torch.inference_mode():
        model = SubspaceModel(Net(), 20)
        y = model(x)
    loss = model(x).sum()
    loss.backward()
    torch.testing.assert_close(y, model(x))
    SGD(model.parameters(), lr=0.1).step()


def test_a_failing_wrap_leaves_classes_alone(monkeypatch):
    class Slotted(nn.Linear):
        __slots__ = ("extra",)

    class Stubborn(nn.Linear):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise TypeError("no other class")
            super().__setattr__(name, value)

    scatter(SubspaceModel(nn.Sequential(Slotted(4, 4)), 4))
    net = nn.Sequential(nn.Linear(4, 4), Stubborn(4, 4))
    kinds = [type(m) for m in net.modules()]
    with pytest.raises(SubspanError, match=r"module 1 is a Stubborn, .*: exclude it"):
        SubspaceModel(net, 5)
    assert [type(m) for m in net.modules()] == kinds
    assert all(p.requires_grad for p in net.parameters())


def test_unwrapping_gives_everything_back():
    for name in NETS:
        net = build(name)
        kinds, parts = [type(m) for m in net.modules()], dict(net.named_parameters())
        attributes = [sorted(vars(m)) for m in net.modules()]
        first = next(iter(parts.values()))
        first.requires_grad_(False)
        model = scatter(SubspaceModel(net, 12))
        model(batch(name)).sum().backward()
        assert model.unwrap() is net
        assert [type(m) for m in net.modules()] == kinds
        assert dict(net.named_parameters()) == parts
        assert all(type(p) is nn.Parameter for p in parts.values())
        assert [p.requires_grad for p in parts.values()] == [False] + [True] * (len(parts) - 1)
        assert [sorted(vars(m)) for m in net.modules()] == attributes
        for use in (
            model.weights,
            model.merge,
            model.unwrap,
            lambda m=model: m.coordinates["global"],
        ):
            with pytest.raises(SubspanError, match="this SubspaceModel was unwrapped"):
                use()
        SubspaceModel(net, 12)
