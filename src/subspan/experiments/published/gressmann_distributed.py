"""Gressmann 2020: many workers that send each other coordinates, shared bases or independent ones.

Source: Gressmann, Eaton-Rosen and Luschi, "Improving neural network training in low dimensional
random bases", NeurIPS 2020, section on distributed training.
"""

from subspan.experiments import Experiment
from subspan.training.config import Sweep, Training

WORLDS = (1, 2, 4)
CASES = [(1, "shared")] + [(n, mode) for n in WORLDS[1:] for mode in ("shared", "independent")]


def _sweep(processes: int, workers: str, epochs: int, seeds: int, baseline: bool) -> Sweep:
    return Sweep(
        Training(
            net="gressmann-fc",
            data="mnist",
            epochs=epochs,
            batch_size=32 * processes,
            optimizer="sgd",
            schedule="cosine",
        ),
        methods=("rbd",),
        dims=("250",),
        lrs=(1.0,),
        seeds=seeds,
        options={"distribution": "rademacher", "workers": workers},
        baseline="full" if baseline else None,
        baseline_lrs=(0.01,),
        processes=processes,
    )


def _parts(epochs: int, seeds: int) -> dict[str, Sweep]:
    return {
        f"{processes}-{workers}" if processes > 1 else "1": _sweep(
            processes, workers, epochs, seeds, baseline=workers == "shared"
        )
        for processes, workers in CASES
    }


Experiment(
    name="gressmann-distributed",
    title="Accuracy and bytes against workers, FC on MNIST, RBD, d = 250 for each",
    source="Gressmann, Eaton-Rosen and Luschi, NeurIPS 2020, on distributed training",
    differences=(
        "Processes of one machine over Gloo (published: IPUs); every worker has batches of 32, so "
        "that n of them make n times fewer steps; bytes are those that a process writes. The "
        "baseline is SGD on all weights, averaged by DDP. quick: one epoch; full: thirty, three "
        "seeds."
    ),
    published={},
    sweeps={"quick": _parts(1, 1), "full": _parts(30, 3)},
    timed=True,
)
