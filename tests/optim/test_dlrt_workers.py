"""DLRT over many processes: one training, the factors' gradients on the wire, and no others."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from subspan import SubspanError
from subspan.layers import factorize
from subspan.optim import DLRT
from tests.nets import build
from tests.optim.test_dlrt import X, Y, dense
from tests.ranks import go_through

pytestmark = pytest.mark.heavy

STEPS = 6


def trained(rank, world, *, ddp=False, **options):
    """A few steps on this rank's part of the batch of 20."""
    net = factorize(build("mlp", torch.float64), rank=4)
    workers = None if ddp or world == 0 else "shared"
    optimizer = DLRT(net, 0.5, workers=workers, check_every=2, **options)
    model = DistributedDataParallel(net) if ddp else net
    part = slice(rank * 20 // max(world, 1), (rank + 1) * 20 // max(world, 1))

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(X[part]), Y[part])
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
    return {"weights": dense(net), "ranks": optimizer.ranks}


def refused(rank, world, *, odd=False, ddp=False):
    """Ranks that may change under DDP, and a last rank that is not like the others."""
    net = factorize(build("mlp"), rank=4)
    if odd and rank == world - 1:
        net[0].U.data[0, 0] += 1
    optimizer = DLRT(net, 0.1, tolerance=0.1, workers=None if ddp else "shared")
    model = DistributedDataParallel(net) if ddp else net
    model(X.float()).square().sum().backward()
    try:
        optimizer.step()
    except SubspanError as error:
        return str(error)
    return None


def bytes_sent(rank, world):
    """That this process writes, per step."""
    found = {}
    for name in ("factors", "dense"):
        torch.manual_seed(0)
        net: nn.Module = nn.Linear(1000, 500)
        if name == "factors":
            net = factorize(net, rank=10)
            optimizer = DLRT(net, 1e-6, workers="shared", check_every=0)
        else:
            net = DistributedDataParallel(net)
            optimizer = SGD(net.parameters(), 1e-6)
        for step in range(12):
            if step == 2:
                before = _written()
            optimizer.zero_grad()
            net(torch.ones(2, 1000)).square().sum().backward()
            optimizer.step()
        found[name] = (_written() - before) / 10
    return found


def _written():
    dist.barrier()
    return int(Path("/proc/self/io").read_text().partition("wchar: ")[2].split()[0])


class Experts(nn.Module):
    """Two layers, of which each process uses one at a step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(8, 4) for _ in range(3)]).double()

    def forward(self, x, expert):
        return self.experts[expert](x)


def routed(rank, world, *, ddp=False):
    """Ranks use the first or the second expert, nobody the third."""
    net = factorize(Experts(), rank=3)
    if rank == -1:  # alone, the mean over that many processes
        optimizer = DLRT(net, 0.2, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            for each in range(world):
                (cross_entropy(net(X[each::world], each % 2), Y[each::world]) / world).backward()
            optimizer.step()
        return dense(net)
    optimizer = DLRT(net, 0.2, momentum=0.9, workers=None if ddp else "shared")
    model = DistributedDataParallel(net, find_unused_parameters=True) if ddp else net
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(X[rank::world], rank % 2), Y[rank::world]).backward()
        optimizer.step()
    return dense(net)


def changed(rank, world, *, ddp=False):
    """The last rank clips by value: all refuse, and all go on afterwards."""
    net = factorize(build("mlp", torch.float64), rank=4)
    optimizer = DLRT(net, 0.1, workers=None if ddp else "shared")
    model = DistributedDataParallel(net) if ddp else net
    said = []
    for step in range(3):
        optimizer.zero_grad()
        cross_entropy(model(X[rank::world]), Y[rank::world]).backward()
        if step == 1 and rank == world - 1:
            nn.utils.clip_grad_value_(net.parameters(), 1e-3)
        try:
            optimizer.step()
            said.append(None)
        except SubspanError as error:
            said.append(str(error))
    return {"said": said, "weights": dense(net)}


def accumulated(rank, world):
    """DDP's no_sync, a scaler and clipping, and processes that train on their own."""
    found = []
    for ddp in (True, False):
        net = factorize(build("mlp", torch.float64), rank=4)
        optimizer = DLRT(net, 0.1, momentum=0.9)
        model = DistributedDataParallel(net) if ddp else net
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(3):
            optimizer.zero_grad()
            part = slice(rank, None, world) if ddp else slice(None)
            with model.no_sync() if ddp else contextlib.nullcontext():
                scaler.scale(cross_entropy(model(X[part]), Y[part]) / 2).backward()
            scaler.scale(cross_entropy(model(X[part]), Y[part]) / 2).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        found.append(dense(net))
    for _ in range(rank):  # as many steps as it likes: nobody waits
        optimizer.zero_grad()
        cross_entropy(net(X), Y).backward()
        optimizer.step()
    dist.barrier()
    return found


def filtered(rank, world):
    """A network with a complex parameter, as that of a Fourier layer; the mean, and alone."""
    found = []
    for workers in ("shared", None):
        net = factorize(nn.Sequential(build("mlp", torch.float64)), rank=4)
        net.register_parameter("filters", nn.Parameter(torch.ones(3, dtype=torch.complex128)))
        optimizer = DLRT(net, 0.1, workers=workers, check_every=1)
        part = X[rank::world] if workers else X
        for _ in range(2):
            optimizer.zero_grad()
            (net(part)[:, :3] * net.filters - 1j).abs().square().mean().backward()
            optimizer.step()
        found.append(net.filters.detach())
    return found


ADAPTIVE = {"tolerance": 0.2}
SETTINGS = {
    "parallel": ADAPTIVE,
    "fixed": {"momentum": 0.9},
    "kls-adaptive": {"integrator": "kls-adaptive"} | ADAPTIVE,
    "adam": {"base": "adam"} | ADAPTIVE,
}
SCENARIOS = {
    **{n: lambda *ranks, o=options: trained(*ranks, **o) for n, options in SETTINGS.items()},
    "ddp": lambda *ranks: trained(*ranks, ddp=True, momentum=0.9),
    "the same": refused,
    "other factors": lambda *ranks: refused(*ranks, odd=True),
    "ranks under ddp": lambda *ranks: refused(*ranks, ddp=True),
    "routed": routed,
    "routed ddp": lambda *ranks: routed(*ranks, ddp=True),
    "changed": changed,
    "changed ddp": lambda *ranks: changed(*ranks, ddp=True),
    "accumulated": accumulated,
    "bytes": bytes_sent,
    "filtered": filtered,
}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """The observations of every rank of a world of processes."""
    return go_through(__name__, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scenario", SETTINGS)
def test_workers_are_one_process_on_the_joint_batch(ranks, scenario):
    alone = trained(0, 0, **SETTINGS[scenario])
    for rank in ranks:
        assert rank[scenario]["ranks"] == alone["ranks"]
        torch.testing.assert_close(rank[scenario]["weights"], alone["weights"])
    if "tolerance" in SETTINGS[scenario]:
        assert alone["ranks"] != {"0": 4, "2": 4}


@pytest.mark.parametrize("scenario", [*SETTINGS, "ddp"])
def test_the_factors_are_the_same_bits_everywhere(ranks, scenario):
    for rank in ranks[1:]:
        assert torch.equal(rank[scenario]["weights"], ranks[0][scenario]["weights"])


def test_plain_ddp_serves_where_ranks_stay(ranks):
    torch.testing.assert_close(ranks[0]["ddp"]["weights"], ranks[0]["fixed"]["weights"])


@pytest.mark.parametrize("scenario", ["routed", "routed ddp"])
def test_layers_that_some_processes_do_not_use(ranks, scenario):
    expected = routed(-1, len(ranks))
    for rank in ranks:
        torch.testing.assert_close(rank[scenario], expected)


@pytest.mark.parametrize("scenario", ["changed", "changed ddp"])
def test_gradients_that_one_process_changes_are_refused_by_all(ranks, scenario):
    for rank in ranks:
        first, second, third = rank[scenario]["said"]
        assert (first, third) == (None, None)
        assert "are not what the last backward() left" in second
        assert torch.equal(rank[scenario]["weights"], ranks[0][scenario]["weights"])
    assert "layer '0'" in ranks[-1][scenario]["said"][1]


def test_ddp_with_accumulation_scaling_and_clipping(ranks):
    """The mean of equal parts is the joint batch, and clipping sees the same gradients."""
    for rank in ranks:
        ddp, alone = rank["accumulated"]
        torch.testing.assert_close(ddp, alone)


def test_what_travels_are_the_gradients_of_the_factors(ranks):
    numbers = 10 * (1000 + 500 + 10) + 500
    for rank in ranks:
        sent = rank["bytes"]
        assert sent["factors"] < 1.1 * 2 * 4 * numbers
        assert sent["factors"] < sent["dense"] / 20


def test_complex_parameters_are_averaged(ranks):
    for rank in ranks:
        together, alone = rank["filtered"]
        assert alone.imag.abs().min() > 0.01
        torch.testing.assert_close(together, alone)


def test_refusals(ranks):
    odd = len(ranks) - 1
    for rank in ranks:
        assert rank["the same"] is None
        assert rank["other factors"].startswith(f"rank {odd} differs from rank 0 in the weights")
        assert "ranks cannot change under DDP" in rank["ranks under ddp"]
