"""Several runs, one after the other, by the processes of one launcher: its ``-m`` is this."""

from __future__ import annotations

import sys
from pathlib import Path

from subspan import distributed
from subspan.training.train import train
from tests.runs import a_run

# 1,317 images for training leave a last batch of 37, which neither two nor four share equally, and
# one of 1, which is not enough for them.
ODD = {"validation": 0.084, "epochs": 3}
RUNS = {
    "hash": a_run(dim=40, optimizer="sgd", lr=0.1, **ODD),
    "full": a_run("full", lr=0.003, **ODD),
    "one-left": a_run("full", lr=0.1, optimizer="sgd", batch_size=1316, **ODD),
    "rbd": a_run("rbd", dim=20, lr=0.5, **ODD),
}

if __name__ == "__main__":
    for name, run in RUNS.items():
        train(run, Path(sys.argv[1]) / name)
    distributed.leave()
