"""Schotthöfer 2022: fully connected networks on MNIST at nine tolerances, and how ranks evolve.

Source: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets", NeurIPS
2022, five-layer networks of 500 and of 784 units.
"""

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

TOLERANCES = ("0", "0.03", "0.05", "0.07", "0.09", "0.11", "0.13", "0.15", "0.17")
TABLE = {  # width: accuracies
    500: (0.9854, 0.9849, 0.9856, 0.9852, 0.9834, 0.9811, 0.9750, 0.9722, 0.9690),
    784: (0.9853, 0.9861, 0.9859, 0.9858, 0.9849, 0.9812, 0.9795, 0.9781, 0.9740),
}
RATIO = "0.909"  # of the factored layers: 90 % fewer numbers in all


def _sweep(
    width: int, method: str, dims: tuple[str, ...], epochs: int, seeds: int, baseline: bool
) -> Sweep:
    training = Training(net="mlp" + f"-{width}" * 4, data="mnist", epochs=epochs, batch_size=256)
    return Sweep(
        training,
        methods=(method,),
        dims=dims,
        seeds=seeds,
        lrs=(0.002,),
        options={"rank_every": 10},
        baseline="full" if baseline else None,
        baseline_lrs=(0.001,),
    )


Experiment(
    name="dlrt-fc",
    title="Fully connected networks on MNIST by DLRT: accuracy against tolerance, and at one size",
    source=(
        "Schotthöfer et al., NeurIPS 2022: Adam 0.001, batches of 256; ranks from "
        "[176, 170, 171, 174] at τ = 0.03 to [13, 21, 24, 20] at 0.17 (width 500)"
    ),
    differences=(
        "The parallel integrator, Adam 0.002, a one-cycle rate, τ from zero over the first 30 %, "
        "ranks that may change at every tenth step; no τ = 0, which is full rank. Counts of the "
        "published points are not known, so that they stand in the table and not in the picture. "
        "quick: width 500, three epochs, three tolerances, one seed; full: three seeds, five "
        "epochs for the tables, twenty for the size with 90 % fewer numbers."
    ),
    published={
        f"width-{width}": (Published("Schotthöfer 2022", (), accuracies, labels=TOLERANCES),)
        for width, accuracies in TABLE.items()
    },
    sweeps={
        "quick": {
            "width-500": _sweep(500, "dlrt", ("0.03", "0.09", "0.17"), 3, 1, baseline=True),
            "size-500": _sweep(500, "dlrt-ratio", (RATIO,), 3, 1, baseline=False),
        },
        "full": {
            "width-500": _sweep(500, "dlrt", TOLERANCES[1:], 5, 3, baseline=True),
            "size-500": _sweep(500, "dlrt-ratio", (RATIO,), 20, 3, baseline=False),
            "width-784": _sweep(784, "dlrt", TOLERANCES[1:], 5, 3, baseline=True),
        },
    },
)
