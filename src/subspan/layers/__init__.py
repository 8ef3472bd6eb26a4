"""Layers whose weights are made of fewer numbers, and how to put them into a network."""

from subspan.layers import recipes
from subspan.layers.factorize import factorize, merge
from subspan.layers.fit import approximate, carry_over, fit, grow
from subspan.layers.lowrank import LowRank, LowRankConv2d, LowRankLinear
from subspan.layers.product_of_sums import (
    ProductOfSums,
    ProductOfSumsConv2d,
    ProductOfSumsLinear,
    product_of_sums,
)
from subspan.layers.spectral import SpectralFilters

__all__ = [
    "LowRank",
    "LowRankConv2d",
    "LowRankLinear",
    "ProductOfSums",
    "ProductOfSumsConv2d",
    "ProductOfSumsLinear",
    "SpectralFilters",
    "approximate",
    "carry_over",
    "factorize",
    "fit",
    "grow",
    "merge",
    "product_of_sums",
    "recipes",
]
