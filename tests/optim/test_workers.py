"""Many processes, one training: what travels, what is equal, and who is named when it is not."""

from __future__ import annotations

import re
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from subspan import SubspanError, projection
from subspan.layers import factorize
from subspan.optim import DLRT, RandomBases, replay
from tests.optim.test_random_bases import X, dense, flat, gradient, loss_of, mlp, run
from tests.ranks import go_through

pytestmark = pytest.mark.heavy

STEPS = 4


def halves(rank, world):
    """This rank's part of the batch of 20."""
    return slice(rank * 20 // world, (rank + 1) * 20 // world)


def trained(rank, world, workers, *, same_batch=False, **options):
    """A few steps on this rank's part of a batch."""
    net = mlp()
    optimizer = RandomBases(net, 12, 0.5, workers=workers, check_every=2, seed=4, **options)
    part = slice(0, 20) if same_batch else halves(rank, world)
    for _ in range(STEPS):
        optimizer.zero_grad()
        y = torch.arange(20)[part] % 4
        torch.nn.functional.cross_entropy(net(X[part]), y).backward()
        optimizer.step()
    return {"weights": flat(net), "layout": optimizer.layout}


def refused(rank, world, *, odd=None, **options):
    """The last rank is not like the others."""
    settings, net = {"dim": 12, "seed": 0} | options, mlp()
    if rank == world - 1:
        if odd == "weights":
            net[0].bias.data[0] += 1
        elif odd == "net":
            net = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.Linear(40, 4)).double()
        elif odd:
            settings |= odd
    optimizer = RandomBases(net, lr=0.1, workers="shared", **settings)
    loss_of(net).backward()
    try:
        optimizer.step()
    except SubspanError as error:
        return str(error)
    return None


def under_ddp(rank, world, *, odd=False, **options):
    """Without workers: DDP averages gradients, and the last rank may have a seed of its own."""
    net = mlp()
    model = DistributedDataParallel(net)
    optimizer = RandomBases(net, 12, 0.5, seed=4 + (odd and rank == world - 1), **options)
    part, needs = halves(rank, world), optimizer.needs_closure

    def closure():
        optimizer.zero_grad()
        y = torch.arange(20)[part] % 4
        loss = torch.nn.functional.cross_entropy(model(X[part]), y)
        return loss if needs else loss.backward()

    try:
        for _ in range(STEPS):
            optimizer.step(closure)
    except SubspanError as error:
        return str(error)
    return flat(net)


def sharded(rank, world):
    """Parameters that FSDP2 has spread over processes, whose memory no kernel can be given."""
    net = fully_shard(mlp(torch.float32))
    low = fully_shard(factorize(mlp(torch.float32), rank=2))
    p, w = projection("hash", out_dim=16, in_dim=4), torch.zeros(4)
    tries = (
        lambda: RandomBases(net, 12),
        lambda: DLRT(low, 0.1),
        lambda: p.addmv_(net[0].bias.detach(), w),
        lambda: p.addrmv_(w, net[0].bias.detach()),
    )
    return [said_by(act) for act in tries]


def said_by(act):
    try:
        act()
    except SubspanError as error:
        return str(error)
    return None


def diverged(rank, world):
    """Something else changes one bit of one rank's weights."""
    net = mlp(torch.float32)
    optimizer = RandomBases(net, 12, 0.1, workers="shared", check_every=2)
    seen = None
    for step in range(4):
        optimizer.zero_grad()
        loss_of(net).backward()
        if step == 2 and rank == 1:
            net[0].bias.data.view(torch.int32)[3] ^= 1
        try:
            optimizer.step()
        except SubspanError as error:
            seen = (step, str(error))
            break
    return seen


def void(rank, world):
    """A gradient that is no number on one rank makes the step void on all."""
    net = mlp()
    optimizer = RandomBases(net, 12, 0.1, workers="shared")
    loss_of(net).backward()
    if rank == 0:
        net[0].bias.grad[0] = float("nan")
    optimizer.step()
    return {"weights": flat(net), "skipped": optimizer.skipped}


def big(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(1000, 93)  # 93,093 weights


def bytes_sent(rank, world):
    """By all ranks together, per step and rank: over the loopback device, and to sockets."""
    if world == 1:
        return None
    x, found = torch.randn(4, 1000), {}

    def counts():
        written = Path("/proc/self/io").read_text().partition("wchar: ")[2].split()[0]
        total = torch.tensor([int(written)])
        dist.all_reduce(total)
        return psutil.net_io_counters(pernic=True)["lo"].bytes_sent, int(total)

    def counted(name, train, steps):
        train()  # meetings, and the first step's comparisons
        rounds = []
        for _ in range(5):
            before = counts()
            for _ in range(steps):
                train()
            after = counts()
            rounds.append([(b - a) / steps / world for a, b in zip(before, after, strict=True)])
        # What others send over the device only adds to it.
        found[name] = [min(column) for column in zip(*rounds, strict=True)]

    def step_of(net, optimizer, inner):
        def train():
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

        return train

    # The same test with other ranks, in another worker of pytest-xdist, waits for its turn.
    with FileLock(Path(tempfile.gettempdir()) / "subspan-loopback") if rank == 0 else nullcontext():
        dist.barrier()
        for name in ("shared", "independent"):
            net = big()
            optimizer = RandomBases(net, 250, 0.1, workers=name, check_every=0)
            counted(name, step_of(net, optimizer, net), 20)
        ddp = DistributedDataParallel(big())
        counted("ddp", step_of(ddp, SGD(ddp.parameters(), 0.1), ddp.module), 5)
        dist.barrier()
    return found


def late(rank, world):
    """A journal that all ranks go on from: one training, cut in two."""
    found = []
    for name, cuts in (("whole", [6]), ("parts", [3, 3])):
        for steps in cuts:
            net = mlp(torch.float32)
            options = {"workers": "independent", "journal": name}
            optimizer = RandomBases(net, 12, 0.5, **options)
            made = optimizer.steps
            run(net, optimizer, steps)
            dist.barrier()
        found.append((made, flat(net)))
    return found


def left_alone(rank, world):
    """A rank dies; the others say which."""
    net = mlp()
    optimizer = RandomBases(net, 12, 0.1, workers="shared")
    run(net, optimizer, 1)
    if rank == world - 1:
        return "gone"
    start = time.monotonic()
    try:
        run(net, optimizer, 3)
    except SubspanError as error:
        return time.monotonic() - start, str(error)
    return "nothing was noticed"


SCENARIOS = {
    "shared": lambda *ranks: trained(*ranks, "shared"),
    "shared, fixed": lambda *ranks: trained(*ranks, "shared", redraw_every=None, momentum=0.9),
    "independent": lambda *ranks: trained(*ranks, "independent", same_batch=True),
    "independent, parts": lambda *ranks: trained(*ranks, "independent", compartments="layer"),
    "the same": refused,
    "other seed": lambda *ranks: refused(*ranks, odd={"seed": 1}),
    "other dim": lambda *ranks: refused(*ranks, odd={"dim": 13}),
    "other net": lambda *ranks: refused(*ranks, odd="net"),
    "other weights": lambda *ranks: refused(*ranks, odd="weights"),
    "other settings": lambda *ranks: refused(*ranks, odd={"nonfinite": "error"}),
    "ddp": under_ddp,
    "ddp, other seed": lambda *ranks: under_ddp(*ranks, odd=True),
    "ddp, evolution": lambda *ranks: under_ddp(*ranks, estimator="evolution"),
    "sharded": sharded,
    "diverged": diverged,
    "void": void,
    "bytes": bytes_sent,
    "late": late,
    "left alone": left_alone,  # last: a rank ends inside
}


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """The observations of every rank of a world of processes, and where they are."""
    folder = tmp_path_factory.mktemp("ranks")
    found = go_through(__name__, request.param, folder)
    return type("Ranks", (list,), {"folder": folder})(found)


@pytest.mark.parametrize(
    ("scenario", "options"),
    [("shared", {}), ("shared, fixed", {"redraw_every": None, "momentum": 0.9})],
)
def test_shared_workers_are_one_process_on_the_joint_batch(ranks, scenario, options):
    net = mlp()
    optimizer = RandomBases(net, 12, 0.5, seed=4, **options)
    expected = run(net, optimizer, STEPS)[-1]
    for rank in ranks:
        assert rank[scenario]["layout"] == optimizer.layout
        torch.testing.assert_close(rank[scenario]["weights"], expected)


@pytest.mark.parametrize("scenario", ["shared", "independent", "independent, parts", "void"])
def test_every_rank_has_the_same_bits(ranks, scenario):
    for rank in ranks[1:]:
        assert torch.equal(rank[scenario]["weights"], ranks[0][scenario]["weights"])


def test_independent_workers_are_one_process_with_all_their_vectors(ranks):
    """θ ← θ − η Σ_r P_r P_rᵀ g, with the bases of the ranks side by side."""
    net, world = mlp(), len(ranks)
    bases = [RandomBases(net, 12, 0.5, seed=4)]
    for rank in range(1, world):  # basis r of one compartment has stream r
        [part] = bases[0].directions.compartments
        other = RandomBases(net, 12, 0.5, seed=4)
        moved = [type(p)(p.out_dim, p.in_dim, p.seed, rank) for p in part.projections]
        object.__setattr__(other.directions.compartments[0], "projections", tuple(moved))
        bases.append(other)
    for step in range(STEPS):
        net.zero_grad()
        loss_of(net).backward()
        P, g = torch.cat([dense(basis, step) for basis in bases], dim=1), gradient(net)
        assert P.shape == (212, 12 * world)
        after = flat(net) - 0.5 * P @ (P.T @ g)
        torch.nn.utils.vector_to_parameters(after, net.parameters())
    torch.testing.assert_close(ranks[0]["independent"]["weights"], flat(net))


def test_ranks_that_agree_are_not_refused(ranks):
    assert [rank["the same"] for rank in ranks] == [None] * len(ranks)


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        ("other seed", "the seed"),
        ("other dim", "the network or its compartments"),
        ("other net", "the network or its compartments"),
        ("other weights", "the weights"),
        ("other settings", "the settings"),
    ],
)
def test_what_differs_is_an_error_on_every_rank_that_names_the_rank(ranks, scenario, what):
    odd = len(ranks) - 1
    for rank in ranks:
        if odd == 0:
            assert rank[scenario] is None
        else:
            assert rank[scenario].startswith(f"rank {odd} differs from rank 0 in {what}: ")


def test_under_ddp_all_have_the_same_bases_and_gradients(ranks):
    """Or they would come to different weights, and nothing would say so."""
    odd = len(ranks) - 1
    for rank in ranks:
        torch.testing.assert_close(rank["ddp"], ranks[0]["shared"]["weights"])
        if odd:
            said = rank["ddp, other seed"], rank["ddp, evolution"]
            assert said[0].startswith(f"rank {odd} differs from rank 0 in the seed: ")
            assert said[1].startswith("estimator 'evolution' has no gradients that DDP could")


def test_parameters_that_are_spread_over_processes_are_refused(ranks):
    """They once ended Python: their address is 0."""
    for rank in ranks:
        *made, theta, g = rank["sharded"]
        assert all(re.match(r"a parameter of shape \[.*\] is spread over", said) for said in made)
        assert theta.startswith("theta is a DTensor, which has no memory of its own: give")
        assert g.startswith("g is a DTensor, which has no memory of its own: give")


def test_a_rank_that_diverges_is_named(ranks):
    for rank in ranks:
        if len(ranks) == 1:
            assert rank["diverged"] is None
        else:
            step, said = rank["diverged"]
            assert step == 3  # at the next comparison
            assert said.startswith("after step 4 the weights of rank 1 are not those of the")


def test_a_step_is_void_for_all_or_for_none(ranks):
    assert {rank["void"]["skipped"] for rank in ranks} == {1}
    assert torch.equal(ranks[0]["void"]["weights"], flat(mlp()))


def test_training_goes_on_from_a_journal(ranks):
    for rank in ranks:
        (_, whole), (made, parts) = rank["late"]
        assert made == 3
        assert torch.equal(parts, whole)
    net = mlp(torch.float32)
    assert replay(ranks.folder / "parts", net) == 6
    assert torch.equal(flat(net), ranks[0]["late"][1][1])


def test_a_rank_that_dies_is_named(ranks):
    world = len(ranks)
    *others, gone = [rank["left alone"] for rank in ranks]
    assert gone == "gone"
    for seconds, said in others:
        assert seconds < 30
        assert said.startswith("step 1 cannot be finished: ")
        assert f"rank {world - 1} is lost" in said
        assert "a journal lets a job of RandomBases go on from here" in said


def test_only_coordinates_travel(ranks):
    """Measured: at the device, with TCP's headers and acknowledgements, and as Gloo writes it."""
    if len(ranks) == 1:
        return
    sent = ranks[0]["bytes"]
    assert sent["ddp"][1] > 93_093 * 4 / 2
    assert sent["shared"][0] < sent["ddp"][0] / 200
    assert sent["shared"][1] < sent["ddp"][1] / 250
    assert sent["independent"][1] < sent["ddp"][1] / 100
