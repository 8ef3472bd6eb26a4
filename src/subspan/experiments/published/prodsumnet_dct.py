"""Wu 2018, section 6: digits without convolutions, by filters in the cosine spectrum.

Source: Wu, "ProdSumNet: reducing model parameters in deep neural networks via product-of-sums
matrix decompositions", arXiv 1809.02209, 2018, section 6.
"""

from subspan.experiments import Experiment
from subspan.training.config import Sweep, Training


def _sweep(epochs: int, seeds: int) -> Sweep:
    return Sweep(
        # The filters' first coefficients are the network's own.
        Training(net="spectral", data="mnist", epochs=epochs, init="own"),
        methods=("full",),
        seeds=seeds,
        lrs=(0.001,),
        baseline=None,
    )


Experiment(
    name="prodsumnet-dct",
    title="A network without convolutions: filters in the cosine spectrum, MNIST",
    source=(
        "Wu 2018, section 6: 8 filters that are sums of 100 diagonals, then sums of 200 random "
        "8-tuples of diagonals, 2,048 units"
    ),
    differences=(
        "Diagonals are smooth, so that filters have a width of 19 and 9 pixels; 16 filters in the "
        "second bank; dropout of the units. quick: one epoch, one seed; full: six, three seeds."
    ),
    published={},
    sweeps={"quick": _sweep(1, 1), "full": _sweep(6, 3)},
)
