"""``with model.at_base():`` the network computes θ₀, here and now and nowhere else."""

import asyncio
import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from subspan import SubspaceModel, SubspanError
from subspan.subspace import formed
from tests.nets import batch, build, scatter
from tests.subspace.in_place.network import pair


def both(name, **options):
    """A model whose coordinates are not zero, the network that was wrapped, and a batch."""
    model = SubspaceModel(build(name), 20, **options)
    for w in model.coordinates.values():
        with torch.no_grad():
            w.copy_(torch.linspace(-1, 1, len(w)))
    return model.eval(), build(name).eval(), batch(name)


@pytest.mark.parametrize("compartments", ["global", "uniform:3"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "encoder", "tied", "raw"])
def test_the_network_computes_what_was_wrapped(name, compartments, forming):
    model, net, x = both(name, compartments=compartments)
    trained = model(x)
    with model.at_base():
        assert torch.equal(model(x), net(x))
        assert torch.equal(model.body(x), net(x))  # without the handle
        assert torch.equal(SubspaceModel.of(model.body)(x), net(x))
        assert not any(theta.requires_grad for theta in model.weights().values())
    assert torch.equal(model(x), trained)
    assert not torch.equal(trained, net(x))


def test_contexts_nest_and_end_with_an_error(forming):
    model, net, x = both("mlp")
    other, _, _ = both("encoder")
    trained = model(x)
    with other.at_base():
        assert torch.equal(model(x), trained)  # it is another network's
        with model.at_base():
            with pytest.raises(ZeroDivisionError), SubspaceModel.of(model.body).at_base():
                _ = 1 / 0
            assert torch.equal(model(x), net(x))
    assert torch.equal(model(x), trained)
    model.at_base()  # which nobody enters
    assert torch.equal(model(x), trained)


def test_a_hook_may_look_at_the_base_in_the_middle_of_a_call(forming):
    model, net, x = both("mlp")
    seen = []

    def look(module, args, out):
        with model.at_base():
            seen.append(module.weight.detach().clone())

    handle = model.body[0].register_forward_hook(look)
    trained = model(x)
    handle.remove()
    assert torch.equal(seen[0], net[0].weight)
    assert torch.equal(model(x), trained)


def test_what_is_trained_fully_stays():
    model, _, x = pair(train_fully="head")
    with model.at_base():
        out = model(x)
        out.sum().backward()
    assert torch.equal(model.head.weight, model.fully_trained()["head.weight"])
    assert model.head.weight.grad is not None
    assert all(w.grad is None for w in model.coordinates.values())
    with model.at_base():
        assert not model.body.body(x).requires_grad


def test_other_threads_and_tasks_go_on_with_theta(forming):
    model, net, x = both("mlp")
    trained, seen = model(x).detach(), {}

    def elsewhere():
        seen["thread"] = model(x).detach()

    async def task(inside, turn):
        if inside:
            with model.at_base():
                turn.set()
                await asyncio.sleep(0.01)
                return model(x).detach()
        await turn.wait()
        return model(x).detach()

    async def tasks():
        turn = asyncio.Event()
        return await asyncio.gather(task(True, turn), task(False, turn))

    with model.at_base():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert torch.equal(seen["thread"], trained)
    inside, outside = asyncio.run(tasks())
    assert torch.equal(inside, net(x))
    assert torch.equal(outside, trained)


def test_the_base_cannot_be_written_to():
    model, net, x = both("mlp")
    with model.at_base():
        with pytest.raises(SubspanError, match="would be lost"):
            model.body[0].weight.mul_(2)
        assert torch.equal(model(x), net(x))


def test_embeddings_that_shrink_rows_do_not_shrink_the_base(forming):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 2))
    plain, model = copy.deepcopy(net), scatter(SubspaceModel(net, 5))
    with model.at_base():
        got = model(torch.arange(9))
    model.subspace.changes.check_base()
    assert torch.equal(got, plain(torch.arange(9)))


def test_rows_that_are_looked_up_are_those_of_the_base(monkeypatch):
    monkeypatch.setattr(formed, "KEPT", 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(99, 4), nn.Linear(4, 2))
    plain, model = copy.deepcopy(net), scatter(SubspaceModel(net, 5))
    words = torch.tensor([3, 4])
    assert not torch.equal(model(words), plain(words))
    with model.at_base():
        assert torch.equal(model(words), plain(words))


def test_given_weights_count():
    model, _, x = both("mlp")
    given = {"body.0.weight": torch.ones(16, 8)}
    outside = torch.func.functional_call(model, given, x)
    with model.at_base():
        inside = torch.func.functional_call(model, given, x)
        assert torch.equal(model.body[0](x), build("mlp")[0](x))
    assert not torch.equal(inside, outside)  # the other layers are at θ₀


def test_the_gradient_of_the_input_is_that_of_the_base(forming):
    model, net, x = both("encoder")
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with model.at_base():
        loss = model(ours).square().sum()
    loss.backward()
    net(theirs).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_would_run_again_with_other_weights(reentrant, forming):
    model, net, x = both("mlp")
    x.requires_grad_()
    outside = checkpoint(model, x, use_reentrant=reentrant).sum()
    with model.at_base():
        with pytest.raises(SubspanError, match=r"use torch\.no_grad\(\) inside"):
            checkpoint(
                lambda x: checkpoint(model, x, use_reentrant=True), x, use_reentrant=reentrant
            )
        with torch.no_grad():
            assert torch.equal(checkpoint(model, x, use_reentrant=reentrant), net(x))
        with torch.inference_mode():
            assert torch.equal(checkpoint(model, x, use_reentrant=reentrant), net(x))
        with pytest.raises(SubspanError, match=r"call backward\(\) outside"):
            outside.backward()


def test_a_copy_and_a_merged_network():
    model, net, x = both("mlp")
    trained = model(x)
    with model.at_base():
        twin, merged = copy.deepcopy(model), model.merge()
        assert torch.equal(twin(x), trained)  # it is a network of its own
    assert torch.equal(merged(x), net(x))
    model.unwrap()
    with pytest.raises(SubspanError, match="was unwrapped"), model.at_base():
        pass


@pytest.mark.heavy
def test_compiled_code_sees_the_base():
    model, net, x = both("mlp")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    trained = compiled(x)
    with model.at_base():
        assert torch.equal(compiled(x), net(x))
        seen = []
        thread = threading.Thread(target=lambda: seen.append(compiled(x)))
        thread.start()
        thread.join()
        with model.at_base():
            assert torch.equal(compiled(x), net(x))
    assert torch.equal(seen[0], trained)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), trained)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # PyTorch has many of its own
def test_nothing_is_compiled_exported_or_traced_inside():
    model, _, x = both("mlp")
    with model.at_base():
        with pytest.raises(SubspanError, match="compiled or exported while at_base"):
            torch.export.export(model, (x,), strict=False)
        with pytest.raises(SubspanError, match=r"would keep θ₀ while at_base\(\) is open"):
            torch.jit.trace(model, (x,))
        with (
            torch.compiler.set_stance("default"),
            pytest.raises(Exception, match=r"compiled or exported while at_base"),
        ):
            torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), model(x))
