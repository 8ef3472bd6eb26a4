"""Li et al. 2018: the intrinsic dimension of LeNet on MNIST.

Source: Li, Farkhoor, Liu and Yosinski, "Measuring the intrinsic dimension of objective landscapes",
ICLR 2018, section 3 and supplement; code at github.com/uber-research/intrinsic-dimension.
"""

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

DIMS = ("50", "100", "200", "290", "500", "1000", "5000")

Experiment(
    name="li-mnist-lenet",
    title="Intrinsic dimension of LeNet (44,426 weights) on MNIST",
    source="Li, Farkhoor, Liu and Yosinski, ICLR 2018: d_int90 = 290 global, 275 local",
    differences=(
        "Initial weights uniform at the scale of PyTorch's layers (published: he_normal); no L2 "
        "penalty (published: 1e-4); a one-cycle schedule; learning rate chosen per d on a "
        "validation part of 5,000 training images, on which the best epoch is chosen, too. "
        "Hash (published: fastfood; li-mnist-fc has both, which agree). quick: 3 epochs, one "
        "seed; full: 10 epochs (published: 100, at a constant rate), the published 3 seeds."
    ),
    published=(
        Published(
            "Li 2018, fastfood",
            dims=(100, 200, 500, 1000, 5000),
            accuracy=(0.763, 0.864, 0.939, 0.963, 0.983),
            baseline=0.991,
            d_int=290,
        ),
    ),
    sweeps={
        "quick": Sweep(
            Training(net="lenet-valid", data="mnist", epochs=3),
            methods=("hash",),
            dims=DIMS,
            baseline_lrs=(0.003,),
        ),
        "full": Sweep(
            Training(net="lenet-valid", data="mnist", epochs=10),
            methods=("hash",),
            dims=DIMS,
            seeds=3,
            baseline_lrs=(0.001, 0.003),
        ),
    },
)
