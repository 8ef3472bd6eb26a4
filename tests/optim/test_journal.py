"""The journal: bit for bit the weights of every step; cut tails, damage, and other networks."""

from __future__ import annotations

import errno
import json
import os
import zlib

import pytest
import torch
from torch import nn

from subspan import SubspanError
from subspan.optim import RandomBases, replay
from subspan.optim.journal import Journal
from tests.optim.test_random_bases import flat, mlp, run


def trained(path, steps=6, dtype=torch.float32, **options):
    """A network that was trained with a journal, its optimizer, and its weights step by step."""
    net = mlp(dtype)
    optimizer = RandomBases(net, 10, 0.5, journal=path, **options)
    return net, optimizer, [flat(mlp(dtype)), *run(net, optimizer, steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"redraw_every": 3, "momentum": 0.9},
        {"redraw_every": None, "compartments": "layer"},
        {"distribution": "orthogonal", "compartments": "uniform:3", "weight_decay": 0.01},
        {"distribution": "rademacher", "compartments": "tensor"},
    ],
)
def test_replay_gives_the_bits_of_every_step(tmp_path, dtype, options):
    _, _, seen = trained(tmp_path / "journal", dtype=dtype, **options)
    for steps in range(7):
        net = mlp(dtype)
        assert replay(tmp_path / "journal", net, steps=steps) == steps
        assert torch.equal(flat(net), seen[steps])
    net = mlp(dtype)
    assert replay(tmp_path / "journal", dict(net.named_parameters())) == 6
    assert torch.equal(flat(net), seen[6])


def test_a_step_costs_its_coordinates_and_twenty_bytes(tmp_path):
    trained(tmp_path / "a", steps=1)
    trained(tmp_path / "b", steps=5)
    sizes = [(tmp_path / name).stat().st_size for name in "ab"]
    assert sizes[1] - sizes[0] == 4 * (4 * 10 + 8 + 8 + 4)


@pytest.mark.parametrize("options", [{}, {"redraw_every": 4, "momentum": 0.9}])
def test_training_goes_on_where_the_journal_ends(tmp_path, options):
    _, _, seen = trained(tmp_path / "whole", steps=9, **options)
    trained(tmp_path / "journal", steps=6, **options)
    with (tmp_path / "journal").open("ab") as file:
        file.write(b"cut off")
    net = mlp(torch.float32)
    optimizer = RandomBases(net, 10, 0.5, journal=tmp_path / "journal", **options)
    assert optimizer.steps == 6
    assert torch.equal(flat(net), seen[6])
    assert torch.equal(run(net, optimizer, 3)[-1], seen[9])
    assert (tmp_path / "journal").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_tail_that_was_cut_off_costs_the_last_step(tmp_path):
    _, _, seen = trained(tmp_path / "journal")
    raw = (tmp_path / "journal").read_bytes()
    record = 4 * 10 + 8 + 8 + 4
    for missing in (1, 20, record - 1):
        (tmp_path / "journal").write_bytes(raw[:-missing])
        net = mlp(torch.float32)
        assert replay(tmp_path / "journal", net) == 5
        assert torch.equal(flat(net), seen[5])
    (tmp_path / "journal").write_bytes(raw[:-30] + b"?" + raw[-29:])  # written, but not whole
    assert replay(tmp_path / "journal", mlp(torch.float32)) == 5


def test_skipped_steps_are_skipped_again(tmp_path):
    net, optimizer, _ = trained(tmp_path / "journal", steps=3)
    net[0].weight.grad.fill_(float("inf"))
    optimizer.step()
    expected = run(net, optimizer, 2)[-1]
    other = mlp(torch.float32)
    assert replay(tmp_path / "journal", other) == 6
    assert torch.equal(flat(other), expected)
    resumed = RandomBases(mlp(torch.float32), 10, 0.5, journal=tmp_path / "journal")
    assert (resumed.steps, resumed.skipped) == (6, 1)


def test_a_state_is_saved_behind_its_journal(tmp_path, monkeypatch):
    """Whatever becomes of the machine: without those steps the state leads nowhere."""
    _, optimizer, _ = trained(tmp_path / "journal", steps=3)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    optimizer.state_dict()
    assert synced == [(tmp_path / "journal").stat().st_size]


def test_a_state_belongs_to_a_moment_of_its_journal(tmp_path):
    net, optimizer, _ = trained(tmp_path / "journal", steps=3)
    net[0].weight.grad.fill_(float("inf"))
    optimizer.step()  # skipped: of the state's steps, and not of the journal's
    state = optimizer.state_dict()
    resumed = RandomBases(mlp(torch.float32), 10, 0.5, journal=tmp_path / "journal")
    resumed.load_state_dict(state)
    assert (resumed.steps, resumed.skipped) == (4, 1)

    run(net, optimizer, 1)
    later = RandomBases(mlp(torch.float32), 10, 0.5, journal=tmp_path / "journal")
    with pytest.raises(SubspanError, match=r"saved after 3 steps, and .*journal has 4"):
        later.load_state_dict(state)


def test_rates_are_those_of_each_step(tmp_path):
    net = mlp(torch.float32)
    optimizer = RandomBases(
        [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.01}],
        5,
        journal=tmp_path / "journal",
    )
    for lr in (1.0, 0.3, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        run(net, optimizer, 1)
    rates = [move.rates for move in Journal(tmp_path / "journal").moves()]
    assert rates == [(1.0, 0.01), (0.3, 0.01), (0.1, 0.01)]
    other = mlp(torch.float32)
    replay(tmp_path / "journal", {str(n): p for n, p in enumerate(other.parameters())})
    assert torch.equal(flat(net), flat(other))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["another", "gone"])
def test_a_journal_that_another_one_writes_is_refused_before_a_step(tmp_path, change):
    path = tmp_path / "journal"
    net, optimizer, seen = trained(path)
    if change == "another":
        other = mlp(torch.float32)
        run(other, RandomBases(other, 10, 0.5, journal=path), 1)
    else:
        path.unlink()
    with pytest.raises(SubspanError, match="does not end with this optimizer's last step"):
        run(net, optimizer, 1)
    assert torch.equal(flat(net), seen[-1])
    assert optimizer.steps == 6
    if change == "another":
        assert replay(path, mlp(torch.float32)) == 7
    else:
        assert not path.exists()


def test_a_step_that_cannot_be_written_is_the_last(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    net, optimizer, seen = trained(path)

    def full(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", full)
        with pytest.raises(SubspanError, match=r"step 6 cannot be written to .* \(No space left"):
            run(net, optimizer, 1)
    with pytest.raises(SubspanError, match="does not end with this optimizer's last step"):
        run(net, optimizer, 1)
    again = mlp(torch.float32)
    assert RandomBases(again, 10, 0.5, journal=path).steps == 6
    assert torch.equal(flat(again), seen[-1])


def test_an_extra_that_is_no_json(tmp_path):
    with pytest.raises(SubspanError, match="extra must be JSON: Object of type set"):
        RandomBases(mlp(), 10, journal=tmp_path / "journal", extra={"names": {"a"}})
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("place", [3, 9, 40, "record"])
def test_damage_is_an_error_and_changes_nothing(tmp_path, place):
    trained(tmp_path / "journal")
    raw = bytearray((tmp_path / "journal").read_bytes())
    raw[-200 if place == "record" else place] ^= 4
    (tmp_path / "journal").write_bytes(raw)
    net, before = mlp(torch.float32), flat(mlp(torch.float32))
    with pytest.raises(SubspanError, match=r"damaged|is no journal"):
        replay(tmp_path / "journal", net)
    assert torch.equal(flat(net), before)


def test_a_newer_format_is_refused(tmp_path):
    header = {"format": 2}
    newer = "has format 2, this version of subspan reads up to 1"
    with pytest.raises(SubspanError, match=newer):
        Journal.create(tmp_path / "journal", header)
    with pytest.raises(SubspanError, match=newer):
        replay(tmp_path / "journal", mlp())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", None),
        ("groups", 3),
        ("groups", [0]),
        ("bases", 10**12),
        ("bases", -1),
        ("dtype", "x"),
        ("tensors", {}),
        ("parts", [3]),
        ("redraw_every", "x"),
        ("redraw_every", 0),
        ("base", None),
    ],
)
def test_what_a_forger_might_write_is_refused_and_changes_nothing(tmp_path, field, value):
    trained(tmp_path / "journal")
    raw = (tmp_path / "journal").read_bytes()
    end = 12 + int.from_bytes(raw[8:12], "little")
    text = json.dumps(json.loads(raw[12:end]) | {field: value}).encode()
    crc = zlib.crc32(text).to_bytes(4, "little")
    (tmp_path / "journal").write_bytes(
        raw[:8] + len(text).to_bytes(4, "little") + text + crc + raw[end + 4 :]
    )
    net, before = mlp(torch.float32), flat(mlp(torch.float32))
    if value == 10**12:  # its records would be longer than the file
        assert replay(tmp_path / "journal", net) == 0
    else:
        with pytest.raises(SubspanError, match="journal is not what subspan writes: fields of its"):
            replay(tmp_path / "journal", net)
    assert torch.equal(flat(net), before)


def test_another_network_is_refused(tmp_path):
    trained(tmp_path / "journal")
    with pytest.raises(SubspanError, match=r"another network: it has 0.weight of shape \[16, 8\]"):
        replay(tmp_path / "journal", nn.Sequential(nn.Linear(3, 2)))
    other = mlp(torch.float32)
    with torch.no_grad():
        other[0].bias[0] += 1
    with pytest.raises(SubspanError, match="began with other weights"):
        replay(tmp_path / "journal", other)
    with pytest.raises(SubspanError, match="journal of another training"):
        RandomBases(other, 10, journal=tmp_path / "journal")
    for options in ({"seed": 1}, {"redraw_every": 2}, {"compartments": "layer"}):
        with pytest.raises(SubspanError, match="journal of another training"):
            RandomBases(mlp(torch.float32), 10, journal=tmp_path / "journal", **options)


def test_a_journal_knows_its_family(tmp_path):
    """One that was written when another family was the default is replayed, and goes on by name."""
    _, _, seen = trained(tmp_path / "journal", distribution="rademacher")
    net = mlp(torch.float32)
    assert replay(tmp_path / "journal", net) == 6
    assert torch.equal(flat(net), seen[-1])
    family = r"a training with distribution='rademacher', not 'hash'"
    with pytest.raises(SubspanError, match=family):
        RandomBases(mlp(torch.float32), 10, 0.5, journal=tmp_path / "journal")
    options = {"distribution": "rademacher", "journal": tmp_path / "journal"}
    assert RandomBases(mlp(torch.float32), 10, 0.5, **options).steps == 6


def test_steps_that_are_not_there(tmp_path):
    trained(tmp_path / "journal")
    for steps in (7, -1, 0.5):
        with pytest.raises(SubspanError, match=f"has 6 steps, not {steps}"):
            replay(tmp_path / "journal", mlp(torch.float32), steps=steps)
    with pytest.raises(SubspanError, match="cannot be read"):
        replay(tmp_path / "none", mlp())
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SubspanError, match="is no journal of subspan"):
        replay(tmp_path / "text", mlp())
    with pytest.raises(SubspanError, match="in a folder that exists"):
        RandomBases(mlp(), 10, journal=tmp_path / "no" / "journal")
