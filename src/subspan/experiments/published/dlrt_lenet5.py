"""Schotthöfer 2022: LeNet5 on MNIST at eight tolerances, counted as published and in truth.

Source: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets", NeurIPS
2022, table of LeNet5 with adaptive ranks. Erratum: the published "params eval" are
Σ r (n + 1) + 5,000; the numbers really stored are Σ r (n + m) + 5,000, by which the points stand
here.
"""

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

TABLE = {  # tolerance: numbers really stored, accuracy
    "0.09": (98_700, 0.9816),
    "0.11": (78_850, 0.9821),
    "0.13": (62_305, 0.9787),
    "0.15": (50_605, 0.9814),
    "0.2": (29_260, 0.9812),
    "0.3": (18_880, 0.9745),
    "0.4": (12_490, 0.9597),
    "0.45": (10_090, 0.9407),
}


PUBLISHED = Published(
    "Schotthöfer 2022",
    tuple(count for count, _ in TABLE.values()),
    tuple(accuracy for _, accuracy in TABLE.values()),
    0.9882,
    labels=tuple(TABLE),
)


def _sweep(method: str, dims: tuple[str, ...], epochs: int, seeds: int, baseline: bool) -> Sweep:
    training = Training(net="lenet5-caffe", data="mnist", epochs=epochs, batch_size=128)
    return Sweep(
        training,
        methods=(method,),
        dims=dims,
        seeds=seeds,
        lrs=(0.002,),
        baseline="full" if baseline else None,
        baseline_lrs=(0.001,),
    )


RATIOS = ("0.945", "0.983")  # at most 31,000 and 13,000 numbers in all

Experiment(
    name="dlrt-lenet5",
    title="LeNet5 (431,080 weights) on MNIST by DLRT: accuracy against tolerance, and at two sizes",
    source=(
        "Schotthöfer et al., NeurIPS 2022: SGD 0.05, batches of 128, five splits of 50k/10k/10k, "
        "and 100 further epochs at fixed ranks, which are behind the published accuracies"
    ),
    differences=(
        "The parallel integrator with Adam and a one-cycle rate; no epochs of fine-tuning; τ rises "
        "over the first 30 % of the training, and a given size is reached after half of it; biases "
        "and cores count. quick: two epochs, three tolerances, one seed; full: three seeds, five "
        "epochs at each tolerance, ten at each size."
    ),
    published={"tolerance": (PUBLISHED,)},
    sweeps={
        "quick": {
            "tolerance": _sweep("dlrt", ("0.09", "0.2", "0.45"), 2, 1, baseline=True),
            "size": _sweep("dlrt-ratio", RATIOS, 2, 1, baseline=False),
        },
        "full": {
            "tolerance": _sweep("dlrt", tuple(TABLE), 5, 3, baseline=True),
            "size": _sweep("dlrt-ratio", RATIOS, 10, 3, baseline=False),
        },
    },
)
