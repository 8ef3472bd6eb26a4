"""Minut 2023: projections of large networks against small ordinary ones, at equal numbers.

Source: Minut 2023, supplement, figures 8 and 9: perceptrons by width, LeNets by kernel, channels
and width, on MNIST and CIFAR-10.
"""

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

# Name of a part: network, data, values of d, and networks of about as many weights, among them the
# perceptrons of 10 units that were published. LeNets are those of sweeps/smaller.py at these d.
PARTS = {
    "mlp-mnist": (
        "mlp",
        "mnist",
        ("850", "1200", "2500", "7960"),
        ("mlp-1", "mlp-3", "mlp-5", "mlp-10"),
    ),
    "mlp-cifar10": (
        "minut-mlp",
        "cifar10",
        ("2500", "6500", "12000", "23640"),
        ("minut-mlp-1", "minut-mlp-2", "minut-mlp-5", "minut-mlp-10"),
    ),
    "lenet-mnist": (
        "lenet",
        "mnist",
        ("500", "1500", "5000", "10000"),
        (
            "lenet-k5-1-1-10-7",
            "lenet-k3-1-1-9-6",
            "lenet-k3-1-2-15-11",
            "lenet-k5-1-2-19-13",
            "lenet-k3-1-3-29-20",
            "lenet-k5-1-4-36-25",
        ),
    ),
    "lenet-cifar10": (
        "minut-lenet",
        "cifar10",
        ("1500", "5000", "10000", "20000"),
        (
            "minut-lenet-k3-1-2-15-11",
            "minut-lenet-k5-1-2-19-13",
            "minut-lenet-k3-1-3-29-20",
            "minut-lenet-k5-1-4-35-25",
            "minut-lenet-k3-2-5-44-31",
            "minut-lenet-k5-2-6-49-34",
        ),
    ),
}


def _parts(epochs: int, seeds: int) -> dict[str, Sweep]:
    return {
        name: Sweep(
            Training(net=net, data=data, epochs=epochs),
            methods=("hash",),
            dims=dims,
            seeds=seeds,
            baseline_lrs=(0.003,),
            small=small,
        )
        for name, (net, data, dims, small) in PARTS.items()
    }


Experiment(
    name="minut-small-nets",
    title="Projections of MLPs and LeNets against small ordinary ones, at equal numbers",
    source=(
        "Minut 2023, supplement, figures 8 and 9: MLPs of 7.9k weights reach 91.6 % on MNIST, of "
        "23.5k 39.5 % on CIFAR-10; projections reach the same at d = 1.2k and 6.5k"
    ),
    differences=(
        "Published accuracies are of the validation part, ours of the test set; hash, one d for "
        "the whole network; the widths of small networks are those of the large one times a "
        "factor; a one-cycle schedule, one learning rate for networks. quick: 2 epochs, one seed; "
        "full: 10 epochs, 3 seeds."
    ),
    published={
        "mlp-mnist": (
            Published("Minut 2023, 10 units", (7960,), (0.916,), method="full"),
            Published("Minut 2023, projection", (1200,), (0.916,), method="hash"),
        ),
        "mlp-cifar10": (
            Published("Minut 2023, 10 units", (23_640,), (0.395,), method="full"),
            Published("Minut 2023, projection", (6500,), (0.395,), method="hash"),
        ),
    },
    sweeps={"quick": _parts(2, 1), "full": _parts(10, 3)},
)
