"""Launching a kernel: how integers are handed over."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

# Numbers that change from call to call: a kernel must not be compiled again for each, as Triton
# does by default for 1 and for multiples of 16.
_CHANGING = """
    n d size start begin end first last lead rows blocks s column copies depth stride trips most
    scale factor top step tag k0 k1
"""
kernel = triton.jit(do_not_specialize=_CHANGING.split())


# A kernel as it is launched: it, warps, arguments that are floats or other pointers, constants.
Case = tuple[Any, int, dict[str, str], dict[str, Any]]


def word(value: int) -> int:
    """Return the signed integer with the bits of one in [0, 2³²), so that it is always int32."""
    return value - (1 << 32) if value >> 31 else value


def counter(p: Any, step: Tensor) -> tuple[int, int, int, int]:
    """Return what Philox needs beside the call and the column: step, tag and key."""
    source = p.source
    step_, tag, k0, k1 = (word(value) for value in (int(step), source.tag, *source.key))
    return step_, tag, k0, k1
