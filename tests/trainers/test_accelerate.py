"""Loops with accelerate, unchanged, around a network in a subspace or around its handle."""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import mse_loss
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from subspan import SubspaceModel, SubspanError
from tests.nets import build, scatter

accelerate = pytest.importorskip(
    "accelerate", reason="accelerate is not installed: pip install accelerate"
)
pytestmark = pytest.mark.filterwarnings("ignore")

both = pytest.mark.parametrize("through", ["network", "handle"])


@pytest.fixture(autouse=True)
def _first():
    """Accelerate keeps its state for a process: here each test begins anew."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rows(batch):
    """Batches of the same numbers at each call."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 8, generator=generator), torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch)


class Loop:
    """A model, its optimizer and its data as accelerate has prepared them."""

    def __init__(self, through, batch=8, **options):
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.model = SubspaceModel(build("mlp"), 12)
        net = self.model if through == "handle" else self.model.body
        self.net, self.optimizer, self.data = self.accelerator.prepare(
            net, Adam(net.parameters(), lr=0.1), rows(batch)
        )

    def epoch(self):
        for x, y in self.data:
            with self.accelerator.accumulate(self.net):
                self.accelerator.backward(mse_loss(self.net(x), y))
                self.accelerator.clip_grad_norm_(self.net.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    @property
    def coordinates(self):
        return self.model.coordinates["global"].detach().clone()


@both
def test_a_saved_state_goes_on_exactly(through, tmp_path):
    whole = Loop(through).epoch()
    whole.accelerator.save_state(tmp_path)
    half = whole.coordinates
    whole.epoch()
    assert load_file(tmp_path / "model.safetensors").keys() == whole.net.state_dict().keys()
    assert (tmp_path / "model.safetensors").stat().st_size < 1000
    again = Loop(through)
    again.accelerator.load_state(tmp_path)
    assert torch.equal(again.coordinates, half)
    assert torch.equal(again.epoch().coordinates, whole.coordinates)


@both
@pytest.mark.parametrize("size", ["1GB", 50])
def test_a_saved_model_loads_by_accelerate(size, through, tmp_path):
    model = scatter(SubspaceModel(build("mlp"), 12, train_fully="head"))
    other = SubspaceModel(build("mlp"), 12, train_fully="head")
    saved, loaded = (m if through == "handle" else m.body for m in (model, other))
    accelerate.Accelerator(cpu=True).save_model(saved, tmp_path, max_shard_size=size)
    accelerate.load_checkpoint_in_model(loaded, str(tmp_path))
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))


@both
@pytest.mark.parametrize(
    "take",
    [
        lambda net, folder: accelerate.cpu_offload(net, torch.device("cpu")),
        lambda net, folder: accelerate.disk_offload(net, folder, torch.device("cpu")),
        lambda net, folder: accelerate.dispatch_model(net, {"": "disk"}, offload_dir=folder),
        lambda net, folder: accelerate.load_checkpoint_in_model(net, folder, {"": "cpu"}),
    ],
)
def test_a_network_is_not_offloaded_or_loaded_tensor_by_tensor(take, through, tmp_path):
    model = scatter(SubspaceModel(build("mlp"), 12))
    net = model if through == "handle" else model.body
    accelerate.Accelerator(cpu=True).save_model(net, tmp_path)
    x = torch.randn(3, 8)
    before = scatter(model, 0.1)(x)
    with pytest.raises(SubspanError, match=r"of accelerate would take weights tensor by tensor"):
        take(net, str(tmp_path))
    assert torch.equal(model(x), before)


def test_copies_of_a_network_with_hooks_run_on_their_own_weights():
    net, x = build("mlp"), torch.randn(3, 8)
    accelerate.dispatch_model(net, {"": "cpu"}, force_hooks=True)
    inside = net.forward
    net.forward = lambda *args: inside(*args)
    model = scatter(SubspaceModel(net, 12))
    want = model(x)
    for twin in (copy.deepcopy(model), model.merge(), copy.deepcopy(model.body)):
        torch.testing.assert_close(twin(x), want)
        with torch.no_grad():
            for p in twin.parameters():
                p.data.zero_()
        assert not torch.allclose(twin(x), want)
    assert torch.equal(model(x), want)


@both
def test_mixed_precision(through):
    loop = Loop(through, mixed_precision="bf16", gradient_accumulation_steps=2).epoch()
    assert loop.coordinates.abs().min() > 0
    assert loop.accelerator.unwrap_model(loop.net) is loop.net
    twin, (x, _) = copy.deepcopy(loop.net), next(iter(loop.data))
    found = loop.net(x)
    assert found.dtype == torch.float32
    scatter(loop.model)
    assert torch.equal(twin(x), found)  # its forward is not that of the original
    plain = loop.accelerator.unwrap_model(loop.net, keep_fp32_wrapper=False)
    torch.testing.assert_close(plain(x), SubspaceModel.of(plain).merge()(x))


@both
def test_fsdp_that_would_empty_the_network_is_refused(through):
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model = scatter(SubspaceModel(build("mlp"), 12))
    x, _ = next(iter(rows(8)))
    before = model(x)
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=True
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    asking = SimpleNamespace(state=state, mixed_precision="no")
    with pytest.raises(SubspanError, match="needs θ₀ whole until it is sharded: set it to false"):
        fsdp2_prepare_model(asking, model if through == "handle" else model.body)
    assert torch.equal(model(x), before)


def test_a_copy_of_the_weights_is_one_of_an_ordinary_network(tmp_path):
    """``save_model`` of accelerate writes the state; that of merge() is an ordinary one."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = scatter(SubspaceModel(build("tied"), 12))
    accelerator.save_model(model, tmp_path / "small")
    accelerator.save_model(model.merge(), tmp_path / "all")
    state = load_file(tmp_path / "small" / "model.safetensors")
    other = SubspaceModel(build("tied"), 12)
    other.load_state_dict(state)
    assert torch.equal(other.coordinates["global"], model.coordinates["global"])
    with torch.no_grad():
        other.coordinates["global"].zero_()
    other.body.load_state_dict(load_file(tmp_path / "all" / "model.safetensors"), strict=False)
    torch.testing.assert_close(other.coordinates["global"], model.coordinates["global"])
