"""Thousands of variants of one network at a time: each is a vector of coordinates in memory.

A variant takes d numbers, and what was trained fully. θ of the variant in use is formed once; a
batch may have rows of many variants.
"""

from subspan.variants.variants import Variants

__all__ = ["Variants"]
