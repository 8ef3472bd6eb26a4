"""FSDP2: θ₀ in shards, coordinates whole, and the training of one process on the joint batch."""

import copy
import functools
import gc
import io
import pickle
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

import subspan
from subspan import SubspaceModel, SubspanError
from subspan.checkpoint import inspect
from subspan.subspace import formed, modules
from tests.nets import MLP, batch, build, scatter, wrap
from tests.ranks import go_through

pytestmark = pytest.mark.heavy

STEPS = 3
WAYS = ("layers", "root", "both", "handle")
FULLY = "2.bias"


def joint(name):
    """A batch of 8."""
    x = batch(name, torch.float64)
    return torch.cat([x, x[:3] + 1])


def rows(x, rank, world):
    return x[rank * len(x) // world : (rank + 1) * len(x) // world]


@functools.cache
def mesh_of(*shape):
    names = ("copies", "shards")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def shard(model, way, **options):
    """Shard the parts of the network, the network, both, or the handle."""
    net = model.body
    if way in ("layers", "both", "handle"):
        for layer in net.children():
            if list(layer.parameters()):
                fully_shard(layer, **options)
    if way in ("root", "both"):
        fully_shard(net, **options)
    if way == "handle":
        fully_shard(model, **options)
    return model


def train(model, x, run=None, large=False):
    """Gradients and coordinates of a few steps."""
    model.subspace.large = large
    optimizer, seen = SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (run or model)(x).square().mean().backward()
        seen.append([w.grad.clone() for w in model.coordinates.values()])
        optimizer.step()
    trained = [whole(p) for p in model.parameters() if p.requires_grad]
    return {"gradients": seen, "parameters": trained}


def whole(p):
    p = p.detach()
    return p.full_tensor() if isinstance(p, DTensor) else p.clone()


def kind(model):
    """The tensors in the slots of θ₀."""
    homes = model.subspace.homes.values()
    return sorted({type(module._parameters[name]).__name__ for module, name in homes})


CASES = {  # of networks that train as in one process
    "mlp": ("mlp", {}),
    "mlp by tensor": ("mlp", {"compartments": "tensor"}),
    "encoder by layer": ("encoder", {"compartments": "layer"}),
    "lstm": ("lstm", {"projection": "fastfood"}),
    "some exactly": ("mlp", {"train_fully": FULLY}),
    "some frozen": ("mlp", {"exclude": r"0\..*", "projection": "orthogonal"}),
}


def model_of(case):
    name, options = CASES[case]
    return wrap(
        name,
        options.get("compartments", "global"),
        torch.float64,
        **{k: v for k, v in options.items() if k != "compartments"},
    )


def trained(rank, world, case, way, large):
    model = shard(model_of(case), way)
    return train(model, rows(joint(CASES[case][0]), rank, world), large=large)


def tied(rank, world):
    model = shard(wrap("tied", dtype=torch.float64), "root")
    x = torch.arange(8)
    return train(model, rows(x, rank, world), run=model.body)


def mlp(**options):
    return wrap("mlp", dtype=torch.float64, **options)


def resharded(rank, world, how, large=True):
    model = shard(mlp(), "both", reshard_after_forward=how)
    if how is True:
        model(joint("mlp"))
        assert kind(model) == ["DTensor"], kind(model)
    return train(model, rows(joint("mlp"), rank, world), large=large)


def in_part(rank, world):
    """A layer is sharded, and another is left whole."""
    model = mlp()
    fully_shard(model.body[0])
    assert kind(model) == ["Base", "DTensor"]
    return train(model, rows(joint("mlp"), rank, world))


def in_two_dimensions(rank, world):
    model = shard(mlp(), "both", mesh=mesh_of(2, world // 2))
    return train(model, rows(joint("mlp"), rank, world))


def accumulated(rank, world, sync=True):
    """Two halves of a rank's rows, one after the other."""
    model = shard(mlp(), "both")
    mine = rows(joint("mlp"), rank, world).chunk(2)
    for last, x in enumerate(mine):
        model.body.set_requires_gradient_sync(sync or bool(last))
        (model(x).square().mean() / 2).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    return {"gradient": [w.grad for w in model.coordinates.values()], "norm": norm}


def divided(rank, world):
    model = shard(mlp(), "both")
    for part in model.body.modules():
        if hasattr(part, "set_gradient_divide_factor"):
            part.set_gradient_divide_factor(2.0 * world)
    return train(model, rows(joint("mlp"), rank, world))["gradients"][0]


def reads(rank, world):
    """Weights that are read outside of calls, and a loss that is made of them."""
    model = scatter(shard(mlp(projection="orthogonal"), "both"))
    net = model.body
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    found = {name: whole(net.get_submodule(name[0]).__getattribute__(name[2:])) for name in names}
    kinds = {type(getattr(net[0], name)).__name__ for name in ("weight", "bias")}
    listed, state = listed_by(dict(net[2].named_parameters())), listed_by(net[2].state_dict())
    (model(rows(joint("mlp"), rank, world)).square().mean() + penalty(net)).backward()
    return {
        "weights": found,
        "kinds": kinds,
        "handle": listed_by(model.weights()),
        "gradient": [w.grad for w in model.coordinates.values()],
        "parameters": listed,
        "state": state,
        "keys": list(net.state_dict()),
        "local": net[0].weight.to_local().shape,
    }


def listed_by(tensors):
    return {name: whole(tensor) for name, tensor in tensors.items()}


class Uneven(nn.Module):
    """Rows that do not divide, fewer than ranks, and one that stays at θ₀."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6, padding_idx=3), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.words(x))


def uneven(rank=0, world=1):
    """Weights that are read, and gradients of a loss of nothing but one of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = scatter(SubspaceModel(Uneven().double(), 12))
    if world > 1:
        shard(model, "both")
    model(rows(torch.arange(8), rank, world)).square().mean().backward()
    head = model.body.head.bias.square().sum()
    (head.full_tensor() if world > 1 else head).backward()
    return {
        "weights": listed_by(model.weights()),
        "gradient": [w.grad for w in model.coordinates.values()],
    }


def buffers(rank, world):
    """A network with buffers, which a file names, and a part that is frozen and sharded first."""
    model = scatter(wrap("cnn", exclude=r"head\..*"))
    fully_shard(model.body.head)
    shard(model.eval(), "root")
    if rank == 0:
        subspan.save(model, "buffers.safetensors")
    with torch.no_grad():
        return model(batch("cnn"))


def penalty(net):
    """A loss of weights that are read outside of a call, and of a part's parameters."""
    first = net[0].weight.square().sum()
    value = first + sum(p.square().sum() for p in net[2].parameters())
    return value.full_tensor() if isinstance(value, DTensor) else value


def reduced(rank, world, way):
    """Mixed precision."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, seen = scatter(wrap("mlp")), {}
    for name, layer in model.body.named_children():
        layer.register_forward_hook(functools.partial(weights_of, seen, name))
    shard(model, way, mp_policy=policy)
    model(joint("mlp").float())
    return train(model, rows(joint("mlp").float(), rank, world)) | {"weights": seen}


def weights_of(seen, name, layer, *_):
    for attribute in ("weight", "bias"):
        if hasattr(layer, attribute):
            seen.setdefault(f"{name}.{attribute}", getattr(layer, attribute).detach().clone())


def offloaded(rank, world):
    model = shard(mlp(), "both", offload_policy=CPUOffloadPolicy(pin_memory=False))
    return train(model, rows(joint("mlp"), rank, world))


def checkpointed(rank, world, reentrant):
    model = shard(mlp(), "both")

    def run(x):
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    return train(model, rows(joint("mlp"), rank, world), run=run)


class Ordered(MLP):
    """A network that checkpoints its layers itself."""

    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def checkpointed_inside(rank, world, large):
    net = build("mlp", torch.float64)
    net.__class__ = Ordered
    model = shard(SubspaceModel(net, 12), "both")
    return train(model, rows(joint("mlp"), rank, world), large=large)


def fully(rank, world, how):
    """Parameters that are trained fully and that FSDP leaves alone stay plain ones."""
    model = mlp(train_fully=r"2\..*")
    head = model.body[2]
    if how == "ignored":
        fully_shard(model.body, ignored_params=set(head.parameters()))
    else:
        fully_shard(model.body[0])
    assert not any(isinstance(p, DTensor) for p in head.parameters())
    result = train(model, rows(joint("mlp"), rank, world))
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    SGD(model.parameters(), 0.0, foreach=True).step()
    return result


def compiled(rank, world, what):
    torch._dynamo.reset()
    model = shard(mlp(), "both")
    for layer in model.body if what == "layers" else ():
        layer.compile(backend="aot_eager")
    run = torch.compile(model, backend="aot_eager") if what == "model" else model
    return train(model, rows(joint("mlp"), rank, world), run=run)


def frozen(rank, world):
    """All parameters, as a loop over a GAN's has it: θ₀ takes the flag for a wish."""
    model = shard(mlp(), "both")
    model(joint("mlp"))
    for flag in (False, True):
        for p in model.body.parameters():
            p.requires_grad_(flag)
    assert [p.requires_grad for p in model.body.parameters()] == [True] + [False] * 4
    result = train(model, rows(joint("mlp"), rank, world))
    assert [p.grad is None for p in model.body.parameters()] == [False] + [True] * 4
    return result


def methods(rank, world):
    """The methods that FSDP's modules have."""
    model = shard(mlp(), "both")
    net = model.body
    for layer in (net[0], net[2]):
        layer.unshard()
    unsharded = kind(model)
    for layer in (net[0], net[2]):
        layer.reshard()
    net.set_reshard_after_backward(False)
    net[0].set_modules_to_forward_prefetch([net[2]])
    net[2].set_modules_to_backward_prefetch([net[0]])
    if hasattr(net, "set_reduce_scatter_unused_params"):  # newer than PyTorch 2.11
        net.set_reduce_scatter_unused_params(True)
    net.double_it = lambda x: 2 * net.forward(x)
    register_fsdp_forward_method(net, "double_it")
    with torch.no_grad():
        twice = torch.equal(net.double_it(joint("mlp")), 2 * model(joint("mlp")))
    with torch.inference_mode():
        model(joint("mlp"))
    result = train(model, rows(joint("mlp"), rank, world))
    assert type(net[0]) == nn.Linear  # noqa: E721 (as programs ask)
    return result | {"unsharded": unsharded, "twice": twice}


def converted(rank, world):
    """To another precision after the network is sharded."""
    model = shard(wrap("mlp"), "both").double()
    return train(model, rows(joint("mlp"), rank, world)) | {"kind": kind(model)}


def ignored(rank, world):
    """The coordinates named, as FSDP's own option has it."""
    model = mlp()
    fully_shard(model.body, ignored_params=set(model.coordinates.values()))
    return train(model, rows(joint("mlp"), rank, world))


def beside_ordinary(rank, world):
    """FSDP keeps a class for each class: ordinary layers of the same kinds come and go."""
    for net in (build("mlp"), mlp().body, build("mlp"), mlp(exclude=".*bias").body):
        ours = isinstance(net, modules.WrappedModule)
        for layer in (net[0], net[2], net):
            fully_shard(layer)
        assert [isinstance(part, modules.WrappedModule) for part in (net, net[0])] == [ours] * 2
        trains = [name for name, p in net.named_parameters() if p.requires_grad]
        assert len(trains) == (1 if ours else 4), trains
    return "fine"


def assigned(rank, world):
    """Coordinates that load_state_dict puts in the place of others."""
    model = shard(mlp(), "both")
    state = {name: value + 0 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return train(model, rows(joint("mlp"), rank, world))


def held():
    """Bytes of all tensors of floats that Python knows; kept integers have a budget."""
    storages = {}
    for thing in gc.get_objects():
        kinds = type(thing).__mro__
        if torch.Tensor in kinds and DTensor not in kinds and thing.is_floating_point():
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def memory(rank, world):
    """Bytes of parameters: all, the largest module's, here at rest, and most during a step."""
    gc.collect()
    gc.freeze()  # what was there before is not gone over again and again
    before, seen = held(), {"forward": [], "backward": []}
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(24)), nn.Linear(256, 4))
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in net]
    for layer in net:  # before FSDP's own hooks: while the layer is whole
        layer.register_forward_hook(lambda *_: seen["forward"].append(held() - before))
    model = SubspaceModel(net, 12)
    model.subspace.large = True
    shard(model, "both", reshard_after_forward=True)
    del net
    gc.collect()
    rest, kept, again = held() - before, formed.KEPT, formed.Formula.again

    def look(formula):
        theta = again(formula)
        seen["backward"].append(held() - before)
        return theta

    formed.KEPT, formed.Formula.again = 0, look
    for _ in range(2):
        model(torch.randn(1, 256)).sum().backward()
    formed.KEPT, formed.Formula.again = kept, again
    gc.unfreeze()
    homes = model.subspace.homes.values()
    local = sum(module._parameters[name].to_local().nbytes for module, name in homes)
    most = {when: max(bytes_) for when, bytes_ in seen.items()}
    return {"all": sum(sizes), "largest": max(sizes), "local": local, "rest": rest} | most


# ---- states ------------------------------------------------------------------------------------


def stepped(model, net):
    optimizer = Adam(net.parameters(), lr=0.1)

    def step(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step(joint("mlp"))
    return optimizer, step


def write(model, start):
    """Checkpoints of all kinds after a step of Adam on the joint batch, and what came next."""
    seen = {}
    for way in ("net", "handle"):
        net = model.body if way == "net" else model
        optimizer, step = stepped(model, net)
        states = get_state_dict(net, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(
                dict(zip(("net", "optimizer"), states, strict=True)), checkpoint_id=start + way
            )
        subspan.save(model, f"{start}{way}.safetensors")
        step(joint("mlp"))
        seen[way] = [whole(p) for p in model.parameters()]
    return seen


def follow(model, path, way):
    """Load a checkpoint of ``write``, and make the step that came next."""
    net = model.body if way == "net" else model
    optimizer, step = stepped(model, net)
    states = dict(zip(("net", "optimizer"), get_state_dict(net, optimizer), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(states, checkpoint_id=path)
    set_state_dict(
        net, optimizer, model_state_dict=states["net"], optim_state_dict=states["optimizer"]
    )
    step(joint("mlp"))
    return [whole(p) for p in model.parameters()]


def saved(rank, world):
    seen = write(shard(mlp(train_fully=FULLY), "both"), f"from{world}-")
    model = shard(mlp(), "both")
    own = get_model_state_dict(model.body)
    scatter(model)
    set_model_state_dict(model.body, own)
    assert all(not isinstance(value, DTensor) for value in own.values())
    if rank == 0:
        subspan.save(model, f"from{world}-alone.safetensors")  # without the others
    return seen


def loaded(rank, world):
    """Whatever number of processes has written it."""
    found = {}
    for start in (1, 2, 4):
        for way in ("net", "handle"):
            path = f"from{start}-{way}"
            if start != world and Path(path).exists():
                found[path] = follow(shard(mlp(train_fully=FULLY), "both"), path, way)
                model = subspan.load(f"{path}.safetensors", build("mlp", torch.float64))
                found[path + " file"] = model(joint("mlp"))
                shard(model, "both")
                found[path + " shards"] = model(joint("mlp"))
    return found


# ---- what is refused ---------------------------------------------------------------------------


def sentence(act, *args, **kwargs):
    try:
        act(*args, **kwargs)
    except (SubspanError, RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refused(rank, world):
    found = {}
    net = build("mlp")
    fully_shard(net)
    found["wrong order"] = sentence(SubspaceModel, net, 12)
    assert isinstance(net[0].weight, DTensor)
    assert type(net).__mro__[1].__name__ == "FSDPModule"
    model = scatter(shard(mlp(), "both"))
    found["merge"] = sentence(model.merge)
    found["unwrap"] = sentence(model.unwrap)
    found["pickle"] = sentence(pickle.dumps, model.body)
    found["torch.save"] = sentence(torch.save, model, io.BytesIO())
    found["deepcopy"] = sentence(copy.deepcopy, model.body)
    outer = mlp()
    fully_shard(outer)
    found["deepcopy inside"] = sentence(copy.deepcopy, outer.body)
    found["optimizer"] = sentence(SGD([model.body[0]._parameters["weight"]], 0.1).step)
    merged = scatter(mlp()).merge().state_dict()
    found["state of all"] = sentence(model.body.load_state_dict, merged)
    theta, base = model.body[0].weight, model.body.get_parameter("0.weight")
    with torch.no_grad():
        found["write"] = sentence(theta.add_, 1)
        found["write data"] = sentence(theta.data.zero_)
    found["compute with base"] = sentence(lambda: (base * 2).sum())
    found["compute with data"] = sentence(lambda: base.data.norm())
    assert pickle.dumps(theta.detach())
    base.requires_grad_(False)
    found["freeze one"] = sentence(model, joint("mlp"))
    base.requires_grad_(True)
    found["own method"] = sentence(saving().save_all)
    loss = model(joint("mlp")).square().mean()
    w = next(iter(model.coordinates.values()))
    found["create_graph"] = sentence(torch.autograd.grad, loss, w, create_graph=True)
    found["load around it"] = sentence(load_around, rank)
    dim1 = shard(mlp(), "root", shard_placement_fn=lambda p: Shard(p.ndim - 1))
    found["other dimension"] = sentence(lambda: dim1.body[0].weight)
    two = mlp()
    fully_shard(two.body[0])
    found["other mesh"] = sentence(fully_shard, two.body[2], mesh=mesh_of(world, 1))
    late = shard(mlp(), "both")
    late.subspace.large = True
    for part in late.body:
        if hasattr(part, "set_unshard_in_backward"):
            part.set_unshard_in_backward(False)
    found["not gathered"] = sentence(late(joint("mlp").requires_grad_()).sum().backward)
    changed = shard(mlp(), "both")
    with torch.no_grad():
        changed.body[0]._parameters["weight"].to_local().add_(1)
    found["changed base"] = sentence(subspan.save, changed, f"changed{rank}")
    before = mlp()
    with torch.no_grad():
        before.body[0]._parameters["weight"].add_(7)
    shard(before, "both")
    found["changed before"] = sentence(subspan.save, before, f"changed{rank}")
    return found


class Saving(MLP):
    """A network with a method that saves it, as those of transformers have."""

    def save_all(self):
        return self.state_dict()


def saving():
    return shard(SubspaceModel(Saving(), 12), "both").body


def load_around(rank):
    path = f"whole{rank}.safetensors"
    subspan.save(mlp(), path)
    net = build("mlp", torch.float64)
    fully_shard(net)
    subspan.load(path, net)


def odd(rank, world, what):
    """The last rank is not like the others."""
    net = build("mlp")
    if what == "base" and rank == world - 1:
        net[0].weight.data[0, 0] += 1
    model = SubspaceModel(net, 12, seed=int(what == "seed" and rank == world - 1))
    if what == "w" and rank == world - 1:
        scatter(model)
    shard(model, "both")
    return sentence(model, batch("mlp"))


SCENARIOS = {
    f"{case}, {way}, {large}": functools.partial(trained, case=case, way=way, large=large)
    for case, ways in {**dict.fromkeys(CASES, ("both",)), "mlp": WAYS, "lstm": ("root",)}.items()
    for way in ways
    for large in (False, True)
}
SCENARIOS |= {
    "tied": tied,
    "resharded": functools.partial(resharded, how=True),
    "resharded, small": functools.partial(resharded, how=True, large=False),
    "never resharded": functools.partial(resharded, how=False),
    "resharded to two": lambda rank, world: resharded(rank, world, 2 if world == 4 else True),
    "in part": in_part,
    "two dimensions": in_two_dimensions,
    "accumulated": accumulated,
    "accumulated, no sync": functools.partial(accumulated, sync=False),
    "divided": divided,
    "reads": reads,
    "uneven": uneven,
    "buffers": buffers,
    "bfloat16, both": functools.partial(reduced, way="both"),
    "bfloat16, root": functools.partial(reduced, way="root"),
    "offloaded": offloaded,
    "checkpointed": functools.partial(checkpointed, reentrant=False),
    "checkpointed, reentrant": functools.partial(checkpointed, reentrant=True),
    "checkpointed inside": functools.partial(checkpointed_inside, large=False),
    "checkpointed inside, large": functools.partial(checkpointed_inside, large=True),
    "fully, ignored": functools.partial(fully, how="ignored"),
    "fully, left": functools.partial(fully, how="left"),
    "frozen": frozen,
    "methods": methods,
    "converted": converted,
    "ignored": ignored,
    "beside": beside_ordinary,
    "assigned": assigned,
    "memory": memory,
    "compiled model": functools.partial(compiled, what="model"),
    "compiled layers": functools.partial(compiled, what="layers"),
    "saved": saved,
    "loaded": loaded,
    "other base": functools.partial(odd, what="base"),
    "other seed": functools.partial(odd, what="seed"),
    "other w": functools.partial(odd, what="w"),
    "the same": functools.partial(odd, what=""),
    "refused": refused,
}


# ---- what they saw -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two ranks, and what they saw."""
    folder = tmp_path_factory.mktemp("two")
    write(mlp(train_fully=FULLY), f"{folder}/from1-")
    return folder, go_through(__name__, 2, folder)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def world(request, two, tmp_path_factory):
    """The folder of ranks, and what they saw; four come after two."""
    if request.param == 2:
        return two
    folder = tmp_path_factory.mktemp("four")
    write(mlp(train_fully=FULLY), f"{folder}/from1-")
    for path in two[0].glob("from2-*"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    return folder, go_through(__name__, 4, folder)


@pytest.fixture
def ranks(world):
    return world[1]


def same(found, alone):
    torch.testing.assert_close(found, {name: alone[name] for name in found})


def picked(result, *names):
    return {name: result[name] for name in names}


TRAINED = [name for name in SCENARIOS if name.split(",")[0] in CASES]


@pytest.mark.parametrize("scenario", TRAINED)
def test_training_is_that_of_one_process_on_the_joint_batch(ranks, scenario):
    case = scenario.split(", ")[0]
    alone = train(model_of(case), joint(CASES[case][0]))
    for rank in ranks:
        same(picked(rank[scenario], "gradients", "parameters"), alone)


@pytest.mark.parametrize(
    "scenario",
    [
        "resharded",
        "resharded, small",
        "never resharded",
        "resharded to two",
        "in part",
        "two dimensions",
        "offloaded",
        "checkpointed",
        "checkpointed, reentrant",
        "checkpointed inside",
        "checkpointed inside, large",
        "methods",
        "ignored",
        "assigned",
        "frozen",
        "compiled model",
        "compiled layers",
    ],
)
def test_so_it_is_with_whatever_fsdp_can_do(ranks, scenario):
    alone = train(mlp(), joint("mlp"))
    for rank in ranks:
        same(picked(rank[scenario], "gradients", "parameters"), alone)


@pytest.mark.parametrize("how", ["ignored", "left"])
def test_what_is_trained_fully_and_stays_whole_is_averaged_too(ranks, how):
    alone = train(mlp(train_fully=r"2\..*"), joint("mlp"))
    for rank in ranks:
        same(picked(rank[f"fully, {how}"], "gradients", "parameters"), alone)


def test_tied_weights_are_one(ranks):
    model = wrap("tied", dtype=torch.float64)
    alone = train(model, torch.arange(8))
    for rank in ranks:
        same(rank["tied"], alone)


def test_every_rank_has_the_same_bits(ranks):
    for scenario in TRAINED:
        for rank in ranks:
            pairs = zip(rank[scenario]["parameters"], ranks[0][scenario]["parameters"], strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("scenario", ["accumulated", "accumulated, no sync"])
def test_gradients_add_up_and_are_clipped_alike(ranks, scenario):
    model = mlp()
    model(joint("mlp")).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    alone = {"gradient": [w.grad for w in model.coordinates.values()], "norm": norm}
    for rank in ranks:
        same(rank[scenario], alone)
        assert torch.equal(rank[scenario]["norm"], ranks[0][scenario]["norm"])


def test_the_divisor_of_gradients_counts(ranks):
    alone = train(mlp(), joint("mlp"))["gradients"][0]
    for rank in ranks:
        torch.testing.assert_close(rank["divided"], [grad / 2 for grad in alone])


def test_weights_outside_of_calls_are_shards_of_theta(ranks):
    model = scatter(mlp(projection="orthogonal"))
    net = model.body
    weights = {name: w.detach() for name, w in model.weights().items()}
    (model(joint("mlp")).square().mean() + penalty(net)).backward()
    gradient = [w.grad for w in model.coordinates.values()]
    names = {"weight": weights["2.weight"], "bias": weights["2.bias"]}
    for rank in ranks:
        seen = rank["reads"]
        assert seen["kinds"] == {"DTensor"}
        assert seen["local"] == (16 // len(ranks), 8)
        assert seen["keys"] == ["subspan_global", "subspan_fingerprint"]
        torch.testing.assert_close(seen["weights"], weights)
        torch.testing.assert_close(seen["handle"], weights)
        torch.testing.assert_close(seen["parameters"], names)
        torch.testing.assert_close(seen["state"], names)
        torch.testing.assert_close(seen["gradient"], gradient)


def test_shards_may_be_uneven_and_empty(ranks):
    alone = uneven()
    for rank in ranks:
        same(rank["uneven"], alone)


def test_a_network_with_buffers_is_saved_by_one_rank(world):
    folder, ranks = world
    path = f"{folder}/buffers.safetensors"
    model = subspan.load(path, build("cnn")).eval()
    assert inspect(path)["parameters"] == model.subspace.parameters_digest()
    for rank in ranks:
        torch.testing.assert_close(rank["buffers"], model(batch("cnn")))


@pytest.mark.parametrize("way", ["both", "root"])
def test_mixed_precision_is_that_of_a_network_in_low_precision(ranks, way):
    model = scatter(SubspaceModel(build("mlp").bfloat16(), 12))
    weights = {name: w.detach() for name, w in model.weights().items()}
    alone = train(model, joint("mlp").bfloat16())
    for rank in ranks:
        seen = rank[f"bfloat16, {way}"]
        assert all(torch.equal(weights[name], w) for name, w in seen["weights"].items())
        assert seen["weights"].keys() == weights.keys()
        assert all(p.dtype == torch.float32 for p in seen["parameters"])
        torch.testing.assert_close(
            seen["gradients"][0], alone["gradients"][0], rtol=0.05, atol=0.01
        )


def test_a_sharded_network_is_converted(ranks):
    alone = train(wrap("mlp").double(), joint("mlp"))
    for rank in ranks:
        same(picked(rank["converted"], "gradients", "parameters"), alone)


def test_the_methods_of_fsdp_are_there(ranks):
    for rank in ranks:
        assert rank["methods"]["unsharded"] == ["Parameter"]
        assert rank["methods"]["twice"]


def test_ordinary_networks_may_stand_beside(ranks):
    assert [rank["beside"] for rank in ranks] == ["fine"] * len(ranks)


def test_each_rank_holds_its_share(ranks):
    """And for a moment a few modules: θ₀, θ and gradient of one, and θ₀ of the next."""
    share = {2: 0.55, 4: 0.30}[len(ranks)]
    for rank in ranks:
        seen = rank["memory"]
        assert seen["local"] <= share * seen["all"]
        assert seen["rest"] <= share * seen["all"] + seen["largest"]
        assert seen["forward"] <= share * seen["all"] + 4 * seen["largest"]
        assert seen["backward"] <= share * seen["all"] + 5 * seen["largest"]


# ---- checkpoints -------------------------------------------------------------------------------


def test_checkpoints_of_one_process_are_loaded_by_many(world, tmp_path):
    _, ranks = world
    alone = write(mlp(train_fully=FULLY), f"{tmp_path}/alone-")
    starts = {1, 2} if len(ranks) == 4 else {1}
    for rank in ranks:
        found = rank["loaded"]
        assert len(found) == 6 * len(starts)
        for start in starts:
            for way in ("net", "handle"):
                torch.testing.assert_close(found[f"from{start}-{way}"], alone[way])
                there = found[f"from{start}-{way} file"]
                torch.testing.assert_close(found[f"from{start}-{way} shards"], there)


@pytest.mark.parametrize("way", ["net", "handle"])
def test_checkpoints_of_many_are_loaded_by_one_process(world, tmp_path, way):
    folder, ranks = world
    alone = write(mlp(train_fully=FULLY), f"{tmp_path}/alone-")
    path = f"{folder}/from{len(ranks)}-{way}"
    for rank in ranks:
        torch.testing.assert_close(rank["saved"][way], alone[way])
    torch.testing.assert_close(follow(mlp(train_fully=FULLY), path, way), alone[way])
    one, other = (
        subspan.load(f"{name}.safetensors", build("mlp", torch.float64))
        for name in (path, f"{tmp_path}/alone-{way}")
    )
    torch.testing.assert_close(one(joint("mlp")), other(joint("mlp")))


def test_one_rank_alone_may_save_coordinates(world):
    folder, ranks = world
    path = f"{folder}/from{len(ranks)}-alone.safetensors"
    assert inspect(path)["tensors"] == {"coordinates": [12]}
    subspan.load(path, build("mlp", torch.float64))


# ---- refusals ----------------------------------------------------------------------------------

BEFORE = "around the whole network as it was before"


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        ("wrong order", "SubspanError: 0.weight is sharded over processes already, and a subspace"),
        (
            "wrong order",
            r"wrap the network first, SubspaceModel\(net, …\), and then .* fully_shard",
        ),
        ("load around it", "wrap the network first"),
        ("merge", f"cannot be merged: .*{BEFORE}"),
        ("unwrap", f"cannot be unwrapped .*{BEFORE}"),
        ("pickle", f"cannot be copied or pickled: .*{BEFORE}"),
        ("torch.save", f"cannot be copied or pickled: .*{BEFORE}"),
        ("deepcopy inside", f"cannot be copied or pickled: .*{BEFORE}"),
        ("deepcopy", "FSDP does not support deepcopy"),
        ("optimizer", "SubspanError: the optimizer has 0.weight, which is frozen"),
        ("state of all", "SubspanError: .* a state of all weights: load it before fully_shard"),
        ("write", "SubspanError: 0.weight is θ₀ .* P w, computed .*add_.* would be lost"),
        ("write data", "SubspanError: 0.weight is θ₀ .* P w, computed .*zero_.* would be lost"),
        ("compute with base", "SubspanError: 0.weight among parameters.* is a shard of θ₀"),
        ("compute with data", "SubspanError: 0.weight among parameters.* is a shard of θ₀"),
        ("freeze one", "SubspanError: requires_grad of 0.weight was set to False"),
        ("own method", f"cannot be saved with all its weights: .*{BEFORE}"),
        ("create_graph", "SubspanError: .*differentiated again"),
        ("other dimension", "SubspanError: 0.weight is sharded along another dimension"),
        ("other mesh", "SubspanError: 2.weight would be sharded over other processes"),
        ("not gathered", "RuntimeError: the backward pass needs 2.weight, which is sharded"),
        ("changed base", "SubspanError: θ₀ of 0.weight was changed"),
        ("changed before", "SubspanError: θ₀ of 0.weight was changed"),
    ],
)
def test_what_cannot_be_says_so(ranks, scenario, what):
    for n, rank in enumerate(ranks):
        if n == 0 or not scenario.startswith("changed"):  # of which rank 0 has the row
            match(what, rank["refused"][scenario])


def match(pattern, text):
    assert re.search(pattern, text), text


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        ("other base", "different initial weights"),
        ("other seed", "different projections or compartments"),
        ("other w", "different coordinates"),
    ],
)
def test_every_rank_says_that_one_is_different(ranks, scenario, what):
    for rank in ranks:
        match(f"SubspanError: the processes .* {what}", rank[scenario])
        assert rank["the same"] == "nothing was refused"
