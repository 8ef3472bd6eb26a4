"""Schotthöfer 2022: what a step and inference cost by rank, on five layers of 5,120 units.

Source: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets", NeurIPS
2022, timings of the fully connected network.
"""

from subspan.bench import Bench
from subspan.experiments import Timing

RANKS = (5, 20, 80, 160, 320, 640)

Timing(
    name="dlrt-timing",
    title="Time of a training step and of inference against rank, five layers of 5,120",
    source=(
        "Schotthöfer et al., NeurIPS 2022, in seconds. Inference: dense 1.248; rank 5 0.247, 80 "
        "0.252, 320 0.329, 1280 0.797, 2560 1.430. Training step: dense 0.320; rank 5 0.072, 20 "
        "0.099, 80 0.199, 160 0.388, 320 0.855, 1280 7.6: it breaks even near rank 130"
    ),
    differences=(
        "One gradient a step (parallel integrator; published: three), SGD inside; as shares of the "
        "dense network's times in the same run. quick: up to rank 320."
    ),
    benches={
        "quick": Bench(parts=("lowrank",), width=5120, ranks=(20, 80, 320), batch_size=256),
        "full": Bench(parts=("lowrank",), width=5120, ranks=RANKS, batch_size=256, seconds=10.0),
    },
)
