"""docs/format.md a second time, in plain Python integers and floats, from that page alone.

Nothing here imports the package or torch: what these functions and the package agree on is what
the page says. Slow, for small cases only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

WORD = 2**32
SHUFFLE = (0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1, 0x27D4EB2F)
DOMAINS = {
    "gaussian": 1,
    "rademacher": 2,
    "hash": 3,
    "orthogonal": 4,
    "fastfood": 5,
    "kronecker": 6,
    "sparse": 7,
    "sparse-original": 8,
    "sparse2": 9,
    "sparse2full": 10,
}
# Entries are real numbers, of which logarithms, cosines and sums differ in last digits.
ROUNDED = ("gaussian", "orthogonal", "fastfood")
# The transforms of these make the reference of a huge D slow; a moderate one reaches all of them.
MODERATE = ("orthogonal", "fastfood")
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sparse": [{"s": 3}, {"s": 2.5}, {"s": "sqrt_d"}, {"s": "sqrt_D"}],
    "sparse2full": [{"s": "sqrt_d"}],
}


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Ten rounds of Philox4x32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            high // WORD ^ c1 ^ k0,
            high % WORD,
            low // WORD ^ c3 ^ k1,
            low % WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Numbers:
    """The sequences of one (seed, domain, stream, step)."""

    seed: int
    domain: int
    stream: int = 0
    step: int = 0

    def call(self, index: int, column: int) -> tuple[int, ...]:
        """One call of the generator."""
        counter = (index, column, self.step, self.stream * 2**8 + self.domain)
        return philox(counter, (self.seed % WORD, self.seed // WORD))

    def word(self, n: int, column: int = 0) -> int:
        return self.call(n // 4, column)[n % 4]

    def signbit(self, n: int, column: int = 0) -> int:
        return self.call(n // 128, column)[n % 128 // 32] // 2 ** (n % 32) % 2

    def sign(self, n: int, column: int = 0) -> int:
        return -1 if self.signbit(n, column) else 1

    def uniform(self, n: int, column: int = 0) -> float:
        return (2 * (self.word(n, column) // 2**9) + 1) / 2**24

    def integer(self, n: int, bound: int, column: int = 0) -> int:
        return self.word(n, column) * bound // WORD

    def normal(self, n: int, column: int = 0) -> float:
        rest, a = divmod(self.word(n // 2, column), 2**16)
        signs, b = divmod(rest, 2**14)
        radius, angle = math.sqrt(-2 * math.log((2 * a + 1) / 2**17)), math.pi * (2 * b + 1) / 2**16
        if n % 2 == 0:
            return radius * math.cos(angle) * (1 - 2 * (signs % 2))
        return radius * math.sin(angle) * (1 - 2 * (signs // 2))

    def permuted(self, x: int, size: int, column: int = 0) -> int:
        """The image of x under the permutation of [0, size)."""
        keys = [self.word(n, column) for n in range(32 if size <= 32 else 8)]
        bits = math.ceil(math.log2(size))
        low_bits = bits // 2
        high_bits = bits - low_bits
        while True:
            high, low = divmod(x, 2**low_bits)
            for number, key in enumerate(keys):
                if number % 2 == 0:
                    high ^= mix(low ^ key) % 2**high_bits
                else:
                    low ^= mix(high ^ key) % 2**low_bits
            x = high * 2**low_bits + low
            if x < size:
                return x

    def shuffled(self, x: int, size: int) -> int:
        """The image of x under the shuffle of [0, size)."""
        first = number = 0
        for bits in (*[32] * (size // 2**32), *range(31, 9, -1)):
            if bits < 32 and size // 2**bits % 2 == 0:
                continue
            if x < first + 2**bits:
                y = x - first
                for key, m in zip(self.call(number, 1), SHUFFLE, strict=True):
                    y = (y ^ key) * m % 2**bits
                    y ^= y // 2 ** math.ceil(bits / 2)
                return first + y
            first, number = first + 2**bits, number + 1
        return first + self.permuted(x - first, size - first, 0)


def mix(x: int) -> int:
    """MurmurHash3's finaliser."""
    x = (x ^ x // 2**16) * 0x85EBCA6B % WORD
    x = (x ^ x // 2**13) * 0xC2B2AE35 % WORD
    return x ^ x // 2**16


@dataclass(frozen=True)
class Matrix:
    """The entries of one projection, one at a time, as float64."""

    family: str
    D: int
    d: int
    seed: int = 0
    stream: int = 0
    step: int = 0
    s: float | str = 3

    def entry(self, i: int, j: int) -> float:
        """P_ij."""
        return getattr(self, "_" + self.family.replace("-", "_"))(i, j)

    @cached_property
    def numbers(self) -> Numbers:
        return Numbers(self.seed, DOMAINS[self.family], self.stream, self.step)

    def _gaussian(self, i: int, j: int) -> float:
        return self.numbers.normal(i, j) / math.sqrt(self.D)

    def _rademacher(self, i: int, j: int) -> float:
        return self.numbers.sign(i, j) / math.sqrt(self.D)

    def _hash(self, i: int, j: int) -> float:
        if self.numbers.shuffled(i, self.D) % self.d != j:
            return 0.0
        held = self.D // self.d + (j < self.D % self.d)
        return self.numbers.sign(i % 2**39, 2 + i // 2**39) * (1 / math.sqrt(held))

    def _orthogonal(self, i: int, j: int) -> float:
        x = [0.0] * self.D
        x[self.numbers.permuted(j, self.D, 1)] = 1.0
        return self.numbers.sign(i, 0) * butterflies(x)[i]

    def _fastfood(self, i: int, j: int) -> float:
        n = 1
        while n < self.d:
            n *= 2
        k, r = divmod(i, n)
        order = [self.numbers.permuted(m, n, 3 * k + 1) for m in range(n)]
        z = [self.numbers.normal(m, 3 * k + 2) for m in range(n)]
        squares = [x * x for x in z]
        while len(squares) > 1:
            half = len(squares) // 2
            squares = [a + b for a, b in zip(squares[:half], squares[half:], strict=True)]
        total = sum(hadamard(r, m) * z[m] * hadamard(order[m], j) for m in range(n))
        return (
            self.numbers.sign(j, 3 * k)
            * total
            / n
            * math.sqrt(n / squares[0])
            * math.sqrt(n / self.D)
        )

    def _kronecker(self, i: int, j: int) -> float:
        b, q = (math.ceil(math.sqrt(x)) for x in (self.D, self.d))
        left = self.numbers.sign(i // b, j // q)
        return left * self.numbers.sign(i % b, 2**31 + j % q) / math.sqrt(self.D)

    def _sparse(self, i: int, j: int) -> float:
        number = {"sqrt_d": math.sqrt(self.d), "sqrt_D": math.sqrt(self.D)}.get(self.s, self.s)
        s = round(number)
        k = i // s
        length = min(s, self.D - k * s)
        word = self.numbers.word(k, j)
        if i != k * s + word // 2 * length // 2**31:
            return 0.0
        return (-1 if word % 2 else 1) / math.sqrt(-(-self.D // s))

    _sparse2full = _sparse

    def _sparse_original(self, i: int, j: int) -> float:
        threshold = math.isqrt(2**64 // self.d)
        word = self.numbers.word(i, j)
        size = 1 / math.sqrt(self.D * threshold / WORD) if word < threshold else 0.0
        return -size if word % 2 and self.family == "sparse-original" else size

    _sparse2 = _sparse_original


def hadamard(a: int, b: int) -> int:
    """The sign of an entry of the Walsh–Hadamard matrix."""
    return -1 if (a & b).bit_count() % 2 else 1


def butterflies(x: list[float]) -> list[float]:
    """The transform T of `orthogonal`."""
    D = len(x)

    def pair(i: int, k: int) -> None:
        if k < D:
            x[i], x[k] = (x[i] + x[k]) * math.sqrt(0.5), (x[i] - x[k]) * math.sqrt(0.5)

    def halve(first: int, rows: int) -> None:
        upper, lower = rows // 2, rows - rows // 2
        for row in range(first, first + upper):
            for lane in range(32):
                pair(32 * row + lane, 32 * (row + lower) + lane)
        if rows > 1:
            halve(first, lower)
            halve(first + lower, upper)

    for stride in (1, 2, 4, 8, 16):
        for i in range(D):
            if i // stride % 2 == 0:
                pair(i, i + stride)
    halve(0, math.ceil(D / 32))
    return x


# ---- compact files -------------------------------------------------------------------------------


def decode_compact(file: bytes) -> tuple[float, list[int]]:
    """The step and the levels of a compact file, after the values and tensors that come before."""
    data, place = file[:-4], 13  # magic, version, template, two digests

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte, place = data[place], place + 1
            value += (byte % 128) << shift
            shift += 7
            if byte < 128:
                return value

    def skip(size: int) -> int:
        nonlocal place
        place += size
        return place

    def value() -> list[int]:
        """Pass over a value; of a list of small integers, these."""
        tag = data[skip(1) - 1]
        if tag in (0xE3, 0xE4):
            return [varint()]
        if tag in (0xE5, 0xE6):
            skip({0xE5: 8, 0xE6: 4}[tag])
        elif tag in (0xE7, 0xE8):
            skip(varint())
        elif tag in (0xE9, 0xEA):
            return [n for _ in range(varint() * (tag - 0xE8)) for n in value()]
        return [tag]

    value()
    shapes = []
    for _ in range(varint()):
        value()
        value()
        shapes.append(value())
    skip(4 * sum(math.prod(shape) for shape in shapes))
    number = varint()
    pattern = int.from_bytes(data[place : place + 2], "little") % 2**15
    step = (1 + pattern % 128 / 128) * 2.0 ** (pattern // 128 - 127)
    code = data[place + 2 :] + bytes(8)
    state = [int.from_bytes(code[:6], "big"), 2**48, 6]
    seen: dict[object, list[int]] = {}

    def bit(context: object = None) -> int:
        zeros, ones = seen.setdefault(context, [0, 0]) if context else (0, 0)
        chance = (2 * ones + 1) * 2**16 // (2 * (zeros + ones) + 2)
        part = state[1] // 2**16 * min(max(chance, 1), 2**16 - 1)
        found = int(state[0] < part)
        state[:2] = (state[0], part) if found else (state[0] - part, state[1] - part)
        if context:
            seen[context][found] += 1
        while state[1] < 2**40:
            following = code[state[2]] if state[2] < len(code) else 0
            state[:] = [state[0] * 256 + following, state[1] * 256, state[2] + 1]
        return found

    levels = []
    for _ in range(number):
        digits = 0
        while bit(("digits", digits)):
            digits += 1
        size = min(digits, 1)
        for k in range(1, digits):
            size = 2 * size + bit((digits, size) if k <= 3 else None)
        levels.append(-size if size and bit() else size)
    return step, levels
