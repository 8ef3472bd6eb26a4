"""Minut 2023: LeNet on MNIST, coordinates per layer.

Source: Minut 2023, experiments on LeNet 6-16-120-84-10 with padding (61,706 weights); validation
accuracies.
"""

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

# As many for each of the five layers, into which all published sums divide. Divided by the square
# roots of the layers' sizes, 125 leave four for the first layer, and reach less.
DIMS = tuple("+".join([str(each)] * 5) for each in (25, 50, 70, 90, 140))

Experiment(
    name="minut-mnist-lenet",
    title="LeNet (61,706 weights) on MNIST, coordinates per layer",
    source="Minut 2023: per-layer projections of 125 … 700 coordinates in all",
    differences=(
        "Published accuracies are of the validation part, ours of the test set; hash instead of "
        "stored matrices; as many coordinates for every layer (what was published is their sum); "
        "unit columns, hence other learning rates, chosen on a validation part; a one-cycle "
        "schedule. quick: 5 epochs, one seed; full: the published batch size of 64 and 80/20 "
        "split, 10 epochs (published: up to 100, with a patience of 5), 3 seeds."
    ),
    published=(
        Published(
            "Minut 2023",
            dims=(125, 250, 350, 450, 700),
            accuracy=(0.855, 0.913, 0.928, 0.952, 0.969),
            baseline=0.989,
        ),
    ),
    sweeps={
        "quick": Sweep(
            Training(net="lenet", data="mnist", epochs=5),
            methods=("hash",),
            dims=DIMS,
            baseline_lrs=(0.003,),
            options={"compartments": "layer"},
        ),
        "full": Sweep(
            Training(net="lenet", data="mnist", epochs=10, batch_size=64, validation=0.2),
            methods=("hash",),
            dims=DIMS,
            seeds=3,
            baseline_lrs=(0.001, 0.003),
            options={"compartments": "layer"},
        ),
    },
)
