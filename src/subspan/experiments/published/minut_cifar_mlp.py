"""Minut 2023: a multilayer perceptron on CIFAR-10, coordinates per layer.

Source: Minut 2023, experiments on the 2352-200-10 network (472,610 weights) on the middle 28x28
pixels; validation accuracies.
"""

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

DIMS = ("100+50", "2500+500", "4000+750")

Experiment(
    name="minut-cifar-mlp",
    title="MLP 2352-200-10 (472,610 weights) on CIFAR-10, coordinates per layer",
    source="Minut 2023: per-layer projections [100, 50], [2500, 500], [4000, 750]",
    differences=(
        "Published accuracies are of the validation part, ours of the test set; hash instead of "
        "stored matrices; unit columns, hence other learning rates, chosen on a validation part; a "
        "one-cycle schedule. quick: 5 epochs, one seed; full: the published batch size of 64 and "
        "80/20 split, 20 epochs (published: up to 30, with a patience of 5), 3 seeds."
    ),
    published=(
        Published(
            "Minut 2023",
            dims=(150, 3000, 4750),
            accuracy=(0.267, 0.444, 0.466),
            baseline=0.517,
        ),
    ),
    sweeps={
        "quick": Sweep(
            Training(net="minut-mlp", data="cifar10", epochs=5),
            methods=("hash",),
            dims=DIMS,
            baseline_lrs=(0.0003, 0.001),
            options={"compartments": "layer"},
        ),
        "full": Sweep(
            Training(net="minut-mlp", data="cifar10", epochs=20, batch_size=64, validation=0.2),
            methods=("hash",),
            dims=DIMS,
            seeds=3,
            baseline_lrs=(0.0003, 0.001),
            options={"compartments": "layer"},
        ),
    },
)
