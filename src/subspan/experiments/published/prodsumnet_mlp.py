"""Wu 2018: an MLP of 1,333,770 weights on MNIST with a few per cent of them.

Source: Wu, "ProdSumNet: reducing model parameters in deep neural networks via product-of-sums
matrix decompositions", arXiv 1809.02209, 2018, experiment on a multi-layer perceptron.
"""

from typing import Any

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

DIMS = ("500", "2000", "8000", "25300")
FACTORS: dict[str, list[dict[str, Any]]] = {
    "fc1": [{"kind": "hash", "p": "p"}],
    "fc2": [{"kind": "hash", "p": "p"}],
}


def _sweep(dims: tuple[str, ...], epochs: int, seeds: int) -> Sweep:
    return Sweep(
        Training(net="mlp-1024-512", data="mnist", epochs=epochs),
        methods=("prodsum",),
        dims=dims,
        seeds=seeds,
        lrs=(0.03,),
        options={"factors": FACTORS},
        baseline_lrs=(0.001,),
    )


Experiment(
    name="prodsumnet-mlp",
    title="MLP 784-1024-512-10 (1,333,770 weights) on MNIST as sums",
    source="Wu 2018: within 1.5 points of 98.2 % with 4.3 % of the numbers",
    differences=(
        "Hashed entries; the last layer, 5,130 numbers, and all biases stay. The greatest p makes "
        "4.3 %. quick: two epochs, one seed; full: ten, three seeds."
    ),
    published=(Published("Wu 2018", (57_266,), (0.967,), 0.982, labels=("25300",)),),
    sweeps={"quick": _sweep(DIMS[2:], 2, 1), "full": _sweep(DIMS, 10, 3)},
)
