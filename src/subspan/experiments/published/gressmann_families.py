"""Gressmann 2020: which family of bases learns how well at d = 250, redrawn at every step.

Source: Gressmann, Eaton-Rosen and Luschi, "Improving neural network training in low dimensional
random bases", NeurIPS 2020, table 1, whose bases are dense. A step of signs or normals costs D·d
twice, a step of ``hash`` D and of ``fastfood`` D log d: this asks what that saves in accuracy.
"""

from subspan.experiments import Experiment
from subspan.training.config import Sweep, Training

FAMILIES = ("rademacher", "hash", "fastfood")
PARTS: dict[str, tuple[int, tuple[float, ...]]] = {  # epochs, rates
    "fc-mnist": (3, (1.0, 2.0, 4.0, 8.0)),
    "cnn-mnist": (1, (2.0, 4.0, 8.0)),
    "cnn-cifar10": (1, (1.0, 2.0, 4.0, 8.0)),
    "fc-mnist-fpd": (3, (4.0,)),
}


def _sweep(part: str, family: str, epochs: int, seeds: int, lrs: tuple[float, ...]) -> Sweep:
    net, data, *fixed = part.split("-")
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
        methods=tuple(fixed) or ("rbd",),
        dims=("250",),
        seeds=seeds,
        lrs=lrs,
        options={"distribution": family},
        baseline=None,
    )


Experiment(
    name="gressmann-families",
    title="Families of bases, redrawn (RBD) and fixed (FPD), d = 250",
    source="Gressmann, Eaton-Rosen and Luschi, NeurIPS 2020, table 1: 100 epochs",
    differences=(
        "The networks and recipes of gressmann-table1, short; unit columns of signs, of hash and "
        "of fastfood. The rate of each family is the best of three or four by the validation score "
        "of seed 0; at rate 8 the CNN's loss does not stay finite. quick: FC on MNIST, one epoch, "
        "one seed; full: three epochs of FC and one of each CNN, three seeds; of fixed bases, "
        "three epochs of FC on MNIST at rate 4."
    ),
    published={},
    sweeps={
        "quick": {
            f"fc-mnist-{family}": _sweep("fc-mnist", family, 1, 1, (4.0,)) for family in FAMILIES
        },
        "full": {
            f"{part}-{family}": _sweep(part, family, epochs, 3, lrs)
            for part, (epochs, lrs) in PARTS.items()
            for family in FAMILIES
        },
    },
)
