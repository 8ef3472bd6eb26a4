"""Linear and convolutional layers whose weight is U S Vᵀ, never expanded.

Sources: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets: finding
efficient low-rank neural networks via matrix differential equations", NeurIPS 2022.

:mod:`subspan.layers.watched` holds what optimizers on the manifold need besides gradients.
"""

from subspan.layers.lowrank.conv import LowRankConv2d
from subspan.layers.lowrank.layer import LowRank
from subspan.layers.lowrank.linear import LowRankLinear

__all__ = ["LowRank", "LowRankConv2d", "LowRankLinear"]
