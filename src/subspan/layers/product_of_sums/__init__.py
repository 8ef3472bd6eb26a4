"""Layers whose weight is a product of sums of fixed matrices, W = Πᵢ Σⱼ fᵢ(aᵢⱼ) Mᵢⱼ.

Source: Wu, "ProdSumNet: reducing model parameters in deep neural networks via product-of-sums
matrix decompositions", arXiv 1809.02209, 2018. Only the coefficients a are trained and stored; the
fixed matrices come from the seed (:mod:`subspan.layers.atoms`).

A product F₁ F₂ … F_k x can be formed in many orders: all factors first, then x; x through one after
the other; or anything between. :func:`plan_product` finds the one with the fewest multiply-adds for
the batch at hand, by dynamic programming over the chain.
"""

from subspan.layers.product_of_sums.conv import ProductOfSumsConv2d
from subspan.layers.product_of_sums.factors import parse_factor
from subspan.layers.product_of_sums.layer import ProductOfSums
from subspan.layers.product_of_sums.linear import ProductOfSumsLinear
from subspan.layers.product_of_sums.order import plan_product
from subspan.layers.product_of_sums.replace import product_of_sums

__all__ = [
    "ProductOfSums",
    "ProductOfSumsConv2d",
    "ProductOfSumsLinear",
    "parse_factor",
    "plan_product",
    "product_of_sums",
]
