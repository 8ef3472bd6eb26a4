"""The random numbers of ``docs/format.md`` as device functions: words, permutations, normals.

Words are uint32. What changes from call to call arrives as int32 with the same bits, see
:func:`~subspan.kernels.gpu.launch.word`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from subspan.philox import FEISTEL_ROUNDS, FEISTEL_ROUNDS_SMALL, MULTIPLIERS, ROUNDS, WEYL

_ROUNDS, _ONCE = tl.constexpr(ROUNDS), tl.constexpr(FEISTEL_ROUNDS)
_MANY = tl.constexpr(FEISTEL_ROUNDS_SMALL)
_M0, _M1 = (tl.constexpr(m) for m in MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in WEYL)


@triton.jit
def philox(call, column, step, tag, k0, k1):
    """Four words of one call; integers of any type, whose low 32 bits count."""
    c0, c1 = call.to(tl.uint32), column.to(tl.uint32)
    c2, c3 = step.to(tl.uint32), tag.to(tl.uint32)
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        p0, p1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def pick(a, b, c, d, index):
    """Number ``index`` mod 4 of four."""
    low = tl.where(index & 1 == 0, a, b)
    high = tl.where(index & 1 == 0, c, d)
    return tl.where(index & 2 == 0, low, high)


@triton.jit
def sign_bit(index, column, step, tag, k0, k1):
    """Sign bit number ``index`` (int64) of a column, at the place of a float's sign."""
    a, b, c, d = philox(index >> 7, column, step, tag, k0, k1)
    word = pick(a, b, c, d, index >> 5)
    return (word >> (index & 31).to(tl.uint32)) << 31


@triton.jit
def block_signs(block, column, step, tag, k0, k1):
    """The 128 sign bits of one call, (4, 32), at the place of a float's sign."""
    a, b, c, d = philox(block, column, step, tag, k0, k1)
    word = pick(a, b, c, d, tl.arange(0, 4)[:, None])
    return (word >> tl.arange(0, 32).to(tl.uint32)[None, :]) << 31


@triton.jit
def flip(x, sign):
    """``x`` with its sign changed where ``sign`` has its highest bit set (and no other)."""
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def mix(x):
    """MurmurHash3's 32-bit finaliser."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def encrypt(x, BITS: tl.constexpr, column, step, tag, k0, k1):
    """All rounds of a permutation of [0, 2^BITS), once; x is uint32, or uint64 beyond 32 bits.

    Permutations of at most 32 elements take more rounds.
    """
    ROUNDS: tl.constexpr = _ONCE if BITS > 5 else _MANY
    LOW: tl.constexpr = BITS // 2
    HIGH: tl.constexpr = BITS - LOW
    low = (x & ((1 << LOW) - 1)).to(tl.uint32)
    high = (x >> LOW).to(tl.uint32)
    low, _ = tl.broadcast(low, column)  # a loop keeps shapes as they are
    high, _ = tl.broadcast(high, column)
    for turn in range(ROUNDS // _ONCE):  # 32 rounds unrolled take Triton long
        for quad in tl.static_range(_ONCE // 4):
            call = tl.full((1,), turn * (_ONCE // 4) + quad, tl.uint32)
            a, b, c, d = philox(call, column, step, tag, k0, k1)
            high ^= mix(low ^ a) & ((1 << HIGH) - 1)
            low ^= mix(high ^ b) & ((1 << LOW) - 1)
            high ^= mix(low ^ c) & ((1 << HIGH) - 1)
            low ^= mix(high ^ d) & ((1 << LOW) - 1)
    return (high.to(x.dtype) << LOW) | low.to(x.dtype)


@triton.jit
def permute(x, last, BITS: tl.constexpr, column, step, tag, k0, k1):
    """Images of ``x`` in [0, last] under the permutation of ``column``."""
    last = last.to(x.dtype)
    x = encrypt(x, BITS, column, step, tag, k0, k1)
    outside = x > last
    while tl.max(outside.to(tl.int32)) > 0:
        x = tl.where(outside, encrypt(x, BITS, column, step, tag, k0, k1), x)
        outside = x > last
    return x


@triton.jit
def normal_pair(word):
    """Both normals of a word, to about 3e-6: the hardware has no logarithm that is this good at 1.

    Polynomials are minimax fits. With u = 2ᵗ(1 + f), f in [−1/3, 1/3], −2 ln u = f·P(f) − 2t ln 2;
    where u is near 1 and the radius small, t is 0 and nothing cancels. The angle is π/4 + πx/2 with
    x in (−½, ½), and cosine and sine of it are √½ (C ∓ S) for even C and odd S.
    """
    u = (word & 0xFFFF).to(tl.int32).to(tl.float32) * 2.0**-16 + 2.0**-17
    bits = u.to(tl.int32, bitcast=True)
    t = (bits - 0x3F2AAAAB) & -0x800000  # 0x3F2AAAAB is 2/3
    f = (bits - t).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.35024222 + 0.38816016
    p = p * f - 0.39456437
    p = p * f + 0.49683229
    p = p * f - 0.66681545
    p = p * f + 1.0000449
    p = p * f - 1.9999993
    radius = tl.sqrt(f * p + t.to(tl.float32) * -1.6525917e-07)  # 2 ln 2 / 2²³
    x = (word & 0x3FFF0000).to(tl.int32).to(tl.float32) * 2.0**-30 + (2.0**-15 - 0.5)
    y = x * x
    odd = x * ((y * 0.054919131 - 0.45658732) * y + 1.1107152)
    even = ((y * -0.014430883 + 0.17932131) * y - 0.87235552) * y + 0.70710676
    cosine = flip(radius * (even - odd), (word << 1) & 0x80000000)
    sine = flip(radius * (even + odd), word & 0x80000000)
    return cosine, sine


@triton.jit
def normal(index, column, step, tag, k0, k1):
    """Normal number ``index`` of a column, alone."""
    a, b, c, d = philox(index >> 3, column, step, tag, k0, k1)
    cosine, sine = normal_pair(pick(a, b, c, d, index >> 1))
    return tl.where(index & 1 == 0, cosine, sine)
