"""Sums of four terms, each with a sign of its own: ±a ±b ±c ±d, looked up by four bits.

Four terms have sixteen such sums, as many as a register of 512 bits holds, and one instruction
looks up sixteen of them: with a shift and an addition, three instructions for 64 signs. Registers
of 256 bits hold half of the sums and take two lookups. Where a processor has neither, each sign is
flipped by itself. All three ways add in the same order, (±a ±b) + (±c ±d), and give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types, uint32
from numba.extending import intrinsic

from subspan.kernels.cpu.common import LANES, flip, inline, shift_right

SUMS = 16  # of four terms, and lanes of a vector
FOURS = LANES // 4  # of neighbouring columns
PLACE, WORD, FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
WORDS, FLOATS = ir.VectorType(WORD, SUMS), ir.VectorType(FLOAT, SUMS)


@inline
def signed_sums(out, terms):
    """Sums of terms 4n … 4n + 3, into out[n, i]: bit k of i is set where term 4n + k is negated."""
    bits = terms.view(np.uint32)
    for n in range(out.shape[0]):
        a, b, c, d = bits[4 * n], bits[4 * n + 1], bits[4 * n + 2], bits[4 * n + 3]
        for place in range(SUMS):
            i = uint32(place)
            out[n, place] = (flip(a, i, uint32(31)) + flip(b, i, uint32(30))) + (
                flip(c, i, uint32(29)) + flip(d, i, uint32(28))
            )


@intrinsic
def add_columns(context: Any, total: Any, first: Any, words: Any, terms: Any, sums: Any) -> Any:
    """Add Σᵢ ±terms[i] over 128 terms to LANES numbers of ``total``, from ``first`` on.

    Bit i of words[k, j] is set where number j has the negative of term 32k + i.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, _, words, terms, sums = _addresses(context, builder, signature, args)
        lanes = range(0, LANES, SUMS)
        inner = [_constant(FLOATS, 0.0)] * len(lanes)
        for k in range(4):
            signs = [_load(builder, WORDS, words, PLACE(k * LANES + lane)) for lane in lanes]
            for four in range(8):
                look_up = _look_up(context, builder, terms, sums, PLACE(8 * k + four))
                for n, word in enumerate(signs):
                    shifted = builder.lshr(word, _constant(WORDS, 4 * four))
                    inner[n] = builder.fadd(inner[n], look_up(shifted))
        for lane, value in zip(lanes, inner, strict=True):
            _add(builder, total, builder.add(args[1], PLACE(lane)), value)
        return context.get_dummy_value()

    return types.void(total, types.intp, words, terms, sums), generate


@intrinsic
def add_rows(context: Any, total: Any, signs: Any, terms: Any, sums: Any, group: Any) -> Any:
    """Add Σⱼ ±terms[j] over the LANES terms of ``group`` to 128 rows, ``total`` (4, 2, 8, 2).

    ``signs`` are those of :func:`by_rows`; row 32k + 4n + 2p + q is total[k, p, n, q].
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, signs, terms, sums, _ = _addresses(context, builder, signature, args)
        shifts = ir.Constant(WORDS, [4 * (lane // 2) for lane in range(SUMS)])
        inner = [_constant(FLOATS, 0.0)] * 8
        first = builder.mul(args[4], PLACE(FOURS))
        for four in range(FOURS):
            look_up = _look_up(context, builder, terms, sums, builder.add(first, PLACE(four)))
            for n in range(8):
                two = _load(builder, ir.VectorType(WORD, 2), signs, PLACE(2 * (FOURS * n + four)))
                every = builder.shuffle_vector(two, two, ir.Constant(WORDS, [0, 1] * 8))
                inner[n] = builder.fadd(inner[n], look_up(builder.lshr(every, shifts)))
        for n, value in enumerate(inner):
            _add(builder, total, PLACE(SUMS * n), value)
        return context.get_dummy_value()

    return types.void(total, signs, terms, sums, types.intp), generate


@inline
def by_rows(out, words):
    """Put the signs of four neighbouring columns side by side, by transposing 4 by 4 bits.

    ``words`` (4, LANES) have the signs of rows 32k … 32k + 31 of a column. Bits 4n … 4n + 3 of
    out[k, p, j, q] are those of columns 4j … 4j + 3 in row 32k + 4n + 2p + q.
    """
    for k in range(4):
        for j in range(FOURS):
            a, b = words[k, 4 * j], words[k, 4 * j + 1]
            c, d = words[k, 4 * j + 2], words[k, 4 * j + 3]
            a, b = _exchange(a, b, uint32(1), uint32(0x55555555))
            c, d = _exchange(c, d, uint32(1), uint32(0x55555555))
            a, c = _exchange(a, c, uint32(2), uint32(0x33333333))
            b, d = _exchange(b, d, uint32(2), uint32(0x33333333))
            out[k, 0, j, 0], out[k, 0, j, 1], out[k, 1, j, 0], out[k, 1, j, 1] = a, b, c, d


@inline
def _exchange(x, y, count, mask):
    """Exchange the bits of ``x`` at ``mask << count`` with the bits of ``y`` at ``mask``."""
    differ = (shift_right(x, count) ^ y) & mask
    return x ^ (differ << count), y ^ differ


# ---- LLVM's instructions -------------------------------------------------------------------------


def _look_up(context: Any, builder: Any, terms: Any, sums: Any, n: Any) -> Callable[[Any], Any]:
    """Return what looks up sums of terms 4n … 4n + 3 by the low four bits of words."""
    features = context.codegen().magic_tuple()[2].split(",")
    first = builder.mul(n, PLACE(SUMS))
    if "+avx512f" in features:
        table = _load(builder, FLOATS, sums, first)
        return lambda words: _call(builder, "llvm.x86.avx512.permvar.sf.512", table, words)
    if "+avx2" in features:
        return _two_lookups(builder, sums, first)
    return _flips(builder, terms, builder.mul(n, PLACE(4)))


def _two_lookups(builder: Any, sums: Any, first: Any) -> Callable[[Any], Any]:
    low, high = (
        _load(builder, ir.VectorType(FLOAT, 8), sums, builder.add(first, PLACE(start)))
        for start in (0, 8)
    )

    def look_up(words: Any) -> Any:
        halves = []
        for start in (0, 8):
            some = builder.shuffle_vector(words, words, _from(start, 8))
            one, other = (_call(builder, "llvm.x86.avx2.permps", t, some) for t in (low, high))
            top = builder.shl(some, _constant(some.type, 28))  # bit 3 of the place is the sign
            upper = builder.icmp_signed("<", top, _constant(some.type, 0))
            halves.append(builder.select(upper, other, one))
        return builder.shuffle_vector(*halves, _from(0, 16))

    return look_up


def _flips(builder: Any, terms: Any, first: Any) -> Callable[[Any], Any]:
    every = []
    for k in range(4):
        one = _load(builder, ir.VectorType(WORD, 1), terms, builder.add(first, PLACE(k)))
        every.append(builder.shuffle_vector(one, one, _constant(WORDS, 0)))

    def look_up(words: Any) -> Any:
        a, b, c, d = (
            builder.bitcast(builder.xor(term, builder.and_(bit, _constant(WORDS, 1 << 31))), FLOATS)
            for k, term in enumerate(every)
            for bit in [builder.shl(words, _constant(WORDS, 31 - k))]
        )
        return builder.fadd(builder.fadd(a, b), builder.fadd(c, d))

    return look_up


def _call(builder: Any, name: str, table: Any, words: Any) -> Any:
    kind = ir.FunctionType(table.type, [table.type, words.type])
    return builder.call(builder.module.declare_intrinsic(name, (), kind), [table, words])


def _from(start: int, count: int) -> Any:
    return ir.Constant(ir.VectorType(WORD, count), list(range(start, start + count)))


def _constant(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _addresses(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Return where the numbers of arrays begin; None for what is no array."""
    return [
        context.make_array(kind)(context, builder, value).data
        if isinstance(kind, types.Array)
        else None
        for kind, value in zip(signature.args, args, strict=True)
    ]


def _load(builder: Any, kind: Any, array: Any, place: Any) -> Any:
    address = builder.bitcast(builder.gep(array, [place]), kind.as_pointer())
    return builder.load(address, align=4)


def _add(builder: Any, array: Any, place: Any, value: Any) -> None:
    address = builder.bitcast(builder.gep(array, [place]), value.type.as_pointer())
    builder.store(builder.fadd(builder.load(address, align=4), value), address, align=4)
