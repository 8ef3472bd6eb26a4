"""Trainers in two processes, by Gloo: as one process that has the joint batches."""

import pytest
import torch

from tests import ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
for name in ("accelerate", "lightning", "transformers"):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")


def test_two_processes_train_as_one_on_the_joint_batches(tmp_path, monkeypatch):
    from tests.trainers import test_accelerate, two_processes

    both = ranks.go_through("tests.trainers.two_processes", 2, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, run in two_processes.SCENARIOS.items():
        alone = run(0, 1)
        assert torch.equal(both[0][name], both[1][name]), name
        torch.testing.assert_close(both[0][name], alone, rtol=1e-4, atol=1e-5)
    for through in ("network", "handle"):  # one process goes on where two saved their state
        loop = test_accelerate.Loop(through)
        loop.accelerator.load_state(tmp_path / f"{through}2")
        assert torch.equal(loop.coordinates, both[0][f"accelerated, {through}"])
