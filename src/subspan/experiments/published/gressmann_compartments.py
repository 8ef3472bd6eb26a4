"""Gressmann 2020: the same 250 numbers a step, in one basis or in many compartments.

Source: Gressmann, Eaton-Rosen and Luschi, "Improving neural network training in low dimensional
random bases", NeurIPS 2020, section on compartmentalisation.
"""

from typing import Any

from subspan.experiments import Experiment
from subspan.training.config import Sweep, Training

CONVOLUTIONS_AND_REST = {"conv.*": 190, "fc.*": 60}
PARTS: dict[str, tuple[float, Any]] = {  # rate, compartments
    "global": (1.0, "global"),
    "layer": (1.0, "layer"),
    "uniform-5": (1.0, "uniform:5"),
    "uniform-25": (1.0, "uniform:25"),
    "uniform-125": (1.0, "uniform:125"),
    "two": (1.0, CONVOLUTIONS_AND_REST),
    "global-rate-2": (2.0, "global"),
    "uniform-25-rate-2": (2.0, "uniform:25"),
    "two-rate-2": (2.0, CONVOLUTIONS_AND_REST),
}


def _sweep(part: str, epochs: int, seeds: int) -> Sweep:
    rate, compartments = PARTS[part]
    training = Training(
        net="gressmann-cnn", data="mnist", epochs=epochs, batch_size=32, schedule="cosine"
    )
    return Sweep(
        training,
        methods=("rbd",),
        dims=("250",),
        lrs=(rate,),
        seeds=seeds,
        options={"distribution": "rademacher", "compartments": compartments},
        baseline=None,
    )


Experiment(
    name="gressmann-compartments",
    title="Accuracy against compartments, CNN on MNIST, RBD, d = 250 in all",
    source="Gressmann, Eaton-Rosen and Luschi, NeurIPS 2020, on compartments",
    differences=(
        "Unit columns of signs. The rate is 1 along a cosine, at which all can be trained, and 2 "
        "where a layer's own basis does not diverge. Layers share d by the square roots of their "
        "sizes; two: 190 for the convolutions and 60 for the rest. quick: one epoch, one seed; "
        "full: three epochs, three seeds."
    ),
    published={},
    sweeps={
        "quick": {part: _sweep(part, 1, 1) for part in PARTS},
        "full": {part: _sweep(part, 3, 3) for part in PARTS},
    },
)
