"""SVD truncation of a trained network, with and without retraining, against DLRT at equal counts.

Source: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets", NeurIPS
2022, on pruning by singular values. At full rank the parallel integrator *is* gradient descent on
all weights, so that "dense, then truncated" is the same method with other settings.
"""

from subspan.experiments import Experiment
from subspan.training.config import Sweep, Training

RATIOS = ("0.9", "0.945", "0.983")
SETTINGS = {  # when ranks begin to fall and when they stay, as shares of the training
    "truncated": {"rank": "full", "adapt_at": 1.0, "freeze_at": 1.0},
    "retrained": {"rank": "full", "adapt_at": 0.5, "freeze_at": 0.5},
    "dlrt": {},
}


def _sweep(part: str, epochs: int, seeds: int, ratios: tuple[str, ...]) -> Sweep:
    training = Training(net="lenet5-caffe", data="mnist", epochs=epochs, batch_size=128)
    return Sweep(
        training,
        methods=("dlrt-ratio",),
        dims=ratios,
        seeds=seeds,
        lrs=(0.002,),
        options=SETTINGS[part],
        baseline="full" if part == "dlrt" else None,
        baseline_lrs=(0.001,),
    )


Experiment(
    name="dlrt-pruning",
    title="LeNet5 on MNIST: SVD truncation, with and without retraining, against DLRT",
    source=(
        "Schotthöfer et al., NeurIPS 2022: truncation alone ruins the network, retraining mends it"
    ),
    differences=(
        "All in one length of training: truncation at its end; at its half, with the ranks that "
        "the spectrum then has; DLRT, whose ranks fall over the first half. quick: two epochs, one "
        "seed; full: ten, three seeds."
    ),
    published={},
    sweeps={
        "quick": {part: _sweep(part, 2, 1, RATIOS[1:2]) for part in SETTINGS},
        "full": {part: _sweep(part, 10, 3, RATIOS) for part in SETTINGS},
    },
)
