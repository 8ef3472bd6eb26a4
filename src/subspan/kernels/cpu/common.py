"""The ground of all Numba kernels: compilation, the generator, permutations, threads.

The integers are those of :mod:`subspan.philox`. Lanes of the vector registers are columns or rows,
whatever makes the inner loop of a kernel a loop over contiguous memory without a branch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit, types, uint32, uint64  # type: ignore[attr-defined]
from numba.extending import intrinsic
from torch import Tensor

from subspan.philox import MASK, MULTIPLIERS, ROUNDS, WEYL, Permutation, Source, rounds

LANES = 64  # columns generated together
CHUNK = 1 << 16  # rows that one task adds up before partial sums are added, in order
KEPT = 1 << 25  # bytes up to which what is derived from a seed is kept between calls
GRAIN = 1 << 15  # operations that are worth a thread
MOST: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
SIGN = np.uint32(1 << 31)
LOW = np.uint64(MASK)
M0, M1 = (np.uint64(m) for m in MULTIPLIERS)
W0, W1 = (np.uint32(w) for w in WEYL)

# ---- compilation ---------------------------------------------------------------------------------


@functools.cache
def _folder() -> str | None:
    """Return where compiled kernels are kept between processes; None if nowhere can be written.

    Numba looks for changes in the file of a function, but not in the functions that it calls: a
    folder named by all of our sources does.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    chosen = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    bases = [Path(chosen)] if chosen else [Path(__file__).parent / "__pycache__"]
    with contextlib.suppress(RuntimeError):  # a user without a home
        bases.append(Path.home() / ".cache" / "subspan")
    for base in bases:
        folder = base / f"kernels-{digest}"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return str(folder)
    return None


@contextlib.contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, folder
    try:
        yield
    finally:
        config.CACHE_DIR = before


def kernel(function: Any) -> Any:
    """Compile for many threads at the first call, and keep the code for the next process."""
    folder = _folder()
    if folder is None:
        return njit(parallel=True, **OPTIONS)(function)
    with _cache_in(folder):
        return njit(parallel=True, cache=True, **OPTIONS)(function)


OPTIONS: dict[str, Any] = {
    "nogil": True,
    "boundscheck": False,
    "error_model": "numpy",
    "fastmath": {"contract"},  # a·b + c in one instruction; sums keep their order
}
inline = njit(inline="always")
function = njit(**OPTIONS)


@intrinsic
def widest(context: Any) -> Any:
    """Compile the function that this stands in for the widest registers that there are.

    LLVM prefers 256 of the 512 bits on Intel's processors, for the sake of their clocks; products
    and shifts of words gain more by the width (30 to 45 % on Emerald Rapids).
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite knows no attribute with a value, but writes what it finds.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


# ---- bits ----------------------------------------------------------------------------------------


@intrinsic
def as_float(context: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as a float."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def as_bits(context: Any, value: Any) -> Any:
    """Reinterpret a float as 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def shift_right(context: Any, x: Any, count: Any) -> Any:
    """Shift a word by less than 32 in 32 bits; Numba would widen it to 64, with half the lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.lshr(args[0], args[1])

    return types.uint32(types.uint32, types.uint32), generate


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@inline
def floats_at(address, size):
    """The float32 vector of ``size`` numbers at an address."""
    return carray(_pointer(address), size)


@intrinsic
def add_signs(context: Any, out: Any, place: Any, word: Any) -> Any:
    """Double words ``place`` … ``place`` + 31 of ``out``, and add the bits of ``word``.

    As vectors, because compilers make a loop over 32 bits three times as slow.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, place, word = args
        kind = ir.VectorType(ir.IntType(32), 32)
        alone = builder.insert_element(ir.Constant(kind, ir.Undefined), word, _INT(0))
        every = builder.shuffle_vector(alone, alone, ir.Constant(kind, [0] * 32))
        low = builder.lshr(every, ir.Constant(kind, list(range(32))))
        signs = builder.and_(low, ir.Constant(kind, [1] * 32))
        data = context.make_array(signature.args[0])(context, builder, array).data
        pointer = builder.bitcast(builder.gep(data, [place]), kind.as_pointer())
        doubled = builder.shl(builder.load(pointer, align=4), ir.Constant(kind, [1] * 32))
        builder.store(builder.or_(doubled, signs), pointer, align=4)
        return context.get_dummy_value()

    return types.void(out, types.intp, types.uint32), generate


_INT = ir.IntType(32)


@inline
def flip(bits, word, shift):
    """The float with these bits, negated if bit 31 − ``shift`` of ``word`` is set."""
    return as_float(bits ^ ((word << shift) & SIGN))


# ---- the generator -------------------------------------------------------------------------------


@inline
def philox(index, column, address):
    """Compute the four words of a call.

    Words live in the low halves of 64-bit registers, where the product's instruction looks for
    them; what is in the high halves never matters, so that a round is six instructions.
    """
    step, tag, k0, k1 = address
    c0, c1, c2, c3 = uint64(index), uint64(column), uint64(step), uint64(tag)
    for _ in range(ROUNDS):
        p0, p1 = M0 * (c0 & LOW), M1 * (c2 & LOW)
        c0, c1, c2, c3 = (
            (p1 >> uint64(32)) ^ c1 ^ uint64(k0),
            p1,
            (p0 >> uint64(32)) ^ c3 ^ uint64(k1),
            p0,
        )
        k0, k1 = uint32(k0 + W0), uint32(k1 + W1)
    return uint32(c0), uint32(c1), uint32(c2), uint32(c3)


@inline
def columns(out, index, column, address):
    """The words of call ``index`` for LANES columns from ``column``, into (4, LANES)."""
    widest()
    for lane in range(LANES):
        a, b, c, d = philox(index, column + lane, address)
        out[0, lane], out[1, lane], out[2, lane], out[3, lane] = a, b, c, d


@inline
def sequence(out, first, count, column, address):
    """The words of ``count`` calls from ``first`` on in one column, into (count, 4)."""
    widest()
    for call in range(count):
        a, b, c, d = philox(first + call, column, address)
        out[call, 0], out[call, 1], out[call, 2], out[call, 3] = a, b, c, d


@inline
def round_keys(rounds, column, address):
    """The keys of a permutation: the first words of a sequence."""
    keys = np.empty((rounds // 4, 4), np.uint32)
    sequence(keys, 0, rounds // 4, column, address)
    return keys.ravel()


@inline
def mix(x):
    """The round function of a permutation."""
    x = uint32((x ^ (x >> uint32(16))) * uint32(0x85EBCA6B))
    x = uint32((x ^ (x >> uint32(13))) * uint32(0xC2B2AE35))
    return uint32(x ^ (x >> uint32(16)))


@inline
def feistel(high, low, count, keys, high_bits, low_bits):
    """All rounds of a permutation on the halves of ``count`` indices, in place."""
    high_mask, low_mask = uint32((1 << high_bits) - 1), uint32((1 << low_bits) - 1)
    for r in range(0, keys.size, 2):
        even, odd = keys[r], keys[r + 1]
        for i in range(count):
            high[i] ^= mix(low[i] ^ even) & high_mask
            low[i] ^= mix(high[i] ^ odd) & low_mask


@inline
def permuted(out, room, first, count, last, keys, widths):
    """Images of first … first + count − 1 under a permutation of [0, last], last < 2³².

    ``out`` is (count,), ``room`` (3, count), both of 32-bit words.
    """
    high, low, places = room
    high_bits, low_bits = uint32(widths[1]), uint32(widths[2])
    low_mask = uint32((1 << low_bits) - 1)
    for i in range(count):
        x = uint32(first + i)
        high[i], low[i] = x >> low_bits, x & low_mask
    feistel(high, low, count, keys, high_bits, low_bits)
    for i in range(count):
        out[i] = (high[i] << low_bits) | low[i]
    outside = 0
    for i in range(count):  # without a branch, which no processor could predict
        places[outside] = i
        outside += out[i] > last
    while outside > 0:
        for n in range(outside):
            x = out[places[n]]
            high[n], low[n] = x >> low_bits, x & low_mask
        feistel(high, low, outside, keys, high_bits, low_bits)
        left = 0
        for n in range(outside):
            place, x = places[n], (high[n] << low_bits) | low[n]
            out[place] = x
            places[left] = place
            left += x > last
        outside = left


@functools.lru_cache(maxsize=4096)
def widths(size: int) -> tuple[int, int, int, int]:
    """Return the rounds of a permutation of [0, size), the bits of its high and low half, and 32.

    The bits of a word are an argument because the compiler must not know them: it would unroll a
    loop over them and vectorise the one around it, with gathers, at seven times the cost.
    """
    return rounds(size), *Permutation(size, ()).bits, 32


# ---- butterflies ---------------------------------------------------------------------------------


@inline
def eight(a, b, c, d, e, f, g, h):
    """Three levels of (a, b) → (a + b, a − b) on eight elements, at distances 1, 2, 4."""
    a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
    a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
    return a + e, b + f, c + g, d + h, a - e, b - f, c - g, d - h


# ---- from Python ---------------------------------------------------------------------------------


_here = threading.local()  # .number: of Numba's threads that this thread has asked for


def threads(work: float) -> None:
    """Set the number of threads: torch's, but at most one for each GRAIN of ``work`` operations.

    A worker that was given one core takes one, and a bias does not wait for a second.
    """
    wanted = torch.get_num_threads()
    number = max(1, min(wanted, MOST, int(work / GRAIN)))
    if _here.__dict__.get("number") != number:  # Numba takes a lock to be asked
        numba.set_num_threads(number)
        _here.number = number
    if torch.get_num_threads() != wanted:  # Numba's pool started, and reset the OpenMP they share
        torch.set_num_threads(wanted)


def address(p: Any, step: Tensor) -> tuple[np.uint32, ...]:
    """Return where the numbers of a projection begin: Philox's step, tag and key."""
    return np.uint32(step.item()), *_tag_and_key(p.seed, p.domain, p.stream)


@functools.lru_cache(maxsize=4096)
def _tag_and_key(seed: int, domain: int, stream: int) -> tuple[np.uint32, ...]:
    source = Source(seed, domain, stream)
    return tuple(np.uint32(word) for word in (source.tag, *source.key))


def addresses(parts: Sequence[Tensor]) -> Any:
    """Return the addresses of contiguous float32 vectors, for :func:`floats_at`."""
    return np.array([part.data_ptr() for part in parts], np.int64)


def bounds(parts: Sequence[Tensor]) -> tuple[Any, int]:
    """Return where vectors begin if they are laid end to end, and where the last one ends.

    The end is the last of the bounds, too, and a second time a Python integer.
    """
    return _bounds(*[part.numel() for part in parts])


@functools.lru_cache(maxsize=4096)
def _bounds(*sizes: int) -> tuple[Any, int]:
    return np.cumsum((0, *sizes), dtype=np.int64), sum(sizes)


def padded(w: Tensor, divisor: float = 1.0) -> Any:
    """``w`` divided as a NumPy array, with zeros up to a multiple of LANES."""
    out = np.zeros(-(-w.numel() // LANES) * LANES, np.float32)
    np.divide(w.numpy(), np.float32(divisor), out=out[: w.numel()])
    return out


def partials(blocks: int, rows: int, columns: int) -> tuple[int, Any]:
    """Blocks of ``rows`` rows to a task, and room for the sums of tasks (tasks, whole LANES).

    Tasks grow with the columns, so that the sums together stay below a sixteenth of the rows; their
    number depends on sizes alone, and so does the order in which sums are added.
    """
    width = -(-columns // LANES) * LANES
    chunk = max(1, max(CHUNK, 16 * width) // rows)
    return chunk, np.empty((max(1, -(-blocks // chunk)), width), np.float32)


def total(partial: Any, columns: int) -> Tensor:
    """The sums of all tasks, in order."""
    return torch.from_numpy(partial[0] if len(partial) == 1 else partial.sum(axis=0))[:columns]
