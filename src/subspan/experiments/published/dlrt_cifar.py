"""Schotthöfer 2022: convolutional networks by DLRT, on CIFAR-10 in place of ImageNet.

Source: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets", NeurIPS
2022, table of VGG16 and ResNet-50.
"""

from subspan.experiments import Experiment
from subspan.training.config import Sweep, Training


def _sweep(net: str, epochs: int, seeds: int, validation: float, dims: tuple[str, ...]) -> Sweep:
    training = Training(
        net=net, data="cifar10", epochs=epochs, batch_size=128, validation=validation
    )
    return Sweep(
        training, methods=("dlrt",), dims=dims, seeds=seeds, lrs=(0.001,), baseline_lrs=(0.001,)
    )


for name, kind, small, large, found in (
    (
        "dlrt-cifar-vgg", "VGG", "vgg11", "vgg16",
        ("VGG16 on ImageNet at ϑ = 0.1: 2.19 points less than dense, 86 % fewer numbers to run, "
         "78.4 % in training"),
    ),
    (
        "dlrt-cifar-resnet", "ResNet", "resnet8", "resnet20",
        ("ResNet-50 on ImageNet at ϑ = 0.1: 0.56 points less than dense, 54.1 % fewer numbers to "
         "run, 14.2 % in training"),
    ),
):  # fmt: skip
    Experiment(
        name=name,
        title=f"{kind} on CIFAR-10 by DLRT: accuracy against tolerance",
        source=f"Schotthöfer et al., NeurIPS 2022, {found}",
        differences=(
            "CIFAR-10 (published: ImageNet); Adam, one-cycle, no augmentation. quick, for a CPU: "
            f"{small}, three epochs on 10,000 images, one tolerance; full, for a GPU: {large}, "
            "sixty epochs, three seeds."
        ),
        published={},
        sweeps={
            "quick": _sweep(small, 3, 1, 0.8, ("0.1",)),
            "full": _sweep(large, 60, 3, 1 / 12, ("0.05", "0.1", "0.2")),
        },
    )
