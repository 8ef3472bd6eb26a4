"""Minut 2023: what each kind of projection costs, on a multilayer perceptron for CIFAR-10.

Source: Minut 2023, supplement, figures 5 and 6: accuracy, memory, step time and total time of each
type of projection on the 2352-200-10 network (472,610 weights), d = 4,500 per layer; the errata of
the published sparse projections corrected (every column has a support of its own).
"""

from subspan.experiments import Experiment
from subspan.training.config import Sweep, Training

STORED = ("stored-dense", "stored-coo", "stored-csr", "stored-csc")

Experiment(
    name="minut-sparse-benchmark",
    title="Accuracy, memory and time of each kind of projection, MLP (472,610 weights) on CIFAR-10",
    source=(
        "Minut 2023, supplement, figures 5 and 6. Published on a T4 with d = [4000, 1050], forward "
        "pass / memory / epoch: stored dense 28.2 ms / 7,541 MB / 50 s; coo 149.8 / 1,077 / 221; "
        "csr 114.5 / 599 / 102; csc 1.86 / 603 / 81. Accuracy with d = [4000, 750] 46.6 %, all "
        "weights 51.7 %"
    ),
    differences=(
        "Test accuracy (published: validation); unit columns, hence other learning rates; the "
        "sparse projections have independent columns (published: nearly one support for all), "
        "with exactly the density of 1/√d; the stored dense matrix holds signs, not normals, at "
        "the same cost; steps are timed on this machine, one run at a time. quick: 59 steps on "
        "7,500 images, for the costs (a step with a csr or csc matrix takes three seconds; "
        "accuracies are those of a beginning), one learning rate, batches of 128, without "
        "gaussian and the two families of one number an entry, which take a second a step; full: "
        "the published batch size of 64, 80/20 split, patience of 5, up to 30 epochs, three "
        "seeds, on all kinds."
    ),
    published=(),
    sweeps={
        "quick": Sweep(
            Training(net="minut-mlp", data="cifar10", epochs=1, validation=0.85),
            methods=("hash", "fastfood", "orthogonal", "rademacher", "sparse2full", *STORED),
            dims=("4000+500",),
            lrs=(0.045,),
            baseline_lrs=(0.001,),
            options={"compartments": "layer"},
        ),
        "full": Sweep(
            Training(
                net="minut-mlp",
                data="cifar10",
                epochs=30,
                batch_size=64,
                patience=5,
                validation=0.2,
            ),
            methods=(
                "hash",
                "fastfood",
                "orthogonal",
                "rademacher",
                "gaussian",
                "sparse-original",
                "sparse2",
                "sparse2full",
                *STORED,
            ),
            dims=("4000+500",),
            seeds=3,
            options={"compartments": "layer"},
        ),
    },
    timed=True,
)
