"""Optimizers over the ordinary parameters of a network."""

from subspan.optim.journal import replay
from subspan.optim.random_bases import RandomBases

__all__ = ["RandomBases", "replay"]
