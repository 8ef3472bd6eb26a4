"""Layers whose weights are made of fewer numbers, and how to put them into a network."""

from subspan.layers.factorize import factorize, merge
from subspan.layers.lowrank import LowRank, LowRankConv2d, LowRankLinear

__all__ = ["LowRank", "LowRankConv2d", "LowRankLinear", "factorize", "merge"]
