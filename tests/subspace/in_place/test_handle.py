"""The handle in the hands of programs that mark, compile, list and load what they are given."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

import subspan
from subspan import SubspaceModel, checkpoint
from tests.nets import build, scatter, wrap
from tests.subspace.in_place.network import Net, pair


def test_programs_that_hook_the_handle_and_the_network():
    hooks = pytest.importorskip("accelerate.hooks")

    class Times(hooks.ModelHook):
        def __init__(self, factor):
            self.factor = factor

        def post_forward(self, module, output):
            return self.factor * output

    model, merged, x = pair()
    hooks.add_hook_to_module(model, Times(2))
    hooks.add_hook_to_module(model.body, Times(3))
    torch.testing.assert_close(model(x), 6 * merged(x))
    hooks.remove_hook_from_module(model)
    torch.testing.assert_close(model(x), 3 * merged(x))
    hooks.remove_hook_from_module(model.body)
    torch.testing.assert_close(model(x), merged(x))


@pytest.mark.heavy
@pytest.mark.parametrize("first", ["handle", "network"])
def test_the_handle_and_the_network_are_compiled_in_place(first):
    model, merged, x = pair()
    for net in (model, model.body) if first == "handle" else (model.body, model):
        net.compile(backend="eager")
        torch.testing.assert_close(model(x), merged(x))


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["handle", "network", "DDP", "DDP of the network", "a part"])
@pytest.mark.parametrize("option", ["", "full_state_dict", "ignore_frozen_params"])
def test_distributed_checkpoints_of_a_model_and_its_optimizer(way, option, alone):
    torch.manual_seed(0)
    options = {"train_fully": "head.bias"}
    if way != "DDP of the network":  # whose state has no place for what nobody trains
        options["exclude"] = "body.0.bias"
    model, x = scatter(SubspaceModel(Net(), 20, **options)), torch.randn(5, 8)
    net = model.body if "network" in way else model
    net = DistributedDataParallel(net) if "DDP" in way else net
    net = torch.nn.Sequential(net) if way == "a part" else net
    optimizer = Adam(net.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return model(x)

    step()
    options = StateDictOptions(**{option: True} if option else {})
    kept = copy.deepcopy(get_state_dict(net, optimizer, options=options))
    given = copy.deepcopy(kept)
    want = step(), step()
    states = {"model_state_dict": given[0], "optim_state_dict": given[1]}
    set_state_dict(net, optimizer, **states, options=options)
    assert torch.equal(step(), want[0])
    assert torch.equal(step(), want[1])
    scatter(model)
    set_model_state_dict(net, dict(kept[0]), options=options)
    own = get_model_state_dict(net)
    assert all(torch.equal(value, own[name]) for name, value in kept[0].items())


def test_modes_are_the_networks_own_whoever_makes_a_handle(tmp_path):
    """A layer of normalisation that is kept in eval mode stays there when its network is saved."""
    assert not SubspaceModel(build("cnn").eval(), 12).training  # as from_pretrained gives them
    model = wrap("cnn")
    assert model.training
    model.body.norm.eval()
    for use in (
        SubspaceModel.of,
        lambda net: subspan.save(net, tmp_path / "m"),
        lambda net: checkpoint.restore(net, checkpoint.read(tmp_path / "m")[1]),
        lambda net: subspan.grow(net, 24),
    ):
        use(model.body)
        assert model.body.training
        assert not model.body.norm.training
    assert not SubspaceModel.of(model.body.eval()).training
    assert not subspan.load(tmp_path / "m", build("cnn").eval()).training
