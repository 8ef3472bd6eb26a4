"""A uniform quantiser: w ≈ Δ q, with one step Δ and integers q, the levels.

A step is a bfloat16, two bytes, so that there are few to choose from; Δ q is one product, rounded
once, and so the same on every machine.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from subspan.coding.levels import LARGEST, Levels, coded_bits
from subspan.errors import SubspanError

_SMALLEST, _LARGEST = 0x0080, 0x7F7F  # bfloat16 as integers: the normal numbers, in their order


def choose_step(w: Tensor, bits: float) -> float:
    """Return the finest step with which coordinates take at most so many bits each.

    What is counted is the length of the code that :func:`subspan.coding.encode_levels` makes.

    Args:
        w: the coordinates, (d,).
        bits: for each coordinate, positive; a fraction, too.

    Returns:
        Δ, a positive bfloat16.

    Raises:
        SubspanError: if ``bits`` is not positive or leaves nothing, or a coordinate is not finite.
    """
    if not 0 < bits < float("inf"):
        raise SubspanError(f"bits must be a positive number of bits a coordinate, got {bits}")
    largest = float(w.abs().max()) if w.numel() else 0.0
    fine, coarse = _SMALLEST - 1, _LARGEST
    while coarse - fine > 1:
        middle = (fine + coarse) // 2
        step = bfloat16(middle)
        fits = largest / step < LARGEST
        if fits and coded_bits(round_to_levels(w, step)) <= bits * w.numel():
            coarse = middle
        else:
            fine = middle
    step = bfloat16(coarse)
    if largest and not round_to_levels(w, step).any():
        raise SubspanError("with so few bits every coordinate becomes zero: give more")
    return step


def round_to_levels(w: Tensor, step: float) -> Levels:
    """Return the nearest levels of coordinates, (d,); halves go to the even one.

    Raises:
        SubspanError: if a coordinate is not finite.
    """
    if not bool(torch.isfinite(w).all()):
        raise SubspanError("coordinates that are not finite cannot be quantised")
    exact = w.detach().to("cpu", torch.float64).numpy()
    return np.rint(exact / step).astype(np.int64)


def from_levels(levels: Levels, step: float, dtype: torch.dtype) -> Tensor:
    """Return Δ q, (d,): both factors and the product are of this dtype."""
    return torch.from_numpy(levels).to(dtype) * torch.tensor(step, dtype=dtype, device="cpu")


def find_grid(w: Tensor) -> float | None:
    """Return the step of which all coordinates are multiples already; None if there is none.

    It is found in the numbers themselves, so that what was quantised once, by training or by a
    file, stays as it is.
    """
    sizes = w.detach().abs()
    sizes = sizes[sizes > 0]
    if not sizes.numel() or not bool(torch.isfinite(sizes).all()):
        return None
    least = float(sizes.min())
    for level in range(1, 17):  # of the smallest coordinate
        step = float(torch.tensor(least / level, dtype=torch.float32, device="cpu").bfloat16())
        if not step or float(sizes.max()) / step > LARGEST:
            continue
        if torch.equal(from_levels(round_to_levels(w, step), step, w.dtype), w.detach().cpu()):
            return step
    return None


def bfloat16(pattern: int) -> float:
    """Return the number that 16 bits stand for."""
    return float(np.array(pattern << 16, np.uint32).view(np.float32))


def pattern_of(step: float) -> int:
    """Return the 16 bits of a step."""
    return int(np.array(step, np.float32).view(np.uint32)) >> 16
