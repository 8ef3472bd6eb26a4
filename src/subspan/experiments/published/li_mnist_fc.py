"""Li et al. 2018: the intrinsic dimension of a fully connected network on MNIST.

Source: Li, Farkhoor, Liu and Yosinski, "Measuring the intrinsic dimension of objective landscapes",
ICLR 2018, section 2.1; code at github.com/uber-research/intrinsic-dimension.
"""

from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

DIMS = ("10", "50", "100", "300", "500", "750", "1000", "2000")
NET = "mlp-200-200"

Experiment(
    name="li-mnist-fc",
    title="Intrinsic dimension of a fully connected network (199,210 weights) on MNIST",
    source="Li, Farkhoor, Liu and Yosinski, ICLR 2018: d_int90 = 750",
    differences=(
        "Initial weights uniform at the scale of PyTorch's layers (published: he_normal); no L2 "
        "penalty (published: 1e-5); a one-cycle schedule; learning rate chosen per d on a "
        "validation part of 5,000 training images, on which the best epoch is chosen, too. "
        "quick: 3 epochs, one seed, hash only; full: 10 epochs (published: 100, at a constant "
        "rate), the published 3 seeds, hash and fastfood."
    ),
    published=(
        Published(
            "Li 2018, fastfood",
            dims=(10, 50, 100),
            accuracy=(0.175, 0.451, 0.593),
            baseline=0.981,
            d_int=750,
        ),
    ),
    sweeps={
        "quick": Sweep(
            Training(net=NET, data="mnist", epochs=3),
            methods=("hash",),
            dims=DIMS,
            baseline_lrs=(0.003,),
        ),
        "full": Sweep(
            Training(net=NET, data="mnist", epochs=10),
            methods=("hash", "fastfood"),
            dims=DIMS,
            seeds=3,
            baseline_lrs=(0.001, 0.003),
        ),
    },
)
