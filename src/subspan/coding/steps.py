"""A uniform quantiser: w ≈ Δ q, with one step Δ and integers q, the levels.

A step is a bfloat16, two bytes, so that there are few to choose from; Δ q is one product, rounded
once, and so the same on every machine.
"""

from __future__ import annotations

from numbers import Real

import numpy as np
import torch
from torch import Tensor

from subspan.coding.levels import LARGEST, Levels, coded_bits
from subspan.errors import SubspanError

_SMALLEST, _LARGEST = 0x0080, 0x7F7F  # bfloat16 as integers: the normal numbers, in their order
_FEW = 64  # coordinates that rule out most grids


def choose_step(w: Tensor, bits: float) -> float:
    """Return the finest step Δ, a bfloat16, with which coordinates take at most so many bits each.

    What is counted is the length of the code that :func:`subspan.coding.encode_levels` makes; a
    fraction of a bit counts, too.

    Raises:
        SubspanError: if ``bits`` is not positive or leaves nothing, a coordinate is not finite, or
            the coordinates are so small or so large that no step is.
    """
    check_bits(bits)
    _check_finite(w)
    fine, coarse = _SMALLEST - 1, _LARGEST
    while coarse - fine > 1:
        middle = (fine + coarse) // 2
        if fits(w, bfloat16(middle), bits):
            coarse = middle
        else:
            fine = middle
    step, largest = bfloat16(coarse), _largest(w)
    if not largest:
        return step
    none = coarse == _SMALLEST or largest / step > LARGEST
    if none or not _are_finite(from_levels(levels := round_to_levels(w, step), step, w.dtype)):
        raise SubspanError(
            f"coordinates of up to {largest:.2g} fit no step, which is a number from "
            f"{bfloat16(_SMALLEST):.2g} to {bfloat16(_LARGEST):.2g}: save without bits"
        )
    if not levels.any() or not fits(w, step, bits):
        raise SubspanError("with so few bits every coordinate becomes zero: give more")
    return step


def check_bits(bits: float) -> None:
    """Refuse what is no number of bits a coordinate: it is positive and finite."""
    if not isinstance(bits, Real) or not 0 < bits < float("inf"):
        raise SubspanError(f"bits must be a positive number of bits a coordinate, got {bits!r}")


def fits(w: Tensor, step: float, bits: float) -> bool:
    """Return whether coordinates, which are finite, take at most so many bits each when coded."""
    if _largest(w) / step > LARGEST:
        return False
    return coded_bits(round_to_levels(w, step)) <= bits * w.numel()


def round_to_levels(w: Tensor, step: float) -> Levels:
    """Return the nearest levels of finite coordinates, (d,); halves go to the even one."""
    _check_finite(w)
    exact = w.detach().to("cpu", torch.float64).numpy()
    return np.rint(exact / step).astype(np.int64)


def from_levels(levels: Levels, step: float, dtype: torch.dtype) -> Tensor:
    """Return Δ q, (d,): both factors and the product are of this dtype."""
    return torch.from_numpy(levels).to(dtype) * torch.tensor(step, dtype=dtype, device="cpu")


def find_grid(w: Tensor) -> float | None:
    """Return the step of which all coordinates are multiples already; None if there is none.

    It is found in the numbers themselves, so that what was quantised once, by training or by a
    file, stays as it is. Of several steps it is the coarsest.
    """
    sizes = w.detach().abs().cpu().unique()  # in their order
    sizes = sizes[sizes > 0]
    if not sizes.numel() or not _are_finite(sizes):
        return None
    least, largest = float(sizes[0]), float(sizes[-1])
    coarse, fine = (pattern_of(min(x, bfloat16(_LARGEST))) for x in (least, largest / LARGEST))
    steps = [bfloat16(pattern) for pattern in range(coarse, max(fine, _SMALLEST) - 1, -1)]
    some = torch.tensor(steps, dtype=w.dtype, device="cpu")
    few = sizes[:_FEW, None]
    levels = (few.double() / some.double()).round().to(w.dtype)
    for step in some[(levels * some == few).all(0)].tolist():
        if largest / step <= LARGEST and torch.equal(
            from_levels(round_to_levels(sizes, step), step, w.dtype), sizes
        ):
            return step
    return None


def _largest(w: Tensor) -> float:
    return float(w.detach().abs().max()) if w.numel() else 0.0


def _are_finite(w: Tensor) -> bool:
    return bool(torch.isfinite(w).all())


def _check_finite(w: Tensor) -> None:
    if not _are_finite(w):
        raise SubspanError("coordinates that are not finite cannot be quantised")


def bfloat16(pattern: int) -> float:
    """Return the number that 16 bits stand for."""
    return float(np.array(pattern << 16, np.uint32).view(np.float32))


def pattern_of(step: float) -> int:
    """Return the 16 bits of a step."""
    return int(np.array(step, np.float32).view(np.uint32)) >> 16
