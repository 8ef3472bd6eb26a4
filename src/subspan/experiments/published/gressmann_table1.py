"""Gressmann 2020, table 1: random bases that stay (FPD), that are redrawn (RBD), and NES.

Source: Gressmann, Eaton-Rosen and Luschi, "Improving neural network training in low dimensional
random bases", NeurIPS 2020, table 1, d = 250.
"""

from subspan.experiments import Budget, Experiment, Published
from subspan.training.config import Sweep, Training

D = 250
TABLE = {  # net and data: NES, FPD, RBD, SGD
    "fc-mnist": (0.225, 0.80, 0.93893, 0.9827),
    "fc-fashion_mnist": (0.45, 0.773, 0.8565, 0.8732),
    "fc-cifar10": (0.178, 0.214, 0.4377, 0.5209),
    "cnn-mnist": (0.51, 0.889, 0.9717, 0.9941),
    "cnn-fashion_mnist": (0.37, 0.778, 0.8556, 0.9195),
    "cnn-cifar10": (0.203, 0.372, 0.5464, 0.814),
}


def _published(part: str) -> tuple[Published, ...]:
    *rows, sgd = TABLE[part]
    return tuple(
        Published(f"Gressmann 2020, {method.upper()}", (D,), (accuracy,), sgd, method=method)
        for method, accuracy in zip(("nes", "fpd", "rbd"), rows, strict=True)
    )


def _sweep(
    part: str, epochs: int, seeds: int, lrs: dict[str, tuple[float, ...]], baseline: bool = True
) -> Sweep:
    net, data, *_ = part.split("-")
    training = Training(
        net=f"gressmann-{net}",
        data=data,
        epochs=epochs,
        batch_size=32,
        optimizer="sgd",
        schedule="cosine",
        init="own" if data == "cifar10" else "seed",
    )
    return Sweep(
        training,
        methods=tuple(lrs),
        dims=(str(D),),
        seeds=seeds,
        lrs=lrs,
        options={"distribution": "rademacher"},
        baseline="full" if baseline else None,
        baseline_lrs=(0.01,),
    )


MNIST = {"fpd": (4.0,), "rbd": (1.0, 2.0)}
SWEEPS: dict[str, dict[Budget, dict[str, Sweep]]] = {
    "gressmann-table1": {
        "quick": {"fc-mnist": _sweep("fc-mnist", 3, 1, {"fpd": (4.0,), "rbd": (1.0,)})},
        "full": {
            "fc-mnist": _sweep("fc-mnist", 20, 3, MNIST),
            "fc-cifar10": _sweep("fc-cifar10", 10, 3, {"fpd": (4.0,), "rbd": (1.0,)}),
            "cnn-mnist": _sweep("cnn-mnist", 20, 3, {"fpd": (4.0,), "rbd": (1.0,)}),
            "cnn-cifar10": _sweep("cnn-cifar10", 50, 3, {"rbd": (1.0,)}, baseline=False),
            "cnn-cifar10-fpd": _sweep("cnn-cifar10-fpd", 20, 3, {"fpd": (4.0,)}),
            "fc-mnist-nes": _sweep("fc-mnist-nes", 1, 1, {"nes": (1.0,)}, baseline=False),
        },
    },
    "gressmann-table1-fashion": {
        "quick": {"fc-fashion_mnist": _sweep("fc-fashion_mnist", 3, 1, MNIST)},
        "full": {
            "fc-fashion_mnist": _sweep("fc-fashion_mnist", 20, 3, MNIST),
            "cnn-fashion_mnist": _sweep("cnn-fashion_mnist", 20, 3, MNIST),
        },
    },
}

for name, sweeps in SWEEPS.items():
    fashion = name.endswith("fashion")
    Experiment(
        name=name,
        title="Random bases, redrawn (RBD) and fixed (FPD), d = 250" + ", Fashion-MNIST" * fashion,
        source=(
            "Gressmann, Eaton-Rosen and Luschi, NeurIPS 2020, table 1: 100 epochs, batches of 32, "
            "no schedule; padded and cropped images, and flipped ones of CIFAR-10"
        ),
        differences=(
            "Unit columns of signs (published: normals/√D, another scale of the rate); the rate "
            "falls along a cosine; no augmentation; SGD of all weights has momentum 0.9. Initial "
            "weights are Keras's on CIFAR-10, as published; on MNIST they are ours, which are "
            "smaller, since a fixed basis cannot outweigh the others as well. quick: FC on MNIST, "
            "three epochs; full: both networks, three seeds, 20 epochs (FC on CIFAR-10: 10; RBD "
            "with the CNN on CIFAR-10: 50); of NES, whose step takes 500 evaluations, one epoch "
            "and one seed."
        ),
        published={part: _published("-".join(part.split("-")[:2])) for part in sweeps["full"]},
        sweeps=sweeps,
    )
