"""Li et al. 2018: the intrinsic dimension of remembering labels that say nothing of the images.

Source: Li, Farkhoor, Liu and Yosinski, "Measuring the intrinsic dimension of objective landscapes",
ICLR 2018, section 3.2; code at github.com/uber-research/intrinsic-dimension, whose scripts go
through networks of 1 to 5 layers and up to 400 units, 500 epochs at d from 1,000 to 300,000.
"""

from subspan.experiments import Experiment
from subspan.training.config import Sweep, Training

TASK = "subspan.training.tasks.shuffled_labels:task"
NET = "mlp" + "-400" * 5

Experiment(
    name="li-shuffled-labels",
    title="Remembering shuffled labels of MNIST, five layers of 400 units (959,610 weights)",
    source=(
        "Li, Farkhoor, Liu and Yosinski, ICLR 2018: d_int90 of training accuracy is 190,000 for "
        "the shuffled labels of all training images, 90,000 for those of a tenth of them"
    ),
    differences=(
        "Fewer images, so that two cores end it; a one-cycle schedule, fewer epochs, no L2 "
        "penalty; hash (published: fastfood). The score is of the images that are trained on, and "
        "learning rate and epoch are chosen by it. quick: 1,000 images, 100 epochs, one seed; "
        "full: 5,000 images (about the published tenth), 200 epochs (published: 500), 3 seeds."
    ),
    published=(),
    sweeps={
        "quick": Sweep(
            Training(task=TASK, net=NET, data="mnist[:1000]", epochs=100, init="seed"),
            methods=("hash",),
            dims=("100", "300", "1000", "3000", "10000"),
            baseline_lrs=(0.001,),
        ),
        "full": Sweep(
            Training(task=TASK, net=NET, data="mnist[:5000]", epochs=200, init="seed"),
            methods=("hash",),
            dims=("1000", "3000", "10000", "30000"),
            seeds=3,
            baseline_lrs=(0.001,),
        ),
    },
)
