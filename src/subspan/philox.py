"""Philox4x32-10: the definition of every random number that subspan draws.

A counter-based generator is a function, not a state: 128 bits of counter and 64 bits of key
give 128 random bits, in any order, on any device, by any number of threads.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

The counter layout is a file format (``docs/format.md``): whatever changes here changes every
model that was ever stored as a seed and its coordinates.

    key      = (seed mod 2³², seed div 2³²)
    counter  = (index, column, step, stream · 2⁸ + domain)

All arithmetic is on int64 tensors that hold unsigned 32-bit words: it is exact, and the same on
every backend. Only :meth:`Source.normals` leaves the integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from subspan.errors import SubspanError, is_integer

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and √3 − 1: the key's increments
FEISTEL_ROUNDS = 8
FEISTEL_ROUNDS_SMALL = 32  # up to 2⁵ elements: halves of 1 to 3 bits mix slowly
MASK = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds of Philox on four words, int64 tensors of one broadcast shape.

    Each word is in [0, 2³²), as are both of the key.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The 64-bit product wraps to a negative int64 at times; its bits are right all the same.
        # The mask takes exactly the 32 that the shift has brought down, and nothing of what words 1
        # and 3 still have above theirs: they need no mask before the end.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = p1 >> 32, p0 >> 32
        c0 ^= c1
        c0 ^= k0
        c0 &= MASK
        c2 ^= c3
        c2 ^= k1
        c2 &= MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


def mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser: the round function of the permutation."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


class Where(TypedDict, total=False):
    """Which sequence, and where it is computed: of column 0, step 0 and the CPU by default."""

    column: Tensor | int
    step: Tensor | int
    device: torch.device | str


@dataclass(frozen=True)
class Source:
    """One addressable sea of random words: seed, domain, stream fixed, index, column, step free.

    Everything is a *sequence* along ``index``; several sequences side by side are told apart by
    ``column``, and redrawn by ``step`` (:class:`Where`). Position n of a sequence does not depend
    on where a request starts or ends.

    Args:
        seed: in [0, 2⁶⁴).
        domain: what the numbers are for, in [0, 2⁸); every family has its own.
        stream: in [0, 2²⁴); compartments of one model have one each.
    """

    seed: int
    domain: int
    stream: int = 0

    def __post_init__(self) -> None:
        for name, bits in (("seed", 64), ("domain", 8), ("stream", 24)):
            if not is_integer(value := getattr(self, name), 0, (1 << bits) - 1):
                raise SubspanError(f"{name} must be an integer in [0, 2^{bits}), got {value!r}")

    @property
    def key(self) -> tuple[int, int]:
        """The two words of Philox's key."""
        return self.seed & MASK, self.seed >> 32

    @property
    def tag(self) -> int:
        """The fourth word of Philox's counter."""
        return self.stream << 8 | self.domain

    def words(self, index: Tensor, column: Tensor | int = 0, step: Tensor | int = 0) -> Words:
        """Compute the four words of calls; index, column and step are broadcast together."""
        rest = (
            torch.as_tensor(word, dtype=torch.int64, device=index.device)
            for word in (column, step, self.tag)
        )
        c0, c1, c2, c3 = torch.broadcast_tensors(index, *rest)
        return philox4x32((c0, c1, c2, c3), self.key)

    def _calls(
        self,
        start: int,
        stop: int,
        per_call: int,
        column: Tensor | int = 0,
        step: Tensor | int = 0,
        device: torch.device | str = "cpu",
    ) -> Words:
        """Compute the calls that cover positions [start, stop), ``per_call`` positions by each."""
        first, last = start // per_call, -(-stop // per_call)
        if last > 1 << 32:
            raise SubspanError(
                f"position {stop - 1} is past the end of a random sequence "
                f"({per_call} x 2^32 positions); use a network or dimension below that"
            )
        index = torch.arange(first, last, device=device)
        if isinstance(column, Tensor):
            index = index.reshape(-1, *[1] * column.dim())
        return self.words(index, column, step)

    def sequence(self, start: int, stop: int, **where: Unpack[Where]) -> Tensor:
        r"""Words start … stop−1: word n is word n mod 4 of call n div 4.

        Returns:
            int64 (stop − start, \*column.shape), in [0, 2³²).
        """
        call = torch.stack(self._calls(start, stop, 4, **where), dim=1).flatten(0, 1)
        return call[start % 4 :][: stop - start]

    def signbits(self, start: int, stop: int, **where: Unpack[Where]) -> Tensor:
        r"""Bits start … stop−1: bit n is bit n mod 32 of word (n mod 128) div 32 of call n div 128.

        Returns:
            int64 (stop − start, \*column.shape) of 0 (plus) and 1 (minus, as in IEEE 754).
        """
        words = torch.stack(self._calls(start, stop, 128, **where), dim=1)
        shifts = torch.arange(32, device=words.device).reshape(32, *[1] * (words.dim() - 2))
        bits = (words.unsqueeze(2) >> shifts & 1).flatten(0, 2)
        return bits[start % 128 :][: stop - start]

    def signs(
        self, start: int, stop: int, *, dtype: torch.dtype = torch.float32, **where: Unpack[Where]
    ) -> Tensor:
        """:meth:`signbits` as +1 and −1."""
        bits = self.signbits(start, stop, **where)
        return (1 - 2 * bits).to(dtype)

    def uniforms(
        self, start: int, stop: int, *, dtype: torch.dtype = torch.float32, **where: Unpack[Where]
    ) -> Tensor:
        """(2 (word div 2⁹) + 1) / 2²⁴: 24 bits, inside (0, 1), symmetric about ½.

        Both u and 2u − 1 are exact in float32, so no backend can round them differently.
        """
        words = self.sequence(start, stop, **where)
        return ((2 * (words >> 9) + 1).double() * 2.0**-24).to(dtype)

    def normals(
        self, start: int, stop: int, *, dtype: torch.dtype = torch.float32, **where: Unpack[Where]
    ) -> Tensor:
        """Standard normals by Box and Muller, eight of a call: word k holds numbers 2k and 2k + 1.

        z₂ₖ = ±√(−2 ln u) cos φ, z₂ₖ₊₁ = ±√(−2 ln u) sin φ. Of the word, the low 16 bits a make
        u = (2a + 1) / 2¹⁷, the next 14 bits b the angle φ = π(2b + 1) / 2¹⁶ in the first quadrant,
        bit 30 the sign of the cosine and bit 31 that of the sine (1 is minus). No normal exceeds
        4.86; all are evaluated in float64 and rounded once.
        """
        calls = torch.stack(self._calls(start, stop, 8, **where), dim=1).flatten(0, 1)
        radius = torch.sqrt(-2 * torch.log((2 * (calls & 0xFFFF) + 1).double() * 2.0**-17))
        angle = (2 * (calls >> 16 & 0x3FFF) + 1).double() * (math.pi * 2.0**-16)
        cosine = radius * torch.cos(angle) * (1 - 2 * (calls >> 30 & 1))
        sine = radius * torch.sin(angle) * (1 - 2 * (calls >> 31))
        normals = torch.stack((cosine, sine), dim=1).flatten(0, 1)
        return normals[start % 8 :][: stop - start].to(dtype)

    def integers(self, start: int, stop: int, bound: int, **where: Unpack[Where]) -> Tensor:
        """Integers in [0, bound): (word · bound) div 2³².

        A value's probability differs from 1/bound by less than 2⁻³²; ``bound`` is at most 2³¹.
        """
        if not 1 <= bound <= 1 << 31:
            raise SubspanError(f"bound must be in [1, 2^31], got {bound}")
        return self.sequence(start, stop, **where) * bound >> 32

    def permutation(
        self, size: int, *, column: Tensor | int = 0, step: Tensor | int = 0
    ) -> Permutation:
        """Return a keyed permutation of [0, size); its round keys are the sequence's first words.

        Their number is 8, or 32 for a size of at most 32. Of a size that is a power of 2, a vector
        of columns gives as many permutations at once, which map (n, 1) to (n, len(column)).
        """
        if isinstance(column, Tensor):
            keys = self.sequence(0, rounds(size), column=column, step=step, device=column.device)
            return Permutation(size, keys.unbind())
        keys = self.sequence(0, rounds(size), column=column, step=step)
        return Permutation(size, tuple(keys.tolist()))


def rounds(size: int) -> int:
    """Return the number of rounds, hence of keys, of a permutation of [0, size)."""
    return FEISTEL_ROUNDS if size > 32 else FEISTEL_ROUNDS_SMALL


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection of [0, size), evaluated at any index alone.

    A Feistel network on b = ⌈log₂ size⌉ bits, split into ⌈b/2⌉ high and ⌊b/2⌋ low bits: even rounds
    xor ``mix(low ^ key)`` into the high half, odd rounds ``mix(high ^ key)`` into the low half. An
    index that leaves [0, size) is sent through again until it is back (cycle walking: Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002); on average that is fewer than
    two passes.
    """

    size: int
    keys: tuple[int | Tensor, ...]

    @property
    def bits(self) -> tuple[int, int]:
        """Widths of the high and of the low half."""
        total = (self.size - 1).bit_length()
        return total - total // 2, total // 2

    def __call__(self, index: Tensor) -> Tensor:
        """Images of ``index`` (int64, any shape, values in [0, size))."""
        out = self._encrypt(index)
        while (outside := out >= self.size).any():
            out[outside] = self._encrypt(out[outside])
        return out

    def _encrypt(self, index: Tensor) -> Tensor:
        high_bits, low_bits = self.bits
        high, low = index >> low_bits, index & (1 << low_bits) - 1
        for number, key in enumerate(self.keys):
            if number % 2 == 0:
                high = high ^ mix(low ^ key) & (1 << high_bits) - 1
            else:
                low = low ^ mix(high ^ key) & (1 << low_bits) - 1
        return high << low_bits | low
