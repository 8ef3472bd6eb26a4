"""Several runs, one after the other, by the processes of one launcher: its ``-m`` is this."""

from __future__ import annotations

import sys
from pathlib import Path

from subspan import distributed
from subspan.training.train import train
from tests.runs import a_run

# Digits' 1,318 images for training leave a last batch of 38, which four do not share equally, and
# one of 2, which is not enough for four.
RUNS = {
    "hash": a_run(dim=40, epochs=3, optimizer="sgd", lr=0.1),
    "full": a_run("full", epochs=3, lr=0.003),
    "two-left": a_run("full", epochs=3, lr=0.1, optimizer="sgd", batch_size=1316),
    "rbd": a_run("rbd", dim=20, epochs=3, lr=0.5),
}

if __name__ == "__main__":
    for name, run in RUNS.items():
        train(run, Path(sys.argv[1]) / name)
    distributed.leave()
