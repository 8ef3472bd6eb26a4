"""Butterflies (a, b) → (a + b, a − b) inside a tile, along its last dimension."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(x, H: tl.constexpr):
    """Elements i and i + H of every 2H in a row, as two tensors of shape (pairs / H, H)."""
    pairs = tl.reshape(x, (x.numel // (2 * H), 2, H))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def merge(a, b, SHAPE: tl.constexpr):
    """The inverse of :func:`halves`."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), SHAPE)


@triton.jit
def walsh_hadamard(x, LOG: tl.constexpr):
    """All levels on rows of 2^LOG elements, not scaled."""
    for level in tl.static_range(LOG):
        a, b = halves(x, 1 << level)
        x = merge(a + b, a - b, x.shape)
    return x
