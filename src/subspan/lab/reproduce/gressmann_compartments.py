"""Gressmann 2020: the same 250 numbers a step, in one basis or in many compartments.

Source: Gressmann, Eaton-Rosen and Luschi, "Improving neural network training in low dimensional
random bases", NeurIPS 2020, section on compartmentalisation.
"""

from subspan.lab.config import Sweep, Training
from subspan.lab.reproduce import Experiment

RULES = ("global", "layer", "uniform:5", "uniform:25", "uniform:125")


def _sweep(rule: str, epochs: int, seeds: int) -> Sweep:
    return Sweep(
        Training(
            net="gressmann-cnn",
            data="mnist",
            epochs=epochs,
            batch_size=32,
            schedule="cosine",
        ),
        methods=("rbd",),
        dims=("250",),
        lrs=(1.0, 2.0),
        seeds=seeds,
        options={"compartments": rule},
        baseline=None,
    )


Experiment(
    name="gressmann-compartments",
    title="Accuracy against compartments, CNN on MNIST, RBD, d = 250 in all",
    source="Gressmann, Eaton-Rosen and Luschi, NeurIPS 2020, on compartments",
    differences=(
        "Unit columns of signs, rate 1 or 2, whichever validation prefers, along a cosine. Layers "
        "share d by the square roots of their sizes. quick: one epoch, one seed; full: three "
        "epochs, three seeds."
    ),
    published={},
    sweeps={
        "quick": {rule.replace(":", "-"): _sweep(rule, 1, 1) for rule in RULES},
        "full": {rule.replace(":", "-"): _sweep(rule, 3, 3) for rule in RULES},
    },
)
