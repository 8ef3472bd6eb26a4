"""Wu 2018, table 1: ways to have fewer numbers in LeNet, at equal true counts.

Source: Wu, "ProdSumNet: reducing model parameters in deep neural networks via product-of-sums
matrix decompositions", arXiv 1809.02209, 2018, table 1, with numbers of Yang 2015 (Deep Fried
Convnets) and Zhou 2015 (KFC).
"""

from typing import Any

from subspan.bench.parts.sums import BIAS, CONVOLUTIONS, DENSE
from subspan.experiments import Experiment, Published
from subspan.training.config import Sweep, Training

# At most 34,152 numbers, what Adaptive Fastfood leaves of Caffe's LeNet: 25,570 of convolutions,
# 3,572 of the first dense layer (800 to 500, with biases), 5,010 of the last. Only the first dense
# layer differs (circulant blocks divide 500 and 800: 35,080 in all); `dlrt` and `subspace` are of
# the whole network.
FIRST: dict[str, tuple[Any, str]] = {  # factors of that layer, p
    "fastfood": ({"recipe": "adaptive_fastfood"}, "3072"),
    "kronecker": ({"recipe": "kronecker_fc", "rows": 25, "columns": 40, "terms": "p"}, "2"),
    "circulant": ({"recipe": "circulant", "block": "p"}, "100"),
    "low-rank": ({"recipe": "low_rank", "rank": "p"}, "2"),
    "random-projection": ({"recipe": "random_projection", "size": "p"}, "6"),
    "hash": ({"recipe": "hashed", "p": "p"}, "3072"),
    "rademacher": (
        [{"kind": "rademacher", "p": "p", "inner": 32}, {"kind": "rademacher", "p": "p"}],
        "1536",
    ),
}
PUBLISHED = {
    "fastfood": Published("Yang 2015, 1024 units", (38_821,), (0.9928,), labels=("3072",)),
    "kronecker": Published("Zhou 2015, KFC-II", (27_700,), (0.9924,), labels=("2",)),
    "sums": Published("Wu 2018, a larger LeNet", (3_554,), (0.9845,), labels=("665",)),
}


def _sweep(
    epochs: int,
    seeds: int,
    method: str,
    dims: tuple[str, ...],
    lr: float,
    baseline: bool = False,
    **options: Any,
) -> Sweep:
    return Sweep(
        Training(net="lenet5-caffe", data="mnist", epochs=epochs),
        methods=(method,),
        dims=dims,
        seeds=seeds,
        lrs=(lr,),
        options=options,
        baseline="full" if baseline else None,
        baseline_lrs=(0.001,),
    )


def _parts(epochs: int, seeds: int) -> dict[str, Sweep]:
    # Convolutions that stay learn with the sums, at a rate between what suits both.
    parts = {
        name: _sweep(
            epochs, seeds, "prodsum", (p,), 0.003, name == "fastfood", factors={"fc1": factors}
        )
        for name, (factors, p) in FIRST.items()
    }
    parts["dlrt"] = _sweep(epochs, seeds, "dlrt-ratio", ("0.921",), 0.002)
    parts["subspace"] = _sweep(epochs, seeds, "hash", ("3554", "34152"), 0.015)
    parts["subspace-rademacher"] = _sweep(epochs, seeds, "rademacher", ("3554",), 0.03)
    # At most 3,554, which all layers share.
    parts["sums"] = _sweep(
        epochs, seeds, "prodsum", ("665",), 0.03, factors=CONVOLUTIONS | DENSE, bias=BIAS
    )
    return parts


Experiment(
    name="prodsumnet-table1",
    title="Caffe's LeNet (431,080 weights) on MNIST at equal true counts",
    source=(
        "Wu 2018, table 1: Adaptive Fastfood with 1024 units 38,821 parameters, 0.72 % wrong "
        "(2048: 52,124, 0.73 %); KFC-II 27,700, 0.76 % (KFC-Combined 52,500, 0.57 %); ProdSumNet "
        "3,554, 1.55 %"
    ),
    differences=(
        "One network for all, 500 units; counts are of all numbers stored, with biases. Few "
        "epochs. quick: one epoch, one seed; full: three, three seeds."
    ),
    published={part: (curve,) for part, curve in PUBLISHED.items()},
    sweeps={"quick": _parts(1, 1), "full": _parts(3, 3)},
)
