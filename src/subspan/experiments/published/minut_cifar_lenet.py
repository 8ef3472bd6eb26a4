"""Minut 2023: LeNet on CIFAR-10, coordinates per layer.

Source: Minut 2023, experiments on LeNet 6-16-120-84-10 with padding (62,006 weights) on the middle
28x28 pixels; validation accuracies.
"""

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

# As many for each of the five layers, as on MNIST, while the first has so many weights (456); the
# larger numbers are divided by the square roots of the layers' sizes.
DIMS = (*("+".join([str(each)] * 5) for each in (20, 150, 400)), "3500", "6000")

Experiment(
    name="minut-cifar-lenet",
    title="LeNet (62,006 weights) on CIFAR-10, coordinates per layer",
    source="Minut 2023: per-layer projections of 100 … 6000 coordinates in all",
    differences=(
        "Published accuracies are of the validation part, ours of the test set; hash instead of "
        "stored matrices; as many coordinates for every layer, from 3,500 on by the square roots "
        "of their sizes (what was published is the sum); unit columns, hence other learning rates, "
        "chosen on a validation part; a one-cycle schedule. quick: 5 epochs, one seed; full: the "
        "published batch size of 64 and 80/20 split, 40 epochs (published: up to 100, with a "
        "patience of 5), 3 seeds, two of the five d, rates near 1/√d."
    ),
    published=(
        Published(
            "Minut 2023",
            dims=(100, 750, 2000, 3500, 6000),
            accuracy=(0.308, 0.431, 0.53, 0.552, 0.589),
            baseline=0.615,
        ),
    ),
    sweeps={
        "quick": Sweep(
            Training(net="minut-lenet", data="cifar10", epochs=5),
            methods=("hash",),
            dims=DIMS,
            baseline_lrs=(0.001, 0.003),
            options={"compartments": "layer"},
        ),
        "full": Sweep(
            Training(net="minut-lenet", data="cifar10", epochs=40, batch_size=64, validation=0.2),
            methods=("hash",),
            dims=(DIMS[2], DIMS[4]),
            seeds=3,
            lrs=(0.01, 0.02),
            baseline_lrs=(0.001,),
            options={"compartments": "layer"},
        ),
    },
)
