"""Wu 2018: a linear classifier through few numbers, by cosines, random matrices and pixels.

Source: Wu, "ProdSumNet: reducing model parameters in deep neural networks via product-of-sums
matrix decompositions", arXiv 1809.02209, 2018, figures of the linear classifier.
"""

from typing import Any

from subspan.experiments import Experiment
from subspan.training.config import Sweep, Training

# Inner sizes: W = A M with a free A (10, p) and a fixed M (p, 784), 10 p numbers and 10 biases.
INNER = ("10", "25", "77", "156", "235", "392")
ATOMS = ("20", "50", "150", "380", "770")  # of each of the sums of a product
FIXED: dict[str, Any] = {
    "dct": {"kind": "dct"},
    "gaussian": {"kind": "gaussian", "p": 1, "fixed": True},
    "subsampling": {"kind": "subsample"},
}
SIDE = 100  # between the factors of a product
PRODUCTS: dict[str, list[dict[str, Any]]] = {
    "product-1": [{"kind": "rademacher", "p": "p"}],
    "product-2": [
        {"kind": "rademacher", "p": "p", "inner": SIDE},
        {"kind": "rademacher", "p": "p"},
    ],
    "product-3": [
        {"kind": "rademacher", "p": "p", "inner": SIDE},
        {"kind": "rademacher", "p": "p", "inner": SIDE},
        {"kind": "rademacher", "p": "p"},
    ],
}


def _sweep(
    factors: list[dict[str, Any]], dims: tuple[str, ...], epochs: int, seeds: int, baseline: bool
) -> Sweep:
    training = Training(net="linear", data="mnist", epochs=epochs, batch_size=128)
    return Sweep(
        training,
        methods=("prodsum",),
        dims=dims,
        seeds=seeds,
        lrs=(0.3,),
        options={"factors": {"fc1": factors}},
        baseline="full" if baseline else None,
        baseline_lrs=(0.001, 0.003),
    )


def _parts(epochs: int, seeds: int) -> dict[str, Sweep]:
    # What is held against all weights to a tenth of a point should have converged.
    fixed = {
        part: _sweep(
            [{"kind": "free", "inner": "p"}, last],
            INNER,
            2 * epochs if part == "dct" else epochs,
            seeds,
            part == "dct",
        )
        for part, last in FIXED.items()
    }
    products = {
        part: _sweep(factors, ATOMS, epochs, seeds, False) for part, factors in PRODUCTS.items()
    }
    return fixed | products


Experiment(
    name="prodsumnet-linear",
    title="A linear classifier on MNIST as a product of sums",
    source=(
        "Wu 2018: of 7,850 numbers (about 92 %) a tenth suffices with truncated cosines, which are "
        "slightly better at 22 %; Gaussian matrices need a third, pixels more than half; a product "
        "of two or more random sums comes near the cosines"
    ),
    differences=(
        "The sums of the products are of random signs; the paper's points are in figures only, and "
        "not drawn. quick: two epochs, one seed; full: twenty, three seeds; twice as many of the "
        "cosines and of all weights."
    ),
    published={},
    sweeps={"quick": _parts(2, 1), "full": _parts(20, 3)},
)
