"""A training shares generators, accelerate and threads with the rest of its process."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from subspan.sweeps.running import Running
from subspan.sweeps.sweep import sweep
from subspan.training.evaluate import evaluate_checkpoint
from subspan.training.export import export
from subspan.training.train import train
from tests.runs import a_run, a_sweep

CHANGED = {"dim": 10, "epochs": 2, "task_options": {"augment": "crop"}}  # it draws at every step


def drawn():
    """The next numbers of all generators."""
    return float(torch.rand(())), random.random(), float(np.random.rand())


@pytest.mark.parametrize("what", ["train", "evaluate", "export", "sweep"])
def test_generators_are_left_as_they_were(what, trained, tmp_path):
    """A search that draws rates would otherwise draw the same one after every training."""
    model = trained / "model.safetensors"
    work = {
        "train": lambda: train(a_run(**CHANGED, steps=2), tmp_path / "run"),
        "evaluate": lambda: evaluate_checkpoint(model),
        "export": lambda: export(model, tmp_path / "weights"),
        "sweep": lambda: sweep(a_sweep(steps=2, seeds=1), tmp_path / "run", Running(jobs=1)),
    }
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = drawn()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    work[what]()
    assert drawn() == expected


def test_a_report_may_draw_seed_and_train(tmp_path):
    def report(row):
        torch.rand(3)
        random.seed(0)
        evaluate_checkpoint(tmp_path / "b" / "best.safetensors")
        train(a_run(dim=5, steps=1, seed=1, mixed_precision="bf16"), tmp_path / f"{row.epoch}")

    plain = train(a_run(**CHANGED), tmp_path / "a")
    told = train(a_run(**CHANGED), tmp_path / "b", report=report)
    assert [row.train_loss for row in plain.history] == [row.train_loss for row in told.history]


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_training_has_gradients_wherever_it_is_called(without, tmp_path):
    with without():
        train(a_run(dim=5, steps=3), tmp_path / "a")
        assert not torch.is_grad_enabled()
    train(a_run(dim=5, steps=3), tmp_path / "b")
    models = [tmp_path / name / "model.safetensors" for name in "ab"]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_trainings_of_threads_take_turns(tmp_path):
    """Each would draw numbers that the other's batches wanted."""
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(train, a_run(**CHANGED), tmp_path / name) for name in "ab"]
        losses = [[row.train_loss for row in run.result().history] for run in runs]
    assert losses[0] == losses[1]


def test_an_accelerator_of_the_caller_s_keeps_its_settings(tmp_path):
    own = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=4)
    train(a_run(dim=5, steps=1, mixed_precision="bf16"), tmp_path)
    assert own.mixed_precision == own.state.mixed_precision == "no"
    assert own.gradient_state.num_steps == 4
    assert Accelerator(cpu=True).mixed_precision == "no"
