"""What the base's memory is worth when low-rank bases turn: transported, left as it is, or reset.

    SUBSPAN_DATA=… python benchmarks/moments.py --out benchmarks/results/moments

LeNet5 on MNIST by DLRT to a given size, SGD with momentum and Adam, three seeds; runs that are
complete are not repeated. "Left" keeps the numbers in their places, columns of a basis that is no
longer there (new ones begin at zero); "reset" forgets all at every step, as would be right if
nothing were known of the new basis.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from subspan.files import write_atomically
from subspan.optim import dlrt
from subspan.optim.integrators import USV
from subspan.training import machine
from subspan.training.config import Run, Training
from subspan.training.train import train

RATES = {"sgd": 0.03, "adam": 0.002}


def left(states: tuple[dict[str, Any], ...], old: USV, new: USV) -> None:
    """Only as many columns as there are now."""
    r = new.rank
    for of, shape in zip(states, (new.U.shape, (r, r), new.V.shape), strict=True):
        for key, before in list(of.items()):
            now = before.new_zeros(shape)
            rows, columns = min(len(now), len(before)), min(r, before.shape[1])
            now[:rows, :columns] = before[:rows, :columns]
            of[key] = now


def reset(states: tuple[dict[str, Any], ...], old: USV, new: USV) -> None:
    """Nothing is known."""
    for of in states:
        of.clear()


def nothing(*_: Any) -> None:
    """The core's memory is not turned first."""


RULES: dict[str, dict[str, Any]] = {
    "transported": {},
    "left": {"transport": left, "turn_core": nothing},
    "reset": {"transport": reset, "turn_core": nothing},
}


def main() -> None:
    """Measure, and write ``moments.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for base, lr in RATES.items():
        for rule, functions in RULES.items():
            found = []
            for seed in range(args.seeds):
                training = Training(
                    net="lenet5-caffe",
                    data="mnist",
                    epochs=args.epochs,
                    batch_size=128,
                    optimizer=base,
                )
                run = Run(training, "dlrt-ratio", {"target_ratio": 0.945}, lr, seed)
                with contextlib.ExitStack() as patches:
                    for name, function in functions.items():
                        patches.enter_context(patch.object(dlrt, name, function))
                    found.append(train(run, args.out / "runs" / f"{base}-{rule}-seed{seed}"))
            accuracy = [record.test_score for record in found]
            rows.append(
                {
                    "base": base,
                    "memory": rule,
                    "lr": lr,
                    "test_accuracy": accuracy,
                    "mean": statistics.fmean(accuracy),
                    "spread": statistics.pstdev(accuracy),
                    "stored_parameters": [record.stored_parameters for record in found],
                }
            )
            print(base, rule, accuracy, flush=True)
    record = {
        "epochs": args.epochs,
        "device": machine.device_name(torch.device("cpu")),
        "versions": machine.versions(),
        "rows": rows,
    }
    write_atomically(args.out / "moments.json", json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
