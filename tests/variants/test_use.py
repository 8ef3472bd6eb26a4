"""A network is a variant inside of ``use``, in one thread or task, and itself elsewhere."""

import asyncio
import contextvars
import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import subspan
from subspan import SubspaceModel, SubspanError, Variants
from subspan.subspace.weights import Weights
from tests.nets import NETS, batch, scatter, wrap
from tests.variants.conftest import trained, vector


def run(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("compartments", ["global", "uniform:3"])
@pytest.mark.usefixtures("forming")
def test_a_variant_is_the_network_with_its_coordinates(name, compartments):
    model, x = wrap(name, compartments).eval(), batch(name)
    other = trained(model, 5)
    variants, before = Variants(model), run(model, x)
    variants.add("a", other)
    expected = run(other, x)
    assert not torch.allclose(expected, before)
    with variants.use("a") as net:
        assert torch.equal(run(net, x), expected)
        assert torch.equal(run(model.body, x), expected)
        tensor, (module, attribute) = next(iter(model.subspace.homes.items()))
        assert torch.equal(getattr(module, attribute), other.weights()[tensor])
        assert torch.equal(model.weights()[tensor], other.weights()[tensor])
    assert torch.equal(run(model, x), before)


def test_a_variant_has_its_head_and_its_buffers(model):
    x, other = batch("cnn"), trained(model, 5)
    variants, before = Variants(model), run(model, x)
    variants.add("trained", other)
    variants.add("vector", vector(6))
    with variants.use("trained"):
        assert torch.equal(run(model, x), run(other, x))
        assert torch.equal(model.body.head.weight, other.body.head.weight)
        with variants.use("vector"), torch.no_grad():
            inside = model(x)
        assert torch.equal(run(model, x), run(other, x))
        with variants.use(None):
            assert torch.equal(run(model, x), before)
    with torch.no_grad():
        model.coordinates["global"].copy_(vector(6))
    assert torch.equal(run(model, x), inside)
    assert type(model.body.head) == nn.Linear  # noqa: E721 - of classes that are made
    assert type(model.unwrap().head) is nn.Linear


def test_a_recurrent_layer_that_is_trained_fully_has_a_variants_weights():
    model, x = wrap("lstm", targets=["head"], train_fully=["lstm"]).eval(), batch("lstm")
    other, variants, before = trained(model, 5), Variants(model), run(model, x)
    variants.add("a", other)
    with variants.use("a"):
        assert torch.equal(run(model, x), run(other, x))
    assert torch.equal(run(model, x), before)
    assert torch.equal(run(model.unwrap(), x), before)


def test_coordinates_of_two_dtypes():
    model, x = scatter(wrap("mlp", "tensor")).eval(), batch("mlp")
    first = next(iter(model.coordinates.values()))
    first.data = first.data.double() + 1e-9
    variants, want = Variants(model), run(model, x)
    vector = torch.cat(list(model.coordinates.values()))
    assert vector.dtype == torch.float64
    variants.add("model", model)
    variants.add("vector", vector)
    first.data = first.data * 2
    for name in ("model", "vector"):
        assert torch.equal(variants(x, names=name), want)
    with pytest.raises(SubspanError, match="is float64 in the vector and float32 in the network"):
        variants.add("rounded", vector / 3)


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_theta_is_formed_once_for_a_use(name, forming, monkeypatch):
    model, x = wrap(name).eval(), batch(name)
    variants, formed = Variants(model), []
    variants.add("a", vector(5))
    variants.add("b", vector(6))
    form = Weights._theta
    monkeypatch.setattr(
        Weights, "_theta", lambda self, *rest: formed.append(rest) or form(self, *rest)
    )
    with variants.use("a"):
        run(model, x)
        first = len(formed)
        run(model, x)
    with variants.use("a"):  # the last one is kept
        run(model, x)
    assert len(formed) == first > 0
    with variants.use("b"):
        run(model, x)
    with variants.use("a"):
        run(model, x)
    assert len(formed) == 3 * first


def test_kept_theta_follows_the_network(model):
    variants, x = Variants(model), batch("cnn", torch.float64)
    variants.add("a", vector(5))
    with variants.use("a"):
        single = run(model, x.float())
    model.double()
    with variants.use("a"):
        double = run(model, x)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)
    with torch.no_grad():
        model.body.get_parameter("conv.weight").add_(1.0)
    with variants.use("a"):
        assert not torch.allclose(run(model, x), double)


def test_a_variant_has_no_gradients_and_its_input_has(model):
    variants, x = Variants(model), batch("cnn").requires_grad_()
    variants.add("a", trained(model, 5))
    with variants.use("a"):
        model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert model.coordinates["global"].grad is None
    assert model.body.head.weight.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", ["body", "body.conv", "body.head"])
def test_a_checkpoint_would_run_again_without_the_variant(model, part, reentrant, forming):
    variants, run_part = Variants(model), model.get_submodule(part)
    x = (torch.ones(2, 144) if part == "body.head" else batch("cnn")).requires_grad_()
    variants.add("a", trained(model, 5))
    with variants.use("a"):
        with pytest.raises(SubspanError, match="checkpoint runs its part twice"):
            checkpoint(run_part, x, use_reentrant=reentrant).sum()
        with torch.no_grad():
            assert torch.equal(checkpoint(run_part, x, use_reentrant=reentrant), run_part(x))


def test_what_inference_mode_forms_serves_outside_of_it(model):
    variants, x = Variants(model), batch("cnn")
    variants.add("a", trained(model, 5))
    with torch.inference_mode(), variants.use("a"):
        inside = model(x)
    with variants.use("a"):
        outside = model(x.clone().requires_grad_())
    assert torch.equal(inside, outside.detach())


@pytest.mark.filterwarnings("ignore")  # PyTorch has many of its own
@pytest.mark.parametrize(
    ("done", "call"),
    [
        ("saved", lambda model, path: subspan.save(model, path)),
        ("saved", lambda model, path: model.state_dict()),
        ("saved", lambda model, path: model.body.conv.state_dict()),
        ("merged", lambda model, path: model.merge()),
        ("copied or pickled", lambda model, path: copy.deepcopy(model)),
        ("copied or pickled", lambda model, path: copy.deepcopy(model.body.head)),
        ("copied or pickled", lambda model, path: pickle.dumps(model.body)),
        ("unwrapped", lambda model, path: model.unwrap()),
        ("traced", lambda model, path: torch.jit.trace(model, (batch("cnn"),))),
        ("traced", lambda model, path: torch.jit.trace(model.body.head, (torch.ones(2, 144),))),
        ("exported", lambda model, path: torch.export.export(model, (batch("cnn"),))),
    ],
)
def test_what_would_mix_a_variant_with_the_network_is_refused(model, tmp_path, done, call):
    variants = Variants(model)
    variants.add("a", vector(5))
    with variants.use("a"), pytest.raises(SubspanError, match=f"'a' is in use .* {done}: leave"):
        call(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    run(model, batch("cnn"))


def test_a_network_that_would_write_to_a_variant_is_refused():
    class Counting(nn.Linear):
        def forward(self, x):
            self.weight.detach().add_(1.0)
            return super().forward(x)

    model = SubspaceModel(Counting(3, 3), 4, targets=["weight"]).eval()
    variants = Variants(model)
    variants.add("a", vector(5, 4))
    with variants.use("a"), pytest.raises(SubspanError, match="changed weight during a call"):
        model(torch.ones(2, 3))
    with variants.use("a"):  # is formed anew
        assert torch.equal(
            model.body.weight, variants._ready(["a"], [variants._find("a")]).theta("weight")
        )


@pytest.mark.parametrize("tensor", ["head.weight", "norm.running_mean", "norm.num_batches_tracked"])
@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.data.zero_(),
        lambda t: t.detach().view(-1)[:1].fill_(3),
        lambda t: setattr(t, "data", t + 1),
        lambda t: t.add_(1),
        lambda t: t.set_(torch.zeros_like(t)),
        lambda t: torch.add(t, 1, out=t),
    ],
)
def test_nobody_writes_to_what_a_variant_has(model, tensor, write):
    variants, x, path = Variants(model), batch("cnn"), tensor.rpartition(".")
    variants.add("a", trained(model, 5))
    part = model.body.get_submodule(path[0])
    with variants.use("a"):
        before, held = run(model, x), getattr(part, path[2]).clone()
        for read in (lambda: getattr(part, path[2]), lambda: named(part)[path[2]]):
            assert torch.equal(read(), held)
            with pytest.raises(SubspanError, match=rf"{tensor} is that of variant 'a' .*: leave"):
                write(read())
    with variants.use("a"):
        assert torch.equal(run(model, x), before)


def named(part):
    return {**dict(part.named_parameters()), **dict(part.named_buffers())}


def test_a_part_has_a_variants_tensors_whoever_lists_them(model):
    variants, other = Variants(model), trained(model, 5)
    variants.add("a", other)
    own = model.body.head.weight
    with variants.use("a"):
        for path in ("norm", "head"):
            part, theirs = model.body.get_submodule(path), other.body.get_submodule(path)
            assert named(part).keys() == named(theirs).keys()
            for name, tensor in named(theirs).items():
                assert torch.equal(named(part)[name], tensor)
            hidden = torch.ones(2, 144) if path == "head" else torch.ones(2, 4, 6, 6)
            assert torch.equal(part(hidden), theirs(hidden))
            given = {name: torch.ones_like(tensor) for name, tensor in named(theirs).items()}
            ours, want = (functional_call(p, given, (hidden,)) for p in (part, theirs))
            assert torch.equal(ours, want)
        assert torch.equal(model.body.get_parameter("head.bias"), other.body.head.bias)
        assert torch.equal(model.body.get_buffer("norm.running_var"), other.body.norm.running_var)
        assert not model.body.head.weight.requires_grad_(False).requires_grad
        with pytest.raises(SubspanError, match="requires_grad_"):
            model.body.head.weight.requires_grad_()
        assert torch.equal(copy.deepcopy(model.body.head.weight), other.body.head.weight)
    assert named(model.body.head)["weight"] is own


def test_training_mode_and_a_replaced_head_are_refused(model):
    variants = Variants(model)
    variants.add("a", vector(5))
    model.train()
    with pytest.raises(SubspanError, match=r"for inference: call eval\(\)"):
        variants(batch("cnn"), names="a")
    model.eval()
    with variants.use("a"):  # a trainer's evaluation that goes back to training inside
        for net in (model, model.body):
            net.train()
            with pytest.raises(SubspanError, match="'a' is in use here, and nothing of it is tra"):
                net(batch("cnn"))
            model.eval()(batch("cnn"))
    model.body.head = nn.Linear(144, 4)
    with pytest.raises(SubspanError, match="head was replaced"):
        variants(batch("cnn"), names="a")


def test_at_base_inside_of_a_use_is_the_base_and_no_variant_is_used_inside_of_it(model):
    variants, x = Variants(model), batch("cnn")
    variants.add("a", trained(model, 5))
    base = variants(x, names=None)
    with variants.use("a"), model.at_base():
        assert torch.equal(run(model, x), base)
        with pytest.raises(SubspanError, match=r"inside of at_base\(\)"):
            variants(x, names="a")
    assert torch.equal(run(model, x), base)


def test_each_thread_has_its_own_and_they_change_meanwhile(model):
    x, others = batch("cnn"), [trained(model, seed) for seed in range(4)]
    expected, base = [run(other, x) for other in others], run(model, x)
    variants, failures, go = Variants(model), [], threading.Barrier(5)
    for i, other in enumerate(others):
        variants.add(f"v{i}", other)
    variants.add("changing", others[0])

    def serve(i):
        go.wait()
        for _ in range(30):
            with variants.use(f"v{i}"):
                first = run(model, x)
                second = variants(x, names=[f"v{(i + 1) % 4}"] * 5)
            if not torch.equal(first, expected[i]) or not torch.equal(
                second, expected[(i + 1) % 4]
            ):
                failures.append(i)
            if not torch.equal(run(model, x), base):
                failures.append("base")

    def change():
        go.wait()
        for n in range(30):
            variants.add(f"new{n}", others[n % 4])
            variants.replace("changing", others[n % 4])
            with variants.use("changing"):
                variants.replace("changing", others[(n + 1) % 4])
                if not torch.equal(run(model, x), expected[n % 4]):  # the one that entered
                    failures.append("changing")
            variants.remove(f"new{n}")

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    threads.append(threading.Thread(target=change))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(variants) == 5


def test_a_handler_of_signals_may_replace_what_it_interrupts(model):
    """It runs in the same thread, wherever that is."""
    variants = Variants(model)
    variants.add("a", vector(5))
    ended = []

    class Interrupted(str):
        def __hash__(self):  # wherever a name is looked up
            variants.replace("a", vector(6))
            return super().__hash__()

    def use():
        with variants.use(Interrupted("a")):
            ended.append(model.body.head.weight)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert ended


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_variants_are_not_copied(model, copied):
    with pytest.raises(SubspanError, match="cannot be copied or pickled"):
        copied(Variants(model))


def test_each_task_has_its_own(model):
    x = batch("cnn")
    variants = Variants(model)
    for name in "ab":
        variants.add(name, vector(ord(name)))
    expected = {name: variants(x, names=name) for name in "ab"}

    async def serve(name):
        with variants.use(name):
            for _ in range(3):
                await asyncio.sleep(0)
                assert torch.equal(run(model, x), expected[name])
            there = await asyncio.to_thread(run, model, x)
        assert torch.equal(there, expected[name])

    async def both():
        await asyncio.gather(serve("a"), serve("b"))

    asyncio.run(both())


def test_generators_that_stop_inside_of_a_use(model):
    """They leave it to their caller, and go on with another's: that is said, and is over then."""
    x, before = batch("cnn"), run(model, batch("cnn"))
    variants = Variants(model)
    for name in "ab":
        variants.add(name, vector(ord(name)))

    def stream(name):
        with variants.use(name) if name else model.at_base():
            for _ in range(2):
                yield run(model, x)

    first, second = stream("a"), stream("b")
    next(first), next(second)
    with pytest.raises(SubspanError, match="use of variant 'a' has not ended where it began"):
        list(first)
    list(second)
    assert torch.equal(run(model, x), before)
    for name, said in (("a", "the use of variant 'a'"), (None, r"at_base\(\)")):
        stopped = stream(name)
        contextvars.copy_context().run(next, stopped)  # as servers do, which run it in threads
        with pytest.raises(SubspanError, match=f"{said} has not ended where it began"):
            list(stopped)
    given_up = stream("a")
    next(given_up)
    given_up.close()  # an error of its own
    assert torch.equal(run(model, x), before)


@pytest.mark.heavy
def test_a_compiled_network_is_one_graph_for_all_variants(model):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = batch("cnn")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    variants, base = Variants(compiled), run(model, x)
    variants.add("a", trained(model, 5))
    variants.add("b", vector(6))
    expected = {name: Variants(model) for name in ()} | {None: base}
    for name in "ab":
        with variants.use(name):
            expected[name] = run(model, x)
    for name in ("a", None, "b", "a"):
        assert torch.equal(variants(x, names=name), expected[name])
    assert torch.equal(run(compiled, x), base)
    assert len(graphs) == 1
    with variants.use("a"), pytest.raises(Exception, match=r"call it under torch\.no_grad"):
        compiled(x)


@pytest.mark.heavy
def test_a_compiled_copy_has_variants_of_its_own(model):
    variants, x = Variants(model), batch("cnn")
    variants.add("a", trained(model, 5))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    others, base = Variants(compiled), run(twin, x)
    others.add("b", vector(6))
    with variants.use("a"):
        assert torch.equal(run(compiled, x), base)
        with others.use("b"):
            inside = run(compiled, x)
    assert torch.equal(others(x, names="b"), inside)
    assert not torch.equal(inside, base)


@pytest.mark.heavy
def test_what_is_compiled_stays_trainable(model):
    variants = Variants(model)
    variants.add("a", vector(5))
    model.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, before = batch("cnn"), model.body.norm.running_mean.clone()
    compiled(x).square().sum().backward()
    gradient = model.coordinates["global"].grad.clone()
    assert not torch.equal(model.body.norm.running_mean, before)
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(model.coordinates["global"].grad, gradient)
