"""Wu 2018: LeNet (3,274,634 weights) on MNIST as products of sums: all layers, or the convolutions.

Source: Wu, "ProdSumNet: reducing model parameters in deep neural networks via product-of-sums
matrix decompositions", arXiv 1809.02209, 2018, experiments on LeNet.
"""

from typing import Any

from subspan.bench.parts.sums import BIAS, CONVOLUTIONS, DENSE
from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training


def _sweep(
    factors: dict[str, list[dict[str, Any]]],
    dims: tuple[str, ...],
    lr: float,
    epochs: int,
    seeds: int,
) -> Sweep:
    return Sweep(
        Training(net="lenet-tf", data="mnist", epochs=epochs),
        methods=("prodsum",),
        dims=dims,
        seeds=seeds,
        lrs=(lr,),
        options={"factors": factors, "bias": BIAS},
        baseline=None,
    )


DIFFERENCES = (
    "The paper does not say its atoms in a form that can be repeated; ours are sums of hashed "
    "entries, two of them to a layer with an inner size between, and the biases of a layer are "
    "made of 10 numbers. Counts are of all that is stored. "
)

Experiment(
    name="prodsumnet-lenet",
    title="LeNet (3,274,634 weights) on MNIST, every layer a product of sums",
    source="Wu 2018: 3,554 parameters give 98.45 %, where there are no convolutions of full size",
    differences=DIFFERENCES + "quick: two epochs, one seed; full: twelve, three seeds.",
    published=(Published("Wu 2018", (3554,), (0.9845,), method="prodsum", labels=("656",)),),
    sweeps={
        "quick": _sweep(CONVOLUTIONS | DENSE, ("246", "656"), 0.03, 2, 1),
        "full": _sweep(CONVOLUTIONS | DENSE, ("50", "100", "246", "656"), 0.03, 12, 3),
    },
)
Experiment(
    name="prodsumnet-lenet-conv",
    title="LeNet (3,274,634 weights) on MNIST, its convolutions products of sums",
    source="Wu 2018, figure of the convolutional layers: accuracy hardly falls with few numbers",
    differences=DIFFERENCES
    + "The dense layers stay as they are, and learn at the rate of the sums, 0.003. quick: one "
    "epoch, one seed; full: four, three seeds.",
    published={},
    sweeps={
        "quick": _sweep(CONVOLUTIONS, ("25", "400"), 0.003, 1, 1),
        "full": _sweep(CONVOLUTIONS, ("25", "100", "400"), 0.003, 4, 3),
    },
)
