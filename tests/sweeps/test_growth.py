"""The intrinsic dimension from trainings in which d grows: the command, the record, a loop."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

from subspan import SubspaceModel, SubspanError, checkpoint
from subspan.sweeps.growing_dimension import GrowingDimension
from subspan.sweeps.growth import Growth, GrowthPlan
from subspan.sweeps.intrinsic import intrinsic_dimension
from subspan.sweeps.result import PointRecord
from subspan.training.config import Run, Training
from subspan.training.score import Score
from subspan.training.train import train
from tests.runs import NET, a_run

COMMAND = ["intrinsic", "--net", "mlp-16", "--jobs", "1", "--out", "out"]
SHORT = ["--dims", "5,20,80,160,320,640", "--epochs", 8, "--stage-epochs", 3]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder of the command, with two seeds."""
    from subspan.cli import main

    folder = tmp_path_factory.mktemp("intrinsic") / "out"
    words = [*COMMAND[:-1], str(folder), *map(str, SHORT), "--seeds", "2", "--threshold", "0.8"]
    assert main([*words, "--baseline-lrs", "0.01"]) == 0
    return folder


def test_a_curve_of_all_seeds_up_to_one_stage_after_the_target(out):
    sweep = json.loads((out / "sweep.json").read_text())
    assert sweep["status"] == "complete"
    rows = sweep["rows"]
    dims = [row["dim"] for row in rows]
    assert dims == [5, 20, 80, 160, 320, 640][: len(dims)]
    assert len(dims) < 6
    means = [row["mean_test_score"] for row in rows]
    assert means == sorted(means)
    runs = sorted((out / "runs").glob("hash-growing-*/record.json"))
    assert len(runs) == 2
    for seed, path in enumerate(runs):
        record = json.loads(path.read_text())
        until = record["config"]["options"]["until"]
        ends = [row for row in record["history"] if "test_score" in row]
        reached = [row["val_score"] >= until for row in ends]
        assert reached.index(True) == len(ends) - 2
        assert [row["epoch"] for row in ends] == [3 * (i + 1) for i in range(len(ends))]
        # The file is the largest d, and its score that of the last stage.
        assert record["trainable_parameters"] == ends[-1]["trainable_parameters"]
        assert record["test_score"] == ends[-1]["test_score"]
        at = [row["test_score"][row["seeds"].index(seed)] for row in rows[: len(ends)]]
        assert at == [row["test_score"] for row in ends]
        # Every stage begins with the rate of its d, which is lower than that of the one before.
        rates = [record["history"][row["epoch"] - 3]["learning_rate"] for row in ends]
        for one, other, a, b in zip(rates, rates[1:], dims, dims[1:], strict=False):
            assert other / one == pytest.approx((a / b) ** 0.5)
    found = sweep["d_int"]["hash"]
    assert dims[0] < found["value"] < dims[-1]
    assert "d growing with 3 epochs each" in found["note"]
    assert (out / "curve.png").stat().st_size > 5000
    assert "growing" in (out / "report.html").read_text()


def test_nothing_is_repeated(out, cli, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/record.json")}
    monkeypatch.chdir(out.parent)
    words = [*COMMAND, *SHORT, "--seeds", "2", "--threshold", "0.8", "--baseline-lrs", "0.01"]
    assert cli(*words).code == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/record.json")} == before
    said = cli(*words[:-1], "0.02")
    assert said.code == 2
    assert "belongs to another configuration (baseline_lrs" in said.err


def test_what_happens_beside_the_runs_is_said(cli, in_tmp_path, monkeypatch):
    def wait(plan, out, running):
        running.say("waiting for 1 run of another sweep")
        raise SubspanError("asked")

    monkeypatch.setattr("subspan.commands.intrinsic.carry_out", wait)
    said = cli("intrinsic", "--net", NET, "--dims", "5,10", "--out", "run")
    assert said.out == "waiting for 1 run of another sweep\n"


def test_stages_by_train_and_a_file_that_loads(cli, in_tmp_path):
    words = ["train", "--net", "mlp-16", "--out", "run", "--stages", "5,20,80", "--epochs", 4]
    assert cli(*words).code == 0
    record = json.loads(Path("run/record.json").read_text())
    assert [row["epoch"] for row in record["history"] if "test_score" in row] == [1, 2, 4]
    assert record["best_epoch"] == 4
    assert checkpoint.inspect("run/model.safetensors")["recipe"]["dim"] == 80
    said = cli("eval", "run/model.safetensors")
    assert f"test_accuracy: {record['test_score']}" in said.out


def test_a_stage_begins_where_the_one_before_ended(tmp_path):
    """At a rate of nothing, all stages have one score, and θ is θ₀ + P w of the first."""
    run = a_run("hash", epochs=4, stages="10,20", lr=0.3)
    losses = [row.val_loss for row in train(run, tmp_path / "a").history]
    tiny = Run(run.training, "hash", {"stages": [10, 20]}, 1e-12, run.seed)
    still = [row.val_loss for row in train(tiny, tmp_path / "b").history]
    assert max(still) - min(still) < 1e-6
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dims", "5,12"], "d cannot grow from 5 to 12: subspaces are nested if each d is a"),
        (["--dims", "20,10"], "d cannot grow from 20 to 10"),
        (["--dims", "5,5,10"], "dims names one value twice: 5, 5, 10"),
        (["--dims", "5,10", "--bits", "3"], "unknown argument of subspan intrinsic '--bits'"),
        (["--dims", "5,10", "--head-lr", "-1", "--train-fully", "fc2"], "head_lr must be a"),
        (["--dims", "5,10", "--baseline-lrs", ".01,-1"], "baseline_lrs must be a positive"),
        (["--dims", "5,10", "--baseline-lrs", ".01,nan"], "baseline_lrs must be a positive"),
        (
            ["--dims", "5,10", "--baseline-lrs", ".01,0.010000001"],
            "baseline_lrs names one value twice: 0.01, 0.01",
        ),
        (["--dims", "100"], "give several dims, as 25,50,100"),
        (["--dims", "5,5000"], "there are 1210 weights"),
        (["--dims", "3,6", "--compartments", "tensor"], "number of compartments, 4"),
        (
            ["--dims", "2+1+1+1,4+1+1+2", "--compartments", "tensor", "--seeds", "0"],
            "seeds must be at least 1",
        ),
        (
            ["--dims", "2+1+2+1,4+1+3+2", "--compartments", "tensor"],
            "from 2 to 3 in compartment 'fc2.weight'",
        ),
        (["--dims", "5,10", "--stage-epochs", "0"], "stage_epochs must be at least 1"),
        (["--compartments", "layer"], "compartments need dims"),
        (["--dims", "5,10", "--threshold", "2"], "threshold must be in (0, 1]"),
        (["--dims", "5,10", "--dim", "7"], "--dim"),
    ],
)
def test_bad_input_is_refused_by_name_before_anything_is_written(options, said, cli, in_tmp_path):
    found = cli(*COMMAND, "--epochs", 1, *options)
    assert found.code == 2
    assert said in found.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": "5,10", "dim": 5}, "not both"),
        ({"dim": 5, "until": 0.5}, "give --stages, too"),
        ({"stages": "5,10", "patience": 1}, "leave --patience out"),
        ({"stages": "5,10,20"}, "3 stages need 3 epochs at least, got 2"),
        ({"stages": "5,10", "compartments": {".*": 5}}, "leave --stages out"),
    ],
)
def test_options_of_stages_that_contradict(options, said, tmp_path):
    options = dict(options)
    training = Training(net=NET, epochs=2, patience=options.pop("patience", None))
    with pytest.raises(SubspanError, match=said):
        train(Run(training, "hash", options, 0.1), tmp_path / "run")


POOR = """
import torch
from torch import nn
from subspan.training.score import Score
from subspan.training.tasks import Task

class Poor(Task):
    score = Score("R2", percent=False)
    def network(self):
        return nn.Linear(4, 1)
    def size(self):
        return 8
    def batch(self, index):
        return index[:, None] / torch.arange(1, 5)
    def loss(self, net, batch):
        return net(batch).square().mean()
    def evaluate(self, net, part):
        return 1.0, -0.5
"""


def test_a_baseline_that_is_no_better_than_zero_has_a_curve_and_no_dimension(cli, in_tmp_path):
    (in_tmp_path / "growth_poor.py").write_text(POOR)
    words = [*COMMAND, "--dims", "2,4", "--epochs", 1, "--stage-epochs", 1]
    words[1:3] = ["--task", "growth_poor:Poor"]
    said = cli(*words)
    assert (said.code, said.err) == (0, "")
    assert "no intrinsic dimension: the baseline is no better than 0" in said.out
    sweep = json.loads(Path("out/sweep.json").read_text())
    assert [row["dim"] for row in sweep["rows"]] == [2, 4]
    assert (sweep["status"], sweep["d_int"]) == ("complete", {})


def test_another_projection_has_no_stages(cli, in_tmp_path):
    said = cli("train", "--method", "fastfood", "--stages", "5,10")
    assert said.code == 2
    assert "stages" in said.err
    assert "hash" in said.err


def test_dims_are_no_text():
    with pytest.raises(SubspanError, match="dims must be a tuple of texts, got '24'"):
        Growth(Training(net=NET), dims="24")  # it would grow from 2 to 4


def test_dims_double_by_default():
    plan = GrowthPlan(Growth(Training(net=NET)))
    assert plan.dims == ("25", "50", "100", "200", "400")  # of 610 weights


def test_a_run_that_was_stopped_goes_on_in_the_middle_of_a_stage(tmp_path):
    from subspan.errors import Stopped

    run = a_run("hash", epochs=4, stages="10,20", lr=0.3)
    whole = train(run, tmp_path / "whole")
    steps = iter(range(1, 1000))

    def step():
        if next(steps) == 29:  # of 44: in the first epoch of the second stage
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        train(run, tmp_path / "run", on_step=step)
    done = train(run, tmp_path / "run")
    assert [row.test_score for row in done.history] == [row.test_score for row in whole.history]
    files = [tmp_path / name / "model.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_seeds_that_end_before_the_mean_has_reached_the_target_are_named():
    """It is not that the target was out of reach, as a curve that goes on to its end would say."""
    plan = GrowthPlan(Growth(Training(net=NET)))
    first = {50: [0.7, 0.3], 100: [0.85, 0.5], 200: [0.86, 0.6]}
    baseline = point(610, [0.9, 0.9])
    rows = [*(point(d, scores) for d, scores in first.items()), point(400, [0.84], seeds=[1])]
    found = plan._find(rows, baseline)["hash"]
    assert found.value is None
    assert "no mean of all seeds, for the runs of seeds 0 had reached the target" in found.note
    for last in ([0.86, 0.7], [0.86, 0.9]):  # no seed has ended before; and reached
        found = plan._find([*rows[:3], point(400, last)], baseline)["hash"]
        assert (found.value is None, "no mean" in found.note) == (last[1] < 0.75, False)


def point(dim, scores, **other):
    counts = dict.fromkeys(("trainable_parameters", "stored_parameters"), dim)
    fixed = {"method": "hash", "label": str(dim), "lr": 0.1, "weights": 610}
    seeds = {"seeds": list(range(len(scores)))}
    return PointRecord(
        dim=dim, test_score=scores, checkpoint_bytes=None, **fixed, **counts, **seeds | other
    )


def test_paired_intervals_draw_whole_curves():
    """Seeds whose curves differ by a shift alone have their crossings, and no others."""
    dims, base = [10, 100, 1000], [0.3, 0.6, 0.9]
    scores = [[a + shift for shift in (-0.05, 0.0, 0.05)] for a in base]
    found = intrinsic_dimension(dims, scores, [1.0] * 3, threshold=0.75, paired=True)
    ends = [
        intrinsic_dimension(dims, [[a + shift] for a in base], [1.0], threshold=0.75).value
        for shift in (0.05, -0.05)
    ]
    assert (found.low, found.high) == pytest.approx(ends)
    with pytest.raises(SubspanError, match="same seeds at every d, got 2, 1"):
        intrinsic_dimension([1, 2], [[0.1, 0.2], [0.3]], [1.0], paired=True)


def test_a_loop_of_ones_own():
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    model = SubspaceModel(nn.Linear(6, 3), 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    growing = GrowingDimension(model, [2, 4, 8, 16], baseline=0.97, threshold=0.8)
    on = True
    while on:
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(0.3 * (2 / growing.dim) ** 0.5)
        on = growing.record((model(x).argmax(1) == y).float().mean().item(), optimizer, schedule)
    found = growing.found()
    assert list(growing.scores) == [2, 4, 8, 16][: len(growing.scores)]
    assert found.value is not None
    assert found.target == pytest.approx(0.97 * 0.8)
    with pytest.raises(SubspanError, match="must begin with the"):
        GrowingDimension(model, [3, 6], baseline=1.0)
    with pytest.raises(SubspanError, match="multiple of the one before"):
        GrowingDimension(model, [growing.dim, growing.dim + 1], baseline=1.0)


@pytest.mark.parametrize("score", [float("nan"), None, "much", 1.5, torch.ones(2)])
def test_what_is_no_score_is_refused_and_nothing_changes(score):
    model = SubspaceModel(nn.Linear(6, 3), 2)
    growing = GrowingDimension(model, [2, 4], baseline=0.9)
    with pytest.raises(SubspanError, match="score"):
        growing.record(score)
    assert (growing.dim, growing.scores) == (2, {})
    with pytest.raises(SubspanError, match="score"):
        GrowingDimension(model, [2, 4], baseline=score)
    assert growing.record(torch.tensor(0.5))
    assert growing.scores == {2: 0.5}


def test_a_baseline_and_dims_of_which_no_dimension_follows():
    model, error = SubspaceModel(nn.Linear(6, 3), 2), Score("error", False, 1.0, percent=False)
    with pytest.raises(SubspanError, match="baseline must be better than 0, got 0"):
        GrowingDimension(model, [2, 4], baseline=0)
    with pytest.raises(SubspanError, match=r"baseline must be better than 1, got 1\.5"):
        GrowingDimension(model, [2, 4], baseline=1.5, score=error)
    with pytest.raises(SubspanError, match="threshold must be in"):
        GrowingDimension(model, [2, 4], baseline=0.9, threshold=1.5)
    with pytest.raises(SubspanError, match="cannot grow from 2 to 2"):
        GrowingDimension(model, [2, 2, 4], baseline=0.9)


class Accelerated:
    """What accelerate makes of a scheduler, without accelerate."""

    def __init__(self, scheduler):
        self.scheduler, self.step = scheduler, scheduler.step


class Own(schedules.LRScheduler):
    """A scheduler whose rates stand in its code."""

    def get_lr(self):
        return [0.1 for _ in self.base_lrs]


def falling(optimizer):
    return schedules.LambdaLR(optimizer, lambda t: 0.9**t)


SCHEDULES = {
    "lambda": falling,
    "accelerate": lambda o: Accelerated(falling(o)),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda t: 0.9),
    "step": lambda o: schedules.StepLR(o, 3),
    "polynomial": lambda o: schedules.PolynomialLR(o, 20),
    "one cycle": lambda o: schedules.OneCycleLR(o, [0.1, 0.2], total_steps=20),
    "cyclic": lambda o: schedules.CyclicLR(
        o, [0.01, 0.02], (0.1, 0.2), step_size_up=5, cycle_momentum=False
    ),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 20),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4),
    "swa": lambda o: SWALR(o, 0.01, anneal_epochs=7),
    "one after the other": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 3), falling(o), falling(o)], [3, 7]
    ),
    "all together": lambda o: schedules.ChainedScheduler(
        [schedules.LinearLR(o, 0.1, 1.0, 3), schedules.ExponentialLR(o, 0.9)]
    ),
}


def rates(schedule, grown, groups=2):
    """Rates of the groups, step by step; the model grows after the fifth."""
    model = SubspaceModel(nn.Linear(6, 3), 2, train_fully="bias")
    (w,), (b,) = model.coordinates.values(), model.fully_trained().values()
    parameters = [{"params": [w]}, {"params": [b]}] if groups == 2 else [w, b]
    optimizer = torch.optim.Adam(parameters, 0.1)
    scheduler = SCHEDULES[schedule](optimizer) if isinstance(schedule, str) else schedule(optimizer)
    found = []
    for step in range(12):
        if step == 5 and grown:
            assert GrowingDimension(model, [2, 8], baseline=1.0).record(0.1, optimizer, scheduler)
        optimizer.step()
        scheduler.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    return torch.tensor(found[5:])


@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")  # SequentialLR gives one
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_goes_on_at_the_lower_rate_of_the_coordinates(schedule):
    expected = rates(schedule, grown=False) * torch.tensor([0.5, 1.0])
    torch.testing.assert_close(rates(schedule, grown=True), expected)


def test_the_least_rate_of_a_schedule_falls_too():
    def cosine(optimizer):
        return schedules.CosineAnnealingLR(optimizer, 20, eta_min=0.05)

    def plateau(optimizer):
        inner = schedules.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, min_lr=0.05)
        inner.step, step = lambda: step(1.0), inner.step
        return inner

    for schedule in (cosine, plateau):
        expected = rates(schedule, grown=False, groups=1) / 2
        torch.testing.assert_close(rates(schedule, grown=True, groups=1), expected)
    with pytest.raises(SubspanError, match="eta_min is one rate for all groups"):
        rates(cosine, grown=True)


def test_schedules_that_cannot_be_lowered_are_refused_before_the_model_grows():
    model = SubspaceModel(nn.Linear(6, 3), 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    growing = GrowingDimension(model, [2, 4], baseline=1.0)
    for scheduler in (Own(optimizer), schedules.ChainedScheduler([Own(optimizer)]), object()):
        with pytest.raises(SubspanError, match="is not known, so that they cannot be lowered"):
            growing.record(0.1, optimizer, scheduler)
    with pytest.raises(SubspanError, match=r"give record\(\) both"):
        growing.record(0.1, scheduler=falling(optimizer))
    assert (growing.dim, growing.scores) == (2, {})


@pytest.mark.filterwarnings("ignore")
def test_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    from tests.pretrained import bert, transformers

    ids = torch.randint(3, 100, (16, 7), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": n % 2} for n, row in enumerate(ids)]
    model = SubspaceModel(bert(), 4)
    growing = GrowingDimension(model, [4, 8, 16, 32], baseline=1.0, threshold=0.5)
    scores = iter([0.05, 0.1, 0.6, 0.7, 0.8])  # the first before any step
    trainer = transformers.Trainer(
        model.body,
        transformers.TrainingArguments(
            str(tmp_path),
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            num_train_epochs=4,
            per_device_train_batch_size=8,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            eval_strategy="epoch",
            eval_on_start=True,
            save_strategy="no",
        ),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda _: {"accuracy": next(scores)},
        callbacks=[growing.callback()],
    )
    trainer.train()
    assert growing.scores == {4: 0.1, 8: 0.6, 16: 0.7}  # one d after the target, no more
    (w,) = model.coordinates.values()
    assert w.shape == (16,)
    assert w.abs().sum() > 0
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * (4 / 16) ** 0.5)
    assert 4 < growing.found().value < 8
    trainer.compute_metrics = lambda _: {"accuracy": 0.9}
    trainer.evaluate()  # once more, or of other data
    assert growing.scores[16] == 0.7
    with pytest.raises(SubspanError, match="give no 'eval_f1'"):
        growing.callback("eval_f1").on_evaluate(
            None, trainer.state, None, metrics={"eval_loss": 1.0}
        )
