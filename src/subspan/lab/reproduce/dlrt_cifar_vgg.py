"""Schotthöfer 2022: a convolutional network by DLRT, on CIFAR-10 in place of ImageNet.

Source: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets", NeurIPS
2022, VGG.
"""

from subspan.lab.config import Sweep, Training
from subspan.lab.reproduce import Experiment


def _sweep(net: str, epochs: int, seeds: int, validation: float, dims: tuple[str, ...]) -> Sweep:
    training = Training(
        net=net, data="cifar10", epochs=epochs, batch_size=128, validation=validation
    )
    return Sweep(
        training, methods=("dlrt",), dims=dims, seeds=seeds, lrs=(0.001,), baseline_lrs=(0.001,)
    )


Experiment(
    name="dlrt-cifar-vgg",
    title="VGG on CIFAR-10 by DLRT: accuracy against tolerance",
    source=(
        "Schotthöfer et al., NeurIPS 2022, VGG16 on ImageNet at ϑ = 0.1: 2.19 points less "
        "than dense, 86 % fewer numbers to run, 78.4 % in training"
    ),
    differences=(
        "CIFAR-10 (published: ImageNet); Adam, one-cycle, no augmentation. quick, for a CPU: "
        "vgg11, three epochs on 10,000 images, one tolerance; full, for a GPU: vgg16, sixty "
        "epochs, three seeds."
    ),
    published={},
    sweeps={
        "quick": _sweep("vgg11", 3, 1, 0.8, ("0.1",)),
        "full": _sweep("vgg16", 60, 3, 1 / 12, ("0.05", "0.1", "0.2")),
    },
)
