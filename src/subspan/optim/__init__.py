"""Optimizers over the ordinary parameters of a network."""

from subspan.optim.dlrt import DLRT
from subspan.optim.journal import replay
from subspan.optim.quantiser import Quantiser
from subspan.optim.random_bases import RandomBases

__all__ = ["DLRT", "Quantiser", "RandomBases", "replay"]
