"""Plain DistributedDataParallel: d numbers on the wire, the same model on every rank."""

import copy
import functools
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import _module_wrap_policy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

from subspan import SubspaceModel, SubspanError, grow
from subspan.layers import product_of_sums
from subspan.subspace.parameters import saved_buffers
from tests.nets import batch, build
from tests.ranks import go_through

pytestmark = pytest.mark.heavy

DIM = 12
STEPS = 3


def rows(x, rank, world):
    """This rank's part of a joint batch of 8."""
    return x[rank * len(x) // world : (rank + 1) * len(x) // world]


def joint_batch():
    return torch.cat([batch("mlp", torch.float64), batch("mlp", torch.float64)[:3] + 1])


def double_mlp(**options):
    return SubspaceModel(build("mlp", torch.float64), DIM, **options)


def train(model, x):
    """Gradients and coordinates of a few steps of SGD."""
    optimizer, seen = SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        seen.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        optimizer.step()
    trained = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    return {"gradients": seen, "parameters": trained}


def averaged(rank, world):
    model = double_mlp(train_fully="2.bias")
    model(joint_batch())  # a call before is allowed
    ddp, sent = DistributedDataParallel(model), []

    def count(state, bucket):
        sent.append((bucket.buffer().numel(), bucket.buffer().element_size()))
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, count)
    result = train(ddp, rows(joint_batch(), rank, world))
    return result | {"sent": sent, "buffers": buffers_sent(ddp)}


def buffers_sent(ddp):
    """Sizes of what every forward pass broadcasts, by name."""
    names = {id(buffer): name for name, buffer in ddp.module.named_buffers()}
    return {names[id(b)]: b.numel() for b in ddp.modules_buffers}


def normalised(rank, world):
    ddp = DistributedDataParallel(SubspaceModel(build("cnn"), DIM))
    train(ddp, batch("cnn")[rank : rank + 2])
    before = copy.deepcopy(saved_buffers(ddp.module.body))
    with torch.no_grad():
        ddp.eval()(batch("cnn"))
    after = saved_buffers(ddp.module.body)
    return {"before": before, "after": after, "buffers": buffers_sent(ddp)}


def refused(rank, world, *, seed=False, base=False, dry=False):
    """The last rank is not like the others."""
    odd = rank == world - 1
    net = build("mlp")
    if base and odd:
        net[0].weight.data[0, 0] += 1
    model = SubspaceModel(net, DIM, seed=int(seed and odd))
    if dry:
        model(batch("mlp"))
    ddp = DistributedDataParallel(model)
    try:
        ddp(batch("mlp"))
    except SubspanError as error:
        return str(error)
    return None


def said_by(call):
    try:
        call()
    except SubspanError as error:
        return str(error)
    return None


def grown(rank, world, *, nested):
    """Coordinates that come into the place of others inside of DDP; the network alone, nested."""
    model = double_mlp(train_fully="2.bias")
    outer = nn.Sequential(model.body) if nested else model
    x = rows(joint_batch(), rank, world)
    ddp, optimizer = DistributedDataParallel(outer), Adam(outer.parameters(), 0.01)
    steps(ddp, optimizer, x, 2)
    grow(model, 2 * DIM, optimizer)
    said = said_by(lambda: ddp(x))
    ddp = DistributedDataParallel(outer)
    steps(ddp, optimizer, x, 2)
    trained = [p.detach().clone() for p in model.parameters()]
    model.unwrap()
    return {"said": said, "parameters": trained, "unwrapped": said_by(lambda: ddp(x))}


def steps(model, optimizer, x, number):
    for _ in range(number):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


class Part(nn.Module):
    """A head of its own behind a part of a network in a subspace."""

    def __init__(self, part):
        super().__init__()
        self.part, self.head = part, nn.Linear(part.out_features, 2)

    def forward(self, x):
        return self.head(self.part(x))


def parts(rank, world):
    """DDP around a module that holds a part of a network, whose coordinates it does not average."""
    model = SubspaceModel(build("mlp"), DIM)
    said = said_by(lambda: DistributedDataParallel(Part(model.body[0])))
    whole = nn.ModuleList([Part(model.body[0]), model.body])
    said_whole = said_by(lambda: DistributedDataParallel(whole))
    model.coordinates["global"].requires_grad_(False)
    return said, said_whole, said_by(lambda: DistributedDataParallel(Part(model.body[0])))


def sums(rank, world):
    """Products of sums, of which a process may have drawn fixed matrices of its own."""
    rule = {".*": [{"kind": "hash", "p": 20}]}
    made = [product_of_sums(build("mlp"), rule, seed=seed) for seed in (0, rank)]
    return [said_by(lambda net=net: copy.deepcopy(DistributedDataParallel(net))) for net in made]


def inside(rank, world):
    """DDP in the network that is to be wrapped, and around it."""
    ddp = DistributedDataParallel(build("mlp"))
    said = [said_by(lambda net=net: SubspaceModel(net, 5)) for net in (ddp, nn.Sequential(ddp))]
    DistributedDataParallel(SubspaceModel(ddp.module, 5))(batch("mlp"))
    return said


def spread(rank, world):
    """Tensor parallelism after the network was wrapped."""
    model, mesh = SubspaceModel(build("mlp"), DIM), init_device_mesh("cpu", (world,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return said_by(lambda: parallelize_module(model.body, mesh, plan))


def flattened(rank, world):
    """FSDP1 around a network, its handle, parts of it and what holds it; and beside it."""
    model = double_mlp()
    whole, part = model.body, model.body[0]
    cpu, parts = {"device_id": torch.device("cpu")}, {nn.Linear}
    by_layer = functools.partial(_module_wrap_policy, module_classes=parts)
    said = [
        said_by(functools.partial(FullyShardedDataParallel, given, **options, **cpu))
        for given, options in (
            (model, {}),
            (whole, {"use_orig_params": True}),
            (part, {}),
            (nn.Sequential(model), {}),
            (whole, {"auto_wrap_policy": by_layer}),
        )
    ]
    beside = nn.ModuleDict({"ours": model, "theirs": nn.Linear(8, 8).double()})
    FullyShardedDataParallel(beside, ignored_modules=[model], **cpu)
    x = rows(joint_batch(), rank, world)
    return said, train(DistributedDataParallel(model), x)["parameters"]


def staged(rank, world):
    """A pipeline of one stage: a part, a part inside of another module, and the network."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe  # imports much

    alone = [dist.new_group([n]) for n in range(world)][rank]
    model, x = double_mlp(), batch("mlp", torch.float64)
    said = []
    for part in (model.body[0], nn.Sequential(model.body[0], nn.Tanh()), model):
        stage = PipelineStage(part, 0, 1, torch.device("cpu"), group=alone)
        schedule = ScheduleGPipe(stage, 1, loss_fn=lambda out, _: out.sum())
        said.append(said_by(functools.partial(schedule.step, x, target=x)))
    (w,) = model.coordinates.values()
    (wanted,) = torch.autograd.grad(model(x).sum(), w)
    return said, w.grad - wanted


def sent(rank, world):
    """A computed weight, from the first process to the others."""
    weight = double_mlp().body[0].weight.detach()
    room = weight if rank == 0 else torch.zeros_like(weight)
    for source in ({"src": 0}, {"group_src": 0}):
        dist.broadcast(room, **source)
    return torch.equal(room, weight), said_by(lambda: dist.broadcast(weight, 1 - min(rank, 1)))


def shared(rank, world):
    """Each process has the optimizer's memory of its share of the parameters, frozen ones too."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of TorchScript

    model = double_mlp(train_fully="2.bias")
    ddp, x = DistributedDataParallel(model), rows(joint_batch(), rank, world)
    kind = ZeroRedundancyOptimizer
    optimizer = kind(ddp.parameters(), optimizer_class=Adam, lr=0.01)
    steps(ddp, optimizer, x, 3)
    frozen = [p for p in model.body.parameters() if not p.requires_grad]
    left_out = kind(frozen, optimizer_class=Adam, lr=0.01)
    return [p.detach().clone() for p in model.parameters()], said_by(left_out.step)


def left_alone(rank, world):
    """A rank that is refused ends; the others must not wait for it."""
    ddp = DistributedDataParallel(double_mlp())
    out = ddp(joint_batch()).sum()
    if rank == world - 1:
        return "gone"
    start = time.monotonic()
    try:
        for _ in range(3):
            out.backward(retain_graph=True)
    except RuntimeError:
        return time.monotonic() - start
    return "nothing was noticed"


SCENARIOS = {
    "averaged": averaged,
    "normalised": normalised,
    "other base": lambda *ranks: refused(*ranks, base=True),
    "other base, called before": lambda *ranks: refused(*ranks, base=True, dry=True),
    "other seed": lambda *ranks: refused(*ranks, seed=True),
    "the same": refused,
    "grown": lambda *ranks: grown(*ranks, nested=False),
    "grown in another module": lambda *ranks: grown(*ranks, nested=True),
    "parts": parts,
    "inside": inside,
    "sums": sums,
    "spread": spread,
    "flattened": flattened,
    "staged": staged,
    "sent": sent,
    "shared": shared,
    "left alone": left_alone,  # last: ranks end inside
}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """The observations of every rank of a world of processes."""
    return go_through(__name__, request.param, tmp_path_factory.mktemp("ranks"))


def test_gradients_are_those_of_the_joint_batch(ranks):
    alone = train(double_mlp(train_fully="2.bias"), joint_batch())
    for rank in ranks:
        torch.testing.assert_close(rank["averaged"]["gradients"], alone["gradients"])
        torch.testing.assert_close(rank["averaged"]["parameters"], alone["parameters"])


def test_every_rank_has_the_same_bits(ranks):
    first = ranks[0]["averaged"]["parameters"]
    for rank in ranks[1:]:
        assert all(map(torch.equal, rank["averaged"]["parameters"], first))


def test_d_numbers_go_over_the_wire(ranks):
    """And those that are trained fully; a step of all weights would send 212."""
    for rank in ranks:
        assert rank["averaged"]["sent"] == [(DIM + 4, 8)] * STEPS


def test_products_of_sums_of_other_matrices_are_refused(ranks):
    """DDP would average their coefficients as if they were those of one matrix."""
    for rank in ranks:
        same, different = rank["sums"]
        assert same is None
        assert different.startswith("a ProductOfSumsLinear has other fixed matrices in some")


def test_the_base_is_never_sent(ranks):
    norm = {
        "body.norm.running_mean": 4,
        "body.norm.running_var": 4,
        "body.norm.num_batches_tracked": 1,
    }
    for rank in ranks:
        assert rank["averaged"]["buffers"] == {"body.subspan_fingerprint": 32}
        assert rank["normalised"]["buffers"] == {"body.subspan_fingerprint": 32} | norm


def test_the_base_is_not_sent_either_if_the_model_was_compiled_first(tmp_path):
    meeting = f"file://{tmp_path}/meet"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        compiled = torch.compile(double_mlp(), backend="eager")
        sent = buffers_sent(DistributedDataParallel(compiled))
    finally:
        dist.destroy_process_group()
    assert sent == {"_orig_mod.body.subspan_fingerprint": 32}


def test_buffers_of_batchnorm_are_still_synchronised(ranks):
    first = ranks[0]["normalised"]
    mean = "norm.running_mean"
    assert len(first["after"]) == 3
    for rank in ranks[1:]:
        assert not torch.equal(rank["normalised"]["before"][mean], first["before"][mean])
        for name, buffer in first["after"].items():
            assert torch.equal(rank["normalised"]["after"][name], buffer)


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        ("other base", "the initial weights"),
        ("other base, called before", "the initial weights"),
        ("other seed", "the projection or its compartments"),
    ],
)
def test_the_rank_that_differs_says_so(ranks, scenario, what):
    *others, odd = [rank[scenario] for rank in ranks]
    assert others == [None] * len(others)
    assert odd.startswith(f"{what} of this process differ from those of rank 0")


def test_ranks_that_agree_are_not_refused(ranks):
    assert [rank["the same"] for rank in ranks] == [None] * len(ranks)


@pytest.mark.parametrize("scenario", ["grown", "grown in another module"])
def test_coordinates_that_are_replaced_inside_of_ddp_are_noticed(ranks, scenario):
    """Its buckets are those of the old ones: each process would train the new ones alone."""
    alone = double_mlp(train_fully="2.bias")
    optimizer = Adam(alone.parameters(), 0.01)
    steps(alone, optimizer, joint_batch(), 2)
    grow(alone, 2 * DIM, optimizer)
    steps(alone, optimizer, joint_batch(), 2)
    for rank in ranks:
        found = rank[scenario]
        assert "in whose place grow() has put others" in found["said"]
        assert "that unwrap() has taken out" in found["unwrapped"]
        torch.testing.assert_close(found["parameters"], list(alone.parameters()))


def test_a_part_in_another_module_is_refused(ranks):
    for rank in ranks:
        part, whole, frozen = rank["parts"]
        assert "a part of a network in a subspace cannot be given to DDP" in part
        assert (whole, frozen) == (None, None)


def test_what_ddp_has_made_is_refused(ranks):
    for rank in ranks:
        assert len(rank["inside"]) == 2
        assert all("would not average the gradients of coord" in said for said in rank["inside"])


def test_tensor_parallelism_is_refused(ranks):
    for rank in ranks:
        assert rank["spread"].startswith("tensor parallelism spreads single layers")


def test_fsdp1_is_refused_and_changes_nothing(ranks):
    alone = train(double_mlp(), joint_batch())["parameters"]
    for rank in ranks:
        said, trained = rank["flattened"]
        assert all(" (FSDP1) makes one parameter of many" in one for one in said)
        torch.testing.assert_close(trained, alone)


def test_a_part_is_no_stage_of_a_pipeline(ranks):
    """Each process would train the coordinates of all parts by its own part's gradient."""
    for rank in ranks:
        (*parts, whole), difference = rank["staged"]
        assert all("cannot be a stage of a pipeline" in said for said in parts)
        assert whole is None
        assert not difference.any()


def test_a_computed_weight_may_be_sent_and_not_received(ranks):
    for rank in ranks:
        equal, said = rank["sent"]
        assert equal
        assert "a change of it (broadcast) would be lost" in said


def test_an_optimizer_may_be_shared_among_processes(ranks):
    alone = double_mlp(train_fully="2.bias")
    steps(alone, Adam(alone.parameters(), 0.01), joint_batch(), 3)
    for rank in ranks:
        parameters, said = rank["shared"]
        torch.testing.assert_close(parameters, list(alone.parameters()))
        assert "and not the coordinates that train it" in said


def test_nobody_waits_for_a_rank_that_ended(ranks):
    *others, gone = [rank["left alone"] for rank in ranks]
    assert gone == "gone"
    assert all(seconds < 30 for seconds in others)
