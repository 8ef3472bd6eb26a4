"""torch.compile sees one graph: no break, no recompilation, the same numbers."""

import copy
import shutil

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.optim import SGD

from subspan import SubspaceModel
from tests.nets import DIM, batch, build

pytestmark = pytest.mark.heavy

NAMES = ("mlp", "cnn", "encoder", "tied", "raw")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def train(model, run, x, steps=3):
    """Losses and coordinates of a few steps, w starting away from 0."""
    with torch.no_grad():
        for w in model.coordinates.values():
            w.copy_(torch.linspace(-0.3, 0.3, len(w)))
    optimizer = SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = run(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.cat([w.detach() for w in model.coordinates.values()])


def same(name, backend, **options):
    eager = SubspaceModel(build(name), DIM, **options)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for ours, theirs in zip(
        train(model, compiled, batch(name)), train(eager, eager, batch(name)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if name == "cnn":
        assert model.body.norm.num_batches_tracked == 3
        torch.testing.assert_close(model.body.norm.running_var, eager.body.norm.running_var)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_training_is_eager_training(name):
    same(name, "aot_eager")


@pytest.mark.parametrize("projection", ["orthogonal", "stored"])
def test_every_kind_of_projection_compiles(projection):
    """The tests above are of ``hash``; these kinds make their rows in other ways."""
    same("mlp", "aot_eager", projection=projection, compartments="uniform:3", train_fully="2.bias")


@pytest.mark.skipif(not shutil.which("g++"), reason="the default compiler needs g++")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.slow
def test_with_the_default_compiler():
    with torch._inductor.config.patch(compile_threads=1):
        same("mlp", "inductor", compartments="layer")


def test_eager_calls_in_between_do_not_recompile():
    model, x = SubspaceModel(build("cnn"), DIM), batch("cnn")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    model(x).sum().backward()
    compiled(x).sum().backward()  # error_on_recompile


def lstm(plain):
    return build("lstm") if plain else SubspaceModel(build("lstm"), DIM)


@pytest.mark.parametrize("plain", [True, False])
def test_torch_refuses_recurrent_layers_in_one_graph(plain):
    compiled = torch.compile(lstm(plain), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        compiled(batch("lstm"))


@pytest.mark.parametrize("plain", [True, False])
def test_recurrent_layers_compile_where_torch_allows_them(plain):
    net, x = lstm(plain), batch("lstm")
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), net(x))
        compiled(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_forward_that_calls_its_base_class_compiles():
    class Net(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    net, x = Net(6, 3), torch.randn(2, 6)
    model = SubspaceModel(net, 5)
    for call in (net, model):
        assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(x), net(x))


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated", "ignore:There is a performance drop"
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", ["hessian", "jvp", "vmap", "samples"])
def test_transforms_of_torch_func_compile(transform, backend):
    """Forward mode once had no tangent of P w, without a word."""
    torch.manual_seed(0)
    model, x = SubspaceModel(build("mlp", torch.float64), DIM), batch("mlp", torch.float64)
    w = torch.linspace(-1, 1, DIM, dtype=torch.float64)

    def run(w, x=x):
        return functional_call(model, {"coordinates.global": w}, (x,)).square().sum()

    transforms = {
        "hessian": lambda w: jacrev(grad(run))(w),
        "jvp": lambda w: jvp(run, (w,), (torch.ones_like(w),))[1],
        "vmap": lambda w: vmap(run)(torch.stack([w, 2 * w])),
        "samples": lambda w: vmap(grad(run), (None, 0))(w, x[:, None]),
    }
    compiled = torch.compile(transforms[transform], backend=backend)
    torch.testing.assert_close(compiled(w), transforms[transform](w))
