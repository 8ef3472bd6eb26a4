"""Minut 2023: a multilayer perceptron on MNIST, coordinates per layer.

Source: Minut 2023, experiments on the 784-200-10 network (159,010 weights); validation accuracies.
"""

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

DIMS = ("600+250", "1100+400", "2000+500", "4000+1000")

Experiment(
    name="minut-mnist-mlp",
    title="MLP 784-200-10 (159,010 weights) on MNIST, coordinates per layer",
    source="Minut 2023: per-layer projections [600, 250] … [4000, 1000]",
    differences=(
        "Published accuracies are of the validation part, ours of the test set; hash instead of "
        "stored matrices; unit columns, hence other learning rates, chosen on a validation part; a "
        "one-cycle schedule. quick: 5 epochs, one seed; full: the published batch size of 64 and "
        "80/20 split, 20 epochs (published: up to 30, with a patience of 5), 3 seeds."
    ),
    published=(
        Published(
            "Minut 2023",
            dims=(850, 1500, 2500, 5000),
            accuracy=(0.901, 0.925, 0.941, 0.955),
            baseline=0.976,
        ),
    ),
    sweeps={
        "quick": Sweep(
            Training(net="mlp", data="mnist", epochs=5),
            methods=("hash",),
            dims=DIMS,
            baseline_lrs=(0.001, 0.003),
            options={"compartments": "layer"},
        ),
        "full": Sweep(
            Training(net="mlp", data="mnist", epochs=20, batch_size=64, validation=0.2),
            methods=("hash",),
            dims=DIMS,
            seeds=3,
            options={"compartments": "layer"},
        ),
    },
)
