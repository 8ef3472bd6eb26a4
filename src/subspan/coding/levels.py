"""Integers around zero, as few bytes: their signs, and how large they are.

A level q is coded as the number of binary digits n of |q| (0 for q = 0), in unary, then its digits
after the first, and its sign. The chances of n, and of the first three digits, adapt; all other
bits are even. No shape of the distribution is assumed but that it has no preferred sign.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from subspan.coding.arithmetic import MOST_BITS, BitDecoder, BitEncoder

LARGEST = (1 << 24) - 1  # of |q|: exact in float32
DIGITS = 3  # after the first that have chances of their own

Levels = NDArray[np.int64]


def encode_levels(levels: Levels) -> bytes:
    """Return the bytes of some levels, |q| < 2²⁴; their number is not among them."""
    encoder = BitEncoder()
    for level in levels.tolist():
        _put(abs(level), encoder)
        if level:
            encoder.put(int(level < 0))
    return encoder.finish()


def decode_levels(data: bytes, number: int) -> Levels:
    """Return the levels of :func:`encode_levels`.

    Raises:
        ValueError: for bytes that no levels have, and for more levels than bytes can hold.
    """
    if number > MOST_BITS * 8 * (len(data) + 2):
        raise ValueError(f"{len(data)} bytes cannot hold {number} levels")
    decoder = BitDecoder(data)
    return np.array([_get(decoder) for _ in range(number)], np.int64)


def coded_bits(levels: Levels) -> float:
    """Return the length that :func:`encode_levels` comes to, but for rounding, in bits.

    It depends on how often each level is there alone, and not on their order.
    """
    sizes = np.abs(levels)
    digits = np.frexp(sizes)[1]
    often = np.bincount(digits, minlength=1)
    bits = float(often[1:].sum())  # signs
    for n, times in enumerate(often.tolist()):
        bits += _cost(times, int(often[n + 1 :].sum()))
        adaptive = max(min(n - 1, DIGITS), 0)
        bits += times * max(n - 1 - DIGITS, 0)
        heads = sizes[digits == n] >> max(n - 1 - DIGITS, 0)
        counts = np.bincount(heads, minlength=2 << adaptive)[1 << adaptive :]
        while len(counts) > 1:  # from the last of these digits to the first
            pairs = counts.reshape(-1, 2)
            bits += sum(_cost(zeros, ones) for zeros, ones in pairs.tolist())
            counts = pairs.sum(axis=1)
    return bits


def _cost(zeros: int, ones: int) -> float:
    """Return the bits of so many zeros and ones by the chances of Krichevsky and Trofimov."""
    gamma = math.lgamma
    nats = math.log(math.pi) + gamma(zeros + ones + 1) - gamma(zeros + 0.5) - gamma(ones + 0.5)
    return nats / math.log(2)


def _put(size: int, encoder: BitEncoder) -> None:
    digits = size.bit_length()
    for n in range(digits):
        encoder.put(1, ("digits", n))
    encoder.put(0, ("digits", digits))
    for place in range(digits - 2, -1, -1):
        encoder.put(size >> place & 1, _context(digits, place, size >> place + 1))


def _get(decoder: BitDecoder) -> int:
    digits = 0
    while decoder.get(("digits", digits)):
        digits += 1
        if digits > LARGEST.bit_length():
            raise ValueError("a level is too large")
    size = int(digits > 0)
    for place in range(digits - 2, -1, -1):
        size = size << 1 | decoder.get(_context(digits, place, size))
    return -size if size and decoder.get() else size


def _context(digits: int, place: int, before: int) -> Hashable:
    """Return the context of a digit: those before it, if these are few."""
    return (digits, before) if digits - 2 - place < DIGITS else None
