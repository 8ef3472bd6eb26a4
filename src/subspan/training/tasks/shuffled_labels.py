"""Images with labels that say nothing of them: how many numbers does it take to remember?

Source: Li, Farkhoor, Liu and Yosinski, ICLR 2018, section 3.2, after Zhang et al., ICLR 2017.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from subspan.errors import SubspanError
from subspan.training import data as sets
from subspan.training.data.order import LABELS, permutation
from subspan.training.score import Score
from subspan.training.tasks.classification import Classification


class ShuffledLabels(Classification):
    """Training images whose labels have changed places; the score is the share remembered.

    There is nothing to be told of other images, so that choices and the score at the end are of
    the images that are trained on.
    """

    score = Score("training accuracy")

    def count_mistakes(self, net: nn.Module) -> tuple[int, int]:
        """Refuse: the parts are one, and there is no other image whose label follows."""
        raise SubspanError(
            "shuffled labels have no test error to bound: all parts are the images that were "
            "trained on"
        )


def task(net: str = "mlp", data: str = "mnist", seed: int = 0) -> ShuffledLabels:
    """Make the task of all images of a set ("mnist"), or of some ("mnist[:5000]").

    The seed draws the labels, and which images are taken.
    """
    name, some, rest = data.partition("[:")
    images = sets.load(name, validation=0, seed=seed)
    total = len(images.train)
    text = rest.removesuffix("]") if some else str(total)
    if not text.isdecimal() or not 0 < int(text) <= total:
        raise SubspanError(
            f"{name} has {total:,} training images: expected {name}[:N] with N of 1 to that, "
            f"got {data}"
        )
    count = int(text)
    order = permutation(total, seed=seed, stream=LABELS)
    chosen, labels = order[:count].sort().values, images.train.labels[order[:count]]
    # Drawn in a random order, and the images sorted: each gets the label of any of them.
    part = sets.Split(images.train.images[chosen], labels)
    everything = replace(images, train=part, validation=part, test=part)
    return ShuffledLabels(everything, net)
