"""Li et al. 2018: the intrinsic dimension of LeNet on CIFAR-10.

Source: Li, Farkhoor, Liu and Yosinski, "Measuring the intrinsic dimension of objective landscapes",
ICLR 2018, section 3.2 and supplement; code at github.com/uber-research/intrinsic-dimension.
"""

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

DIMS = ("500", "1000", "2900", "5000", "10000")

Experiment(
    name="li-cifar-lenet",
    title="Intrinsic dimension of LeNet (62,006 weights) on CIFAR-10",
    source=(
        "Li, Farkhoor, Liu and Yosinski, ICLR 2018: d_int90 = 2900 at a baseline of 58.4 %, 1000 "
        "if the baseline is taken as 50 %"
    ),
    differences=(
        "Initial weights uniform at the scale of PyTorch's layers (published: he_normal); no L2 "
        "penalty (published: 1e-4); a one-cycle schedule; learning rate chosen per d on a "
        "validation part of 4,167 training images, on which the best epoch is chosen, too. Direct "
        "training does better than published, so that 90 % of it is more to reach. quick: 3 "
        "epochs, one seed, hash only; full: 20 epochs (published: 100, at a constant rate), the "
        "published 3 seeds, hash only (published: fastfood)."
    ),
    published=(
        Published(
            "Li 2018, fastfood",
            dims=(500, 1000, 2900, 5000, 10000),
            accuracy=(0.384, 0.463, 0.534, 0.563, 0.598),
            baseline=0.584,
            d_int=2900,
        ),
    ),
    sweeps={
        "quick": Sweep(
            Training(net="lenet-valid", data="cifar10", epochs=3),
            methods=("hash",),
            dims=DIMS,
            baseline_lrs=(0.001, 0.003),
        ),
        "full": Sweep(
            Training(net="lenet-valid", data="cifar10", epochs=20),
            methods=("hash",),
            dims=DIMS,
            seeds=3,
            baseline_lrs=(0.001, 0.003),
        ),
    },
)
