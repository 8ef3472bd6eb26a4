"""An arithmetic coder of bits, in integers, with chances that adapt to what was coded.

Source: Martin, "Range encoding", 1979, one bit at a time as in LZMA. A chance is the estimate of
Krichevsky and Trofimov, "The performance of universal encoding", 1981: (ones + ½) / (bits + 1),
which costs at most ½ log₂ n + 1 bits more than the best fixed chance of n bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

BYTES = 6  # of the interval
FULL, LEAST = 1 << 8 * BYTES, 1 << 8 * (BYTES - 1)
SCALE = 16  # bits of a chance
MOST_BITS = 1 << SCALE  # that a bit of the code can hold: no chance is above 1 - 2⁻¹⁶


class Chances:
    """The numbers of zeros and ones that each context has had."""

    def __init__(self) -> None:
        self._counts: defaultdict[Hashable, list[int]] = defaultdict(lambda: [0, 0])

    def of_one(self, context: Hashable) -> int:
        """Return the chance of a one, in 1/2¹⁶, from 1 to 2¹⁶ - 1."""
        zeros, ones = self._counts[context]
        chance = ((2 * ones + 1) << SCALE) // (2 * (zeros + ones) + 2)
        return min(max(chance, 1), (1 << SCALE) - 1)

    def count(self, context: Hashable, bit: int) -> None:
        """Take note of a bit."""
        self._counts[context][bit] += 1


EVEN = 1 << SCALE - 1  # the chance of a bit without a context


class BitEncoder:
    """Bits into bytes."""

    def __init__(self) -> None:
        self._low, self._width, self._out, self._chances = 0, FULL, bytearray(), Chances()

    def put(self, bit: int, context: Hashable = None) -> None:
        """Code a bit; without a context both are equally likely."""
        chance = EVEN if context is None else self._chances.of_one(context)
        ones = (self._width >> SCALE) * chance
        if bit:
            self._width = ones
        else:
            self._low, self._width = self._low + ones, self._width - ones
        if context is not None:
            self._chances.count(context, bit)
        if self._low >= FULL:
            self._low -= FULL
            self._carry()
        while self._width < LEAST:
            self._out.append(self._low >> 8 * (BYTES - 1))
            self._low, self._width = (self._low << 8) % FULL, self._width << 8

    def _carry(self) -> None:
        place = len(self._out) - 1
        while self._out[place] == 255:
            self._out[place] = 0
            place -= 1
        self._out[place] += 1

    def finish(self) -> bytes:
        """Return the shortest bytes from which all bits come back."""
        for size in range(BYTES + 1):
            unit = 1 << 8 * (BYTES - size)
            value = -(-self._low // unit) * unit
            if value < self._low + self._width:
                break
        if value >= FULL:
            value -= FULL
            self._carry()
        return bytes(self._out + value.to_bytes(BYTES, "big")).rstrip(b"\0")


class BitDecoder:
    """Bytes of :class:`BitEncoder` into bits; after their end, zeros."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place, self._width, self._chances = data, BYTES, FULL, Chances()
        self._value = int.from_bytes(data[:BYTES].ljust(BYTES, b"\0"), "big")

    def get(self, context: Hashable = None) -> int:
        """Return the next bit."""
        chance = EVEN if context is None else self._chances.of_one(context)
        ones = (self._width >> SCALE) * chance
        bit = int(self._value < ones)
        if bit:
            self._width = ones
        else:
            self._value, self._width = self._value - ones, self._width - ones
        if context is not None:
            self._chances.count(context, bit)
        while self._width < LEAST:
            following = self._data[self._place] if self._place < len(self._data) else 0
            self._value, self._width = self._value << 8 | following, self._width << 8
            self._place += 1
        return bit
