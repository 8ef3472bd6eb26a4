"""Small ordinary networks, to hold projections against: what do as many weights reach alone?

Source: Minut 2023, supplement, figures 8 and 9: perceptrons by width, and LeNets by kernel,
channels and width, beside projections of as many coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from subspan.errors import SubspanError
from subspan.training import nets, tasks
from subspan.training.config import Sweep
from subspan.training.tasks.classification import Classification

KERNELS = (3, 5)  # of LeNets


def smaller(
    name: str, numbers: Iterable[int], input_shape: nets.Shape = (1, 28, 28), classes: int = 10
) -> list[str]:
    """Names of networks of the same kind, the largest with at most so many weights each.

    All widths (channels of convolutions, units of hidden layers) are those of the network times one
    factor, at least 1; of a LeNet there is one with kernels of 3x3 and one of 5x5. Biases count
    among the weights. Small networks come first and none twice; there are none for numbers that not
    even networks of width 1 keep to, or that the network itself does not exceed. One without widths
    is refused.
    """
    whole = nets.widths(name)
    if whole is None:
        raise SubspanError(
            f"there are smaller networks of the kind of mlp and lenet only, not of {name!r}: name "
            "networks of your own"
        )
    size = nets.weights(name, input_shape, classes)
    found: dict[str, int] = {}
    for kernel in KERNELS if whole.channels else (whole.kernel,):
        family = replace(whole, kernel=kernel)
        for wanted in numbers:
            if wanted >= size:
                continue
            # The count grows with the factor: half the interval until no width changes in it.
            low, high = 0.0, 1.0
            while _scaled(family, low) != _scaled(family, high) and high - low > 1e-6:
                middle = (low + high) / 2
                count = nets.weights(_scaled(family, middle).name, input_shape, classes)
                low, high = (middle, high) if count <= wanted else (low, middle)
            best = _scaled(family, low).name
            count = nets.weights(best, input_shape, classes)
            if count <= wanted:
                found[best] = count
    return sorted(found, key=found.__getitem__)


def beside(sweep: Sweep) -> tuple[str, ...]:
    """Return networks that are smaller than a sweep's, of as many weights as its dims.

    That needs a task of image classification, and dims that are numbers.
    """
    dims = dict.fromkeys(dim for name in sweep.methods for dim in sweep.dims_of(name))
    try:
        numbers = [sum(map(int, dim.split("+"))) for dim in dims]
    except ValueError:
        raise SubspanError(
            f"--small auto needs dims that are numbers, got {', '.join(dims)}: name networks of "
            "your own"
        ) from None
    task = tasks.load(sweep.training, seed=0)
    if not isinstance(task, Classification):
        raise SubspanError("--small auto knows networks for images only: name your own")
    shape, classes = task.images.image_shape, task.images.classes
    return tuple(smaller(task.net, numbers, shape, classes))


def _scaled(whole: nets.Widths, factor: float) -> nets.Widths:
    """Return the network with all widths times a factor, at least 1."""

    def times(units: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(max(1, int(factor * n)) for n in units)

    return replace(whole, channels=times(whole.channels), dense=times(whole.dense))
