"""The benchmark: fair turns, what is compared, bytes that are there, resume, and refusals."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import torch

from subspan.cache import cache
from subspan.errors import SubspanError
from subspan.lab import bench as module
from subspan.lab.bench import (
    Bench,
    bench,
    candidates,
    laboratory,
    lowrank,
    memory,
    optimizers,
    picture,
    products,
    steps,
    sums,
    timing,
)
from subspan.lab.bench.apart import apart
from subspan.lab.bench.timing import CALLS, ROUNDS, TURN, copy_bandwidth, interleaved
from tests.lab.runs import contents

CPU = torch.device("cpu")
QUICK = {
    "sizes": ("2000x20",), "nets": ("mlp-8",), "dim": 10, "width": 16, "ranks": (2,),
    "batch_size": 4, "seconds": 1e-3,
}  # fmt: skip

# ---- timing --------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to, and the calls that were made."""
    state = SimpleNamespace(now=0.0, calls=[])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: state.now)

    def takes(name, *seconds):
        def function():
            turn = [n for n, last in reversed(list(enumerate(state.calls))) if last != name]
            in_turn = len(state.calls) - (turn[0] + 1 if turn else 0)
            state.calls.append(name)
            state.now += seconds[min(in_turn, len(seconds) - 1)]

        return function

    state.takes = takes
    return state


def test_times_are_medians_of_calls_that_follow_a_first_one(clock):
    """A first call in a turn is slow and does not count."""
    found = interleaved(
        {"slow": clock.takes("slow", 9.0, 3.0), "fast": clock.takes("fast", 5.0, 1.0)}, 1.0, CPU
    )
    assert found["slow"] == {"median": 3.0, "low": 3.0, "high": 3.0, "calls": ROUNDS[0] * 3}
    assert found["fast"]["median"] == 1.0


def test_candidates_take_turns_in_a_changing_order(clock):
    names = ["a", "b", "c"]
    interleaved({name: clock.takes(name, TURN / 10) for name in names}, 1e9, CPU)
    turns = clock.calls[2 * len(names) :]  # compiled, and counted
    assert len(turns) == ROUNDS[1] * 10 * len(names)
    blocks = [turns[i : i + 10] for i in range(0, len(turns), 10)]
    assert all(len(set(block)) == 1 for block in blocks)
    orders = {tuple(block[0] for block in blocks[i : i + 3]) for i in range(0, len(blocks), 3)}
    assert all(sorted(order) == names for order in orders)
    assert len(orders) > 1


def test_rounds_follow_the_time_to_spend(clock):
    interleaved({"a": clock.takes("a", TURN)}, 40 * TURN, CPU)
    assert len(clock.calls) == 2 + 10 * CALLS


def test_bandwidth_counts_reading_and_writing(monkeypatch):
    monkeypatch.setattr(timing, "interleaved", lambda *_: {"copy": {"median": 0.5}})
    assert copy_bandwidth(CPU, 1.0) == 2 * 256 * 2**20 / 0.5


# ---- candidates ----------------------------------------------------------------------------------


def test_every_family_is_measured_beside_four_stored_matrices():
    assert candidates.names()[-4:] == ["stored-dense", "stored-coo", "stored-csr", "stored-csc"]
    assert {"hash", "rademacher", "gaussian", "kronecker"} < set(candidates.names())
    assert candidates.chosen(["rademacher", "hash"]) == ["hash", "rademacher", "stored-dense"]
    with pytest.raises(SubspanError, match=r"'hush'.*hash"):
        candidates.chosen(["hush"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rademacher", 0), ("gaussian", 0), ("hash", 4 * 3000), ("fastfood", 8 * 24 * 128),
        ("stored-dense", 4 * 3000 * 100),
        ("stored-coo", 300 * 100 * (8 + 8 + 4)),
        ("stored-csr", 300 * 100 * (8 + 4) + 8 * 3001),
        ("stored-csc", 300 * 100 * (8 + 4) + 8 * 101),
    ],
)  # fmt: skip
def test_bytes_of_p_are_those_that_exist(name, expected):
    cache.clear()
    assert candidates.bytes_of(candidates.make(name, 3000, 100), CPU) == expected


def test_what_does_not_fit_is_skipped_and_says_so(monkeypatch):
    free = SimpleNamespace(available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    [hashed, dense] = products.measure(["hash", "stored-dense"], [(10**6, 600)], 1e-3, CPU, print)
    assert "forward" in hashed
    assert dense["skipped"] == "needs 3 of 1 GB"
    assert not {"forward", "backward", "bytes_of_p"} & set(dense)
    told, free.available = [], 10**6
    rows = steps.measure(["stored-dense"], ["mlp-8"], 50, 4, 1e-3, CPU, told.append)
    assert ["step" in row for row in rows] == [True, False]
    assert told == ["training steps of mlp-8"]


# ---- a whole benchmark ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All parts; memory in this process, since half a minute goes by until seven others begin."""
    out, told = tmp_path_factory.mktemp("bench") / "out", []
    settings = Bench(methods=("hash", "rademacher"), **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        for part in (memory, lowrank):
            patch.setattr(part, "apart", lambda function, *arguments, of: function(*arguments))
        record = bench(settings, out, done=told.append)
    return SimpleNamespace(out=out, told=told, settings=settings, record=record)


def test_the_record(measured):
    record = measured.record
    assert json.loads((measured.out / "bench.json").read_text()) == json.loads(json.dumps(record))
    assert record["status"] == "complete"
    assert record["machine"]["copy_bytes_per_second"] > 1e8
    assert {"device", "versions"} < set(record["machine"])
    names = ["hash", "rademacher", "stored-dense"]
    assert [row["projection"] for row in record["products"]] == names
    assert [row["bytes_of_p"] for row in record["products"]] == [8000, 0, 160_000]
    for row in record["products"]:
        assert (row["out_dim"], row["in_dim"]) == (2000, 20)
        for key in ("forward", "backward"):
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"] < 10
    assert [row["projection"] for row in record["steps"]] == ["adam", *names]
    assert {row["weights"] for row in record["steps"]} == {28 * 28 * 8 + 8 + 8 * 10 + 10}
    assert [row["projection"] for row in record["memory"]] == ["adam", *names]
    assert [row["projection"] for row in record["optimizers"]] == ["sgd", *names[:2]]
    assert len(measured.told) == module.total(measured.settings) == 8


def test_the_picture_shows_the_ratios(measured):
    first, second, fourth, third, fifth, *_ = picture.draw(measured.record).axes
    assert fifth.get_xlabel() == "rank"
    whole = measured.record["products"][-1]["forward"]["median"]
    ends = [bar.get_x() + bar.get_width() for bar in first.patches][:3]
    times = [row["forward"]["median"] / whole for row in measured.record["products"]]
    assert ends == pytest.approx(times)
    assert second.get_xlabel() == "times the step of plain adam"
    assert fourth.get_xlabel() == "times the step of plain sgd"
    names = [label.get_text() for label in third.get_yticklabels()]
    assert names == ["adam", "hash", "rademacher", "stored-dense"]
    files = picture.write(measured.record, measured.out)
    assert [file.name for file in files] == ["bench.png", "bench.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_measured_again(measured, monkeypatch):
    def never(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        for part in (products, steps, memory, optimizers):
            patch.setattr(part, "measure", never)
        assert bench(measured.settings, measured.out) == json.loads(json.dumps(measured.record))
        with pytest.raises(AssertionError):
            bench(measured.settings, measured.out, overwrite=True)
    other = Bench(methods=("hash",), **QUICK)
    before = contents(measured.out)
    with pytest.raises(SubspanError, match="another configuration"):
        bench(other, measured.out)
    assert contents(measured.out) == before


def test_an_interrupted_benchmark_goes_on_with_the_next_part(tmp_path, monkeypatch):
    settings = Bench(parts=("products", "steps"), methods=("hash",), **QUICK)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(steps, "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench(settings, tmp_path)
    left = json.loads((tmp_path / "bench.json").read_text())
    assert left["status"] == "running"
    told = []
    record = bench(settings, tmp_path, done=told.append)
    assert record["products"] == left["products"]
    assert told == ["training steps of mlp-8"]


@pytest.mark.slow
def test_peak_memory_is_of_what_a_step_needs():
    """θ and its gradient beside θ₀; plain Adam has two moments more, and two temporaries."""
    D = 16_000_000  # vectors that go back to the system when they are freed
    adam, hashed = memory.measure(["hash"], [(D, 1000)], CPU, lambda _: None)
    assert 5.9 < adam["peak_bytes"] / (4 * D) < 6.3
    assert 2.9 < hashed["peak_bytes"] / (4 * D) < 3.2


def test_a_measurement_that_fails_is_an_error():
    with pytest.raises(SubspanError, match=r"memory of nobody could not be measured: .*Error"):
        memory.measure(["nobody"], [(100, 10)], CPU, print)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ("products", "stepps")}, "'stepps'.*steps"),
        ({"methods": ("hush",)}, "'hush'.*hash"),
        ({"sizes": ("61706",)}, "a size is D by d, as in 61706x1000, got '61706'"),
        ({"sizes": ("10x20",)}, "d=20 does not fit in D=10"),
        ({"sizes": ("10x-2",)}, "a size is D by d"),
        ({"nets": ("lenett",)}, "'lenett'.*lenet"),
        ({"nets": ("mlp-8",), "dim": 10**6}, "d=1000000 does not fit"),
        ({"dim": 0}, "dim must be positive, got 0"),
        ({"seconds": -1.0}, "seconds must be positive"),
        ({"device": "gpu"}, "'gpu'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_measured(settings, message):
    with pytest.raises(SubspanError, match=message):
        Bench(**QUICK | settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(cli, in_tmp_path):
    said = cli("bench", "--device", "cuda")
    assert said.code == 2
    assert said.err == "subspan bench: error: there is no CUDA device here: use --device cpu\n"
    assert not list(in_tmp_path.iterdir())


# ---- the command ---------------------------------------------------------------------------------

WORDS = ["bench", "--methods", "hash", "--sizes", "2000x20", "--seconds", "0.001", "--out", "b"]


def test_the_command_prints_tables_and_names_the_picture(in_tmp_path, cli):
    words = [*WORDS, "--parts", "products,steps", "--nets", "mlp-8", "--dim", "10"]
    said = cli(*words)
    assert (said.code, said.err) == (0, "")
    for words_of in ("products at D = 2,000, d = 20", "× stored", "× its bytes", "× adam"):
        assert words_of in said.out
    assert said.out.splitlines()[-2:] == ["record: b/bench.json", "picture: b/bench.png"]
    again = cli(*words).out.splitlines()
    assert again[0] == "complete already, not repeated: --overwrite measures again"
    assert again[1:] == said.out.splitlines()[-len(again) + 1 :]


def test_json_is_all_that_is_printed(in_tmp_path, cli):
    said = cli(*WORDS, "--parts", "products", "--json")
    assert json.loads(said.out) == json.loads((in_tmp_path / "b" / "bench.json").read_text())
    assert (in_tmp_path / "b" / "bench.png").is_file()


def test_turns_do_not_begin_where_they_began():
    """Pairs of turns in real time, too: no candidate always runs after the same one."""
    order = []
    interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 1e-3, CPU)
    followed = {(a, b) for a, b in pairwise(order[6:]) if a != b}
    assert len(followed) == 6


# ---- low rank ------------------------------------------------------------------------------------


def test_low_rank_against_dense(measured):
    dense, *factored = measured.record["lowrank"]
    assert dense["rank"] == lowrank.DENSE
    assert "adaptive" not in dense
    assert [row["rank"] for row in factored] == [2]
    for row in factored:
        assert all(row[key]["median"] > 0 for key in ("step", "adaptive", "inference"))
    assert all("peak_bytes" in row for row in (dense, *factored))
    labels = [line.get_label() for line in picture.draw(measured.record).axes[-3].lines]
    assert labels[:2] == ["training step, ranks stay", "training step, ranks may change"]


@pytest.mark.parametrize("rank", [2, 1000])
def test_networks_of_the_low_rank_benchmark(rank):
    net = lowrank.network(1100, rank)
    ranks = [layer.rank for layer in net.modules() if hasattr(layer, "rank")]
    assert ranks == [min(rank, 784), rank, rank, rank, rank]
    optimizer = lowrank.optimizer_of(net, rank, adapting=True)
    assert optimizer.ranks_may_change
    assert not lowrank.optimizer_of(net, rank).ranks_may_change


def test_memory_of_low_rank_follows_the_rank():
    dense, low = (apart(lowrank.peak, 1500, rank, 2, "cpu", of="it") for rank in (lowrank.DENSE, 4))
    weights = 784 * 1500 + 4 * 1500**2
    assert dense > 0.95 * 2 * 4 * weights  # and their gradients
    assert low < dense / 4


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({0: 1.0, 10: 0.5, 20: 1.5}, 15.0),
        ({0: 1.0, 10: 0.5, 20: 0.9}, 20.0),
        ({0: 1.0, 10: 1.5, 20: 0.9}, None),
        ({0: 1.0, 20: 2.0, 10: 0.0, 40: 0.5}, 15.0),
    ],
)
def test_break_even(times, expected):
    rows = [{"rank": rank, "step": {"median": time}} for rank, time in times.items()]
    assert lowrank.break_even(rows) == expected


def test_products_of_sums_against_dense(measured):
    layers, networks = ([row for row in measured.record["sums"] if row["what"].startswith(what)]
                        for what in ("a layer 16 × 16", "a training step of lenet-tf"))  # fmt: skip
    assert len(layers) + len(networks) == len(measured.record["sums"])
    assert layers[0]["projection"] == networks[0]["projection"] == "dense"
    numbers = {row["projection"]: row["numbers"] for row in (*layers[1:], *networks)}
    assert numbers["64 of rank one"] == numbers["64 of rank one, W first"] == 64 + 16
    assert numbers["dense"] == 3_274_634
    assert numbers["two sums"] == 3_548
    assert all(row["step"]["median"] > 0 for row in measured.record["sums"])
    two = networks[1]
    assert 4 * 3548 < two["bytes_stored"] < 4 * 3548 + 2048
    entries = 64 * 16 + 16 * 800 + 1024 * 64 + 64 * 3136 + 10 * 1024
    conv1 = 32 * 4 * (32 * 4) + 4 * 25 * (4 * 25)
    assert two["bytes_of_m"] == 4 * (656 * entries + conv1)
    *_, one, two = picture.draw(measured.record).axes
    assert one.get_xlabel() == two.get_xlabel() == "times the dense one"
    assert [label.get_text() for label in two.get_yticklabels()] == ["dense", "two sums", "one sum"]


def test_what_is_compared_is_the_same():
    torch.manual_seed(0)
    layer = sums._layers(32, CPU)["64 of rank one"]
    x = torch.randn(3, 32)
    torch.testing.assert_close(sums.Expanded(layer)(x), layer(x))
    passes = sums._passes(layer, 32, 3, CPU)()
    assert [tuple(g.shape) for g in passes] == [(3, 32), (64,), (32,)]


def test_ranks_that_no_layer_has():
    with pytest.raises(SubspanError, match=r"ranks must be in \[1, 16\], the width, got 17"):
        Bench(width=16, ranks=(2, 17))


# ---- the laboratory ------------------------------------------------------------------------------


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(laboratory, "IMAGES", 300)
    monkeypatch.setattr(laboratory, "HELD_OUT", 1100)
    monkeypatch.setattr(laboratory, "TURN", 2)


def test_both_loops_are_the_same_training(few_images, tmp_path):
    """The same batches, rates and steps: the same weights, turn by turn."""
    images = laboratory.random_images(CPU)
    seen, models = {"bare": [], "laboratory": []}, {}
    for name in seen:
        torch.manual_seed(0)
        models[name] = laboratory.nets.build("mlp-8", images.image_shape)
    orders = [
        laboratory.permutation(300, seed=0, stream=laboratory.BATCHES, epoch=epoch)
        for epoch in (1, 2)
    ]
    for _ in laboratory.bare(models["bare"], images, 64, orders):
        pass
    training = laboratory.Training("mlp-8", "noise", epochs=2, batch_size=64)
    run = laboratory.Run(training, "full", {}, laboratory.RATE)
    how = laboratory.method("full")
    ready = laboratory.loops.Prepared(
        run, laboratory.Classification(images, "mlp-8"), how, models["laboratory"], None
    )
    accelerator = laboratory.loops.accelerator(training)
    loop = laboratory.loops.Loop(ready, accelerator, tmp_path, None, None, None)
    loop.open()
    loop.fit()
    ours, bare = (dict(models[name].named_parameters()) for name in ("laboratory", "bare"))
    assert all(torch.allclose(ours[name], bare[name], atol=1e-6) for name in ours)
    assert models["bare"].training is False


def test_loops_take_turns(few_images, monkeypatch):
    """Each has all steps and the evaluation of an epoch to itself; the first epoch is dropped."""
    turns, plain = [], laboratory.Clock.lap

    def lap(self):
        turns.append(plain(self))
        return turns[-1]

    monkeypatch.setattr(laboratory.Clock, "lap", lap)
    told = []
    rows = laboratory.measure(["mlp-8"], 10, 64, 1e-3, CPU, told.append)
    assert told == ["epochs of mlp-8, full", "epochs of mlp-8, hash"]
    names = [(row["method"], row["projection"]) for row in rows]
    assert names == [(m, loop) for m in ("full", "hash") for loop in ("bare", "laboratory")]
    for row in rows:
        assert (row["net"], row["images"], row["batch_size"]) == ("mlp-8", 300, 64)
        assert 0 < row["step"]["low"] <= row["step"]["median"] <= row["step"]["high"]
        assert row["step"]["calls"] == ROUNDS[0]
    # Of 5 steps: after 2, after 4, and after the evaluation; two laps each. One lap before all,
    # and one when the laboratory begins.
    epochs = ROUNDS[0] + 1
    assert len(turns) == len(laboratory.METHODS) * (2 + 3 * 2 * epochs)
    of_an_epoch = turns[2 + 6 : 2 + 6 * epochs]
    for row, first in ((rows[1], 0), (rows[0], 1)):
        medians = [sorted(of_an_epoch[first + turn :: 6])[ROUNDS[0] // 2] for turn in (0, 2, 4)]
        assert row["step"]["median"] == pytest.approx(sum(medians))


def test_the_laboratory_is_measured_if_it_is_named(few_images, in_tmp_path, cli):
    assert "laboratory" not in Bench().parts
    words = [*WORDS, "--parts", "laboratory", "--nets", "mlp-8", "--dim", "10"]
    said = cli(*words)
    assert (said.code, said.err) == (0, "")
    assert "epoch of mlp-8, hash: 300 images, batch of 128" in said.out
    assert "× bare" in said.out
    record = json.loads((in_tmp_path / "b" / "bench.json").read_text())
    first, second = picture.draw(record).axes
    assert first.get_xlabel() == "times the bare loop"
    ratio = record["laboratory"][3]["step"]["median"] / record["laboratory"][2]["step"]["median"]
    ends = [bar.get_x() + bar.get_width() for bar in second.patches]
    assert ends == pytest.approx([1, ratio])
    with pytest.raises(SubspanError, match="d=1000000 does not fit"):
        Bench(parts=("laboratory",), nets=("mlp-8",), dim=10**6)
