"""Gressmann 2020, table 1: random bases that stay (FPD), that are redrawn (RBD), and NES.

Source: Gressmann, Eaton-Rosen and Luschi, "Improving neural network training in low dimensional
random bases", NeurIPS 2020, table 1, d = 250.
"""

from subspan.lab.config import Sweep, Training
from subspan.lab.reproduce import Experiment, Published

D = 250
TABLE = {  # net and data: NES, FPD, RBD, SGD
    "fc-mnist": (0.225, 0.80, 0.93893, 0.9827),
    "fc-cifar10": (0.178, 0.214, 0.4377, 0.5209),
    "cnn-mnist": (0.51, 0.889, 0.9717, 0.9941),
    "cnn-cifar10": (0.203, 0.372, 0.5464, 0.814),
}


def _published(part: str) -> tuple[Published, ...]:
    *rows, sgd = TABLE[part]
    return tuple(
        Published(f"Gressmann 2020, {method.upper()}", (D,), (accuracy,), sgd, method=method)
        for method, accuracy in zip(("nes", "fpd", "rbd"), rows, strict=True)
    )


def _sweep(part: str, epochs: int, **more: object) -> Sweep:
    net, data = part.split("-")
    training = Training(
        net=f"gressmann-{net}", data=data, epochs=epochs, batch_size=32, optimizer="sgd",
        schedule="cosine",
    )  # fmt: skip
    settings: dict = {"methods": ("fpd", "rbd"), "dims": (str(D),), "baseline_lrs": (0.01,)}
    return Sweep(training, **settings | more)


Experiment(
    name="gressmann-table1",
    title="Random bases, redrawn (RBD) and fixed (FPD), d = 250",
    source=(
        "Gressmann, Eaton-Rosen and Luschi, NeurIPS 2020, table 1: 100 epochs, batches of 32, no "
        "schedule; padded and cropped images, and flipped ones of CIFAR-10"
    ),
    differences=(
        "Unit columns of signs (published: normals/√D, another scale of the rate); the rate falls "
        "along a cosine; no augmentation; our initial weights from a seed; SGD of all weights "
        "has momentum 0.9. NES, whose step takes 500 evaluations, in the full budget only. quick: "
        "FC on MNIST, three epochs; full: thirty epochs, three seeds, both networks and both sets."
    ),
    published={part: _published(part) for part in TABLE},
    sweeps={
        "quick": {"fc-mnist": _sweep("fc-mnist", 3, lrs=(2.0,))},
        "full": {part: _sweep(part, 30, seeds=3, methods=("nes", "fpd", "rbd")) for part in TABLE},
    },
)
