"""The benchmark: fair turns, what is compared, bytes that are there, resume, and refusals."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import torch

from subspan import bench as module
from subspan.bench import Bench, bench, candidates, large_network, picture, timing
from subspan.bench.part import find_part
from subspan.bench.parts import blocks, laboratory, lowrank, memory, sums, transformer, variants
from subspan.bench.resident import Beyond
from subspan.bench.subprocess import ALLOCATOR, SteppedProcess, run_in_process
from subspan.bench.timing import CALLS, ROUNDS, TURN, copy_bandwidth, interleaved
from subspan.cache import cache
from subspan.errors import SubspanError
from tests.bench import far
from tests.runs import contents

CPU = torch.device("cpu")
QUICK = {
    "sizes": ("2000x20",),
    "nets": ("mlp-8",),
    "dim": 10,
    "width": 16,
    "ranks": (2,),
    "batch_size": 4,
    "seconds": 1e-3,
}

# ---- timing --------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to, and the calls that were made."""
    state = SimpleNamespace(now=0.0, calls=[], in_turn=0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: state.now)

    def takes(name, *seconds):
        def function():
            state.in_turn = state.in_turn + 1 if state.calls[-1:] == [name] else 0
            state.calls.append(name)
            state.now += seconds[min(state.in_turn, len(seconds) - 1)]

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
    assert copy_bandwidth(CPU, 1.0) == 2 * timing.COPIED / 0.5


# ---- candidates ----------------------------------------------------------------------------------


def test_every_family_is_measured_beside_four_stored_matrices():
    assert candidates.names()[-4:] == ["stored-dense", "stored-coo", "stored-csr", "stored-csc"]
    assert {"hash", "rademacher", "gaussian", "kronecker"} < set(candidates.names())
    assert candidates.select(["rademacher", "hash"]) == ["hash", "rademacher", "stored-dense"]
    with pytest.raises(SubspanError, match=r"'hush'.*hash"):
        candidates.select(["hush"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rademacher", 0),
        ("gaussian", 0),
        ("hash", 4 * 3000),
        ("fastfood", 8 * 24 * 128),
        ("stored-dense", 4 * 3000 * 100),
        ("stored-coo", 300 * 100 * (8 + 8 + 4)),
        ("stored-csr", 300 * 100 * (8 + 4) + 8 * 3001),
        ("stored-csc", 300 * 100 * (8 + 4) + 8 * 101),
    ],
)
def test_bytes_of_p_are_those_that_exist(name, expected):
    cache.clear()
    assert candidates.bytes_of(candidates.make(name, 3000, 100), CPU) == expected


def test_what_does_not_fit_is_skipped_and_says_so(monkeypatch):
    free = SimpleNamespace(available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    settings = Bench(**QUICK | {"methods": ("hash",), "sizes": ("1000000x600",), "dim": 50})
    [hashed, dense] = find_part("products").measure(settings, print)
    assert "forward" in hashed
    assert dense["skipped"] == "needs 3 of 1 GB"
    assert not {"forward", "backward", "bytes_of_p"} & set(dense)
    told, free.available = [], 10**6
    rows = find_part("steps").measure(settings, told.append)
    assert ["step" in row for row in rows] == [True, True, False]
    assert told == ["training steps of mlp-8"]


# ---- a whole benchmark ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All parts, in one round; memory in this process: seven others begin in half a minute."""
    out, told = tmp_path_factory.mktemp("bench") / "out", []
    settings = Bench(methods=("hash", "rademacher"), **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUNDS", (1, 1))
        patch.setattr(timing, "COPIED", 2**20)
        for room in (memory, lowrank):
            patch.setattr(room, "run_in_process", lambda f, *arguments, memory_of: f(*arguments))
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
    first, second, third, fourth, fifth, *_ = picture.draw(measured.record).axes
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
        for name in ("products", "steps", "memory", "optimizers"):
            patch.setattr(find_part(name), "measure", never)
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
        patch.setattr(find_part("steps"), "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench(settings, tmp_path)
    left = json.loads((tmp_path / "bench.json").read_text())
    assert left["status"] == "running"
    told = []
    record = bench(settings, tmp_path, done=told.append)
    assert record["products"] == left["products"]
    assert told == ["training steps of mlp-8"]


@pytest.mark.parametrize("change", [{"device": "an abacus"}, {"versions": {"torch": "1.0"}}])
def test_a_benchmark_is_of_one_machine(change, tmp_path, monkeypatch):
    """Parts that were left were added to those of another machine, under its name."""
    monkeypatch.setattr(find_part("steps"), "measure", lambda *_: [])
    settings = Bench(parts=("steps",), methods=("hash",), **QUICK)
    record = bench(settings, tmp_path)
    there = record | {"status": "running", "machine": record["machine"] | change}
    (tmp_path / "bench.json").write_text(json.dumps(there))
    before = contents(tmp_path)
    [(name, value)] = change.items()
    old = value if name == "device" else value["torch"]
    with pytest.raises(SubspanError, match=rf"bench.json was begun elsewhere \(\w+ '{old}' → "):
        bench(settings, tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "bench.json").write_text(json.dumps(there | {"status": "complete"}))
    assert bench(settings, tmp_path)["machine"] == there["machine"]  # it is shown anywhere
    assert bench(settings, tmp_path, overwrite=True)["machine"]["device"] != "an abacus"


def test_variants_without_peft_are_drawn(monkeypatch):
    """The record was written, and the picture ended in a division by zero."""
    part = find_part("variants")
    monkeypatch.setattr(variants, "missing", lambda: "needs PEFT")
    rows = part.measure(Bench(**QUICK), lambda _: None)
    machine = {"device": "this one"}
    record = {"config": {"parts": ["variants"]}, "machine": machine, "variants": rows}
    [axes] = picture.draw(record).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["MiniLM (skipped)"]
    assert part.table(rows, machine).rows == [["MiniLM", "needs PEFT"]]


@pytest.mark.slow
def test_peak_memory_is_of_what_a_step_needs():
    """θ and its gradient beside θ₀; plain Adam has two moments more, and two temporaries."""
    D = 16_000_000  # vectors that go back to the system when they are freed
    settings = Bench(methods=("hash",), sizes=(f"{D}x1000",))
    adam, hashed, _ = find_part("memory").measure(settings, lambda _: None)
    assert 5.9 < adam["peak_bytes"] / (4 * D) < 6.3
    assert 2.9 < hashed["peak_bytes"] / (4 * D) < 3.2


def test_a_measurement_that_fails_is_an_error():
    with pytest.raises(SubspanError, match=r"memory of nobody could not be measured: KeyError"):
        run_in_process(far.failing, memory_of="nobody")


def test_a_function_of_another_process_may_print():
    assert run_in_process(far.noisy, memory_of="nobody") == 3


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ()}, "parts is empty: give at least one"),
        ({"sizes": ()}, "sizes is empty: give at least one"),
        ({"parts": ("products", "stepps")}, "'stepps'.*steps"),
        ({"methods": ("hush",)}, "'hush'.*hash"),
        ({"sizes": ("61706",)}, "a size is D by d, as in 61706x1000, got '61706'"),
        ({"sizes": ("10x20",)}, "d=20 does not fit in D=10"),
        ({"sizes": ("10x-2",)}, "a size is D by d"),
        ({"nets": ("lenett",)}, "'lenett'.*lenet"),
        ({"nets": ("mlp-8",), "dim": 10**6}, "d=1000000 does not fit"),
        ({"dim": 0}, "dim must be positive, and finite, got 0"),
        ({"nets": ("mlp", "mlp")}, "nets names one value twice: mlp, mlp"),
        ({"batches": (4, 4)}, "batches names one value twice: 4, 4"),
        ({"seconds": -1.0}, "seconds must be positive"),
        ({"seconds": math.inf}, "seconds must be positive, and finite, got inf"),
        ({"device": "gpu"}, "'gpu'"),
        ({"blocks": "24x1024"}, r"as in 24x1024x4096 .*got '24x1024'"),
        ({"blocks": "0x16x64"}, "got '0x16x64'"),
        ({"batches": (4, 0)}, "batches must be positive, got 0"),
        ({"large_dim": 0}, "large_dim must be positive, and finite, got 0"),
        ({"parts": ("blocks",), "blocks": "1x4x8", "large_dim": 10**4}, "d=10000 does not fit"),
        ({"parts": ("transformer",), "decoder": 10**3}, "240,000 weights at least, got 1,000"),
        ({"parts": ("transformer",), "dtype": "float16"}, "float32, bfloat16, got 'float16'"),
        ({"parts": ("transformer",), "tokens": 1}, "tokens must be at least 2.*got 1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_measured(settings, message):
    with pytest.raises(SubspanError, match=message):
        Bench(**QUICK | settings)


def test_settings_are_given_as_their_dataclass(tmp_path):
    with pytest.raises(SubspanError, match=r"^settings must be a Bench, got {'parts': "):
        bench({"parts": ("steps",)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    optimizer = lowrank.make_optimizer(net, rank, adapting=True)
    assert optimizer.ranks_may_change
    assert not lowrank.make_optimizer(net, rank).ranks_may_change


def test_memory_of_low_rank_follows_the_rank():
    low, dense = run_in_process(far.peaks, 1500, (4, lowrank.DENSE), 2, memory_of="it")
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
    layers, networks = (
        [row for row in measured.record["sums"] if row["what"].startswith(what)]
        for what in ("a layer 16 × 16", "a training step of lenet-tf")
    )
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
    ready = laboratory.Prepared(
        run, laboratory.Classification(images, "mlp-8"), how, models["laboratory"], None
    )
    accelerator = laboratory.devices.accelerator(training)
    loop = laboratory.Loop(ready, accelerator, tmp_path, None, None, None)
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
    settings = Bench(**QUICK | {"batch_size": 64})
    rows = find_part("laboratory").measure(settings, told.append)
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


# ---- large networks ------------------------------------------------------------------------------


@pytest.fixture
def no_peft(monkeypatch):
    """PEFT is not installed, whatever is."""
    found = large_network.importlib.util.find_spec
    monkeypatch.setattr(
        large_network.importlib.util,
        "find_spec",
        lambda name: None if name == "peft" else found(name),
    )


@pytest.fixture
def here(monkeypatch):
    """Workers in this process, which has started already; and who took turns, by variant."""
    turns = []

    class Near:
        def __init__(self, function, module, variant, *arguments, allocator):
            arguments = json.loads(json.dumps(arguments))
            self.variant, self.values = variant, function(module, variant, *arguments)

        def turn(self):
            turns.append(self.variant)
            return json.loads(json.dumps(next(self.values)))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.values.close()

    monkeypatch.setattr(large_network, "SteppedProcess", Near)
    return turns


def of(rows):
    return {row["projection"]: row for row in rows}


@pytest.mark.parametrize("size", ["24x1024x4096", "3x5x7"])
def test_the_weights_of_blocks_are_counted(size):
    with torch.device("meta"):
        net = blocks.Blocks(*Bench(blocks=size).block_sizes)
    assert sum(p.numel() for p in net.parameters()) == blocks.weights(
        Bench(blocks=size).block_sizes
    )


@pytest.mark.parametrize("wanted", [transformer.LEAST, 10**6, 20_000_000, 10**9, 7 * 10**9])
def test_a_decoder_has_the_weights_that_are_wanted(wanted):
    with torch.device("meta"):
        net = transformer.decoder(transformer.shape(wanted), torch.bfloat16, checkpointed=False)
    weights = sum(p.numel() for p in net.parameters())
    assert weights == transformer.weights(wanted)
    assert wanted <= weights < (1.5 if wanted < 10**7 else 1.1) * wanted
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_blocks_are_trained_in_turns(no_peft, here):
    told = []
    settings = Bench(blocks="2x8x16", batches=(4,), large_dim=20, seconds=1e-3)
    rows = find_part("blocks").measure(settings, told.append)
    assert told == [
        "blocks 2x8x16, batch of 4, given back at once",
        "blocks 2x8x16, batch of 4, as glibc keeps it",
    ]
    assert [row["allocator"] for row in rows[::5]] == list(blocks.ALLOCATORS)
    found = of(rows[:5])
    assert list(found) == ["full", "frozen", "subspan", "subspan, checkpointed", "lora"]
    assert found.pop("lora")["skipped"] == "not installed: pip install 'subspan[peft]'"
    weights = 2 * (2 * 8 * 16 + 8 + 16)
    assert [row["numbers"] for row in found.values()] == [weights, 0, 20, 20]
    for name, row in found.items():
        assert (row["weights"], row["weight_bytes"], row["dim"]) == (weights, 4 * weights, 20)
        assert row["largest_bytes"] == 4 * 8 * 16
        assert row["step"]["calls"] == ROUNDS[0]  # the first step is none of them
        assert 0 < row["step"]["low"] <= row["step"]["median"] <= row["step"]["high"]
        assert row["peak_bytes"] >= row["sampled_bytes"] >= 0
        first, last = row["losses"]
        assert first == found["full"]["losses"][0]  # the same network and batch
        assert last == first if name == "frozen" else last < first
    assert found["subspan"]["losses"] == found["subspan, checkpointed"]["losses"]
    begun, turns = here[:4], here[4 : len(here) // 2]
    assert begun == list(found)
    by_round = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert all(sorted(order) == sorted(found) for order in by_round)
    assert len({tuple(order) for order in by_round}) > 1


def test_a_decoder_is_trained(no_peft, here):
    told = []
    settings = Bench(
        decoder=transformer.LEAST, dtype="bfloat16", tokens=4, large_dim=50, seconds=1e-3
    )
    rows = find_part("transformer").measure(settings, told.append)
    weights = transformer.weights(transformer.LEAST)
    assert told == [f"a decoder of {weights:,} weights, bfloat16"]
    found = of(rows)
    assert found.pop("lora")["skipped"] == "not installed: pip install 'subspan[peft]'"
    for name, row in found.items():
        assert (row["weights"], row["weight_bytes"]) == (weights, 2 * weights)
        assert row["allowed_bytes"] == 3 * row["largest_bytes"] + found["frozen"]["peak_bytes"]
        first, last = row["losses"]
        # As far as guessing among all words, from where all are alike.
        assert first == pytest.approx(float(torch.tensor(16.0 * 64).log()), rel=0.1)
        assert last == first if name == "frozen" else last < first


@pytest.mark.slow
def test_what_does_not_fit_beside_others_is_measured_alone_or_not_at_all(here, monkeypatch):
    free = SimpleNamespace(available=10**6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    some = (large_network.FULL, large_network.FROZEN, large_network.SUBSPAN)
    monkeypatch.setattr(large_network, "VARIANTS", some)

    def measure(weight_bytes):
        here.clear()
        settings = Bench(large_dim=20, seconds=1e-3)
        arguments = ((1, 8, 16), 4)
        return large_network.measure(blocks.__name__, arguments, settings, weight_bytes, {})

    assert all("step" in row for row in measure(10**4))
    assert here[:3] == ["full", "frozen", "subspan"]
    assert all("step" in row for row in measure(10**5))
    assert here == [name for name in some for _ in range(1 + ROUNDS[0])]
    full, frozen, _ = measure(10**6)
    assert full["skipped"] == "needs 0.0 of 0.0 GB"
    assert "step" in frozen
    here.clear()
    skipped = [row["skipped"] for row in measure(10**12)]
    assert skipped == [f"needs {gb} of 0.0 GB" for gb in ("4,500.0", "1,000.0", "1,000.0")]
    assert here == []  # none is begun whose weights have no place


def test_memory_of_blocks_is_what_training_them_takes(no_peft):
    """In processes of their own: two moments and a gradient, or nothing but activations."""
    with pytest.MonkeyPatch.context() as patch:
        some = (large_network.FULL, large_network.FROZEN)
        patch.setattr(large_network, "VARIANTS", some)
        patch.setattr(blocks, "ALLOCATORS", {"given back at once": ALLOCATOR})
        settings = Bench(blocks="4x512x2048", batches=(4,), large_dim=100, seconds=1e-3)
        full, frozen = find_part("blocks").measure(settings, print)
    for key in ("peak_bytes", "sampled_bytes"):
        # A step of Adam needs a temporary or two of one tensor beside these.
        assert 2.9 < full[key] / full["weight_bytes"] < 3.8
        assert frozen[key] / frozen["weight_bytes"] < 0.15


def test_a_worker_hands_on_values_and_failures():
    with SteppedProcess(far.counting, 2, allocator={"MALLOC_ARENA_MAX": "1"}) as worker:
        assert [worker.turn(), worker.turn()] == [[2, "1"], [1, "1"]]
        with pytest.raises(SubspanError, match=r"^no more numbers$"):
            worker.turn()
    assert worker.process.poll() is not None


def test_a_peak_is_seen_by_the_thread_and_by_the_kernel():
    size = 64 << 20
    beyond = Beyond(CPU)
    with beyond.watching():
        block = torch.ones(size // 4)
        for _ in range(30):
            block.add_(1)
        del block
    for bytes_ in (beyond.sampled, beyond.peak):
        assert 0.9 * size < bytes_ < 1.5 * size


@pytest.mark.slow
def test_the_command_shows_large_networks(in_tmp_path, cli, no_peft, here):
    words = ["--parts", "blocks,transformer", "--blocks", "1x8x16", "--batches", "4"]
    words += ["--decoder", "240000", "--tokens", "4", "--large-dim", "20", "--seconds", "0.001"]
    said = cli("bench", *words, "--out", "b")
    assert (said.code, said.err) == (0, "")
    for title in (
        "blocks 1x8x16, batch of 4, memory given back at once: 280 weights, d = 20",
        "blocks 1x8x16, batch of 4, memory as glibc keeps it: 280 weights, d = 20",
        "a decoder in float32, 4 tokens: ",
        "× (3 × largest + activations)",
        "not installed: pip install 'subspan[peft]'",
    ):
        assert title in said.out
    record = json.loads((in_tmp_path / "b" / "bench.json").read_text())
    axes = picture.draw(record).axes
    assert len(axes) == 3
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == [*list(of(record["blocks"]))[:4], "lora (skipped)"]
    ends = [bar.get_x() + bar.get_width() for bar in axes[0].patches]
    full, frozen = record["blocks"][:2]
    assert ends[-4] == pytest.approx(1)  # four steps, after peaks that may be 0 and have no bar
    assert ends[-3] == pytest.approx(frozen["step"]["median"] / full["step"]["median"])


def test_large_networks_are_measured_if_they_are_named():
    assert not {"blocks", "transformer"} & set(Bench().parts)
    settings = Bench(parts=("blocks", "transformer"), batches=(1, 2, 3))
    assert module.total(settings) == 1 + 3 * len(blocks.ALLOCATORS) + 1


@pytest.mark.parametrize("number", ["nan", "inf", "1e6.5", "300000.5"])
def test_a_decoder_of_no_whole_number_of_weights(in_tmp_path, cli, number):
    said = cli("bench", "--parts", "transformer", "--decoder", number)
    assert said.code == 2
    assert "decoder" in said.err
    assert "Traceback" not in said.err
    assert not list(in_tmp_path.iterdir())
