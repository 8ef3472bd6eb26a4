"""Layers whose weights are made of fewer numbers, and how to put them into a network."""

from subspan.layers import recipes
from subspan.layers.factorize import factorize
from subspan.layers.fit import approximate, carry_over, fit, grow
from subspan.layers.lowrank import LowRank, LowRankConv2d, LowRankLinear
from subspan.layers.merge import merge
from subspan.layers.product_of_sums import (
    ProductOfSums,
    ProductOfSumsConv2d,
    ProductOfSumsLinear,
    product_of_sums,
)
from subspan.layers.protocol import Compressed, compressed_layers, layer_types
from subspan.layers.replace import replace_layers
from subspan.layers.spectral import SpectralFilters

__all__ = [
    "Compressed",
    "LowRank",
    "LowRankConv2d",
    "LowRankLinear",
    "ProductOfSums",
    "ProductOfSumsConv2d",
    "ProductOfSumsLinear",
    "SpectralFilters",
    "approximate",
    "carry_over",
    "compressed_layers",
    "factorize",
    "fit",
    "grow",
    "layer_types",
    "merge",
    "product_of_sums",
    "recipes",
    "replace_layers",
]
