"""Write entries.json: some entries of every family, by docs/format.md alone.

    python -m tests.golden.write

The values come from tests/reference.py, not from the package. Once a version is released this
script has no other use than adding cases: a value that changes means that no model stored before
can be rebuilt.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tests.reference import DOMAINS, MODERATE, OPTIONS, Matrix, Numbers

PATH = Path(__file__).with_name("entries.json")

# (D, d, first row, rows, seed, stream, step): a small case, one cut short everywhere, and one with
# all words of the counter and the key in use and rows far out.
SMALL = (20, 5, 0, 20, 0, 0, 0)
CUT = (101, 11, 90, 11, 2**32 + 1, 2, 3)
FAR = (2**33 + 7, 6, 2**32 + 5, 9, 2**64 - 2, 2**24 - 3, 2**32 - 4)
MIDDLE = (10_007, 6, 9_990, 9, 2**64 - 2, 2**24 - 3, 2**32 - 4)
# Where a shuffle passes from one block to the next, from the last into the tail, and the signs of
# one column end.
MORE = {
    "hash": [
        (2**16 + 2**11 + 77, 6, 2**16 - 5, 11, 3, 0, 0),
        (2**16 + 2**11 + 77, 6, 2**16 + 2**11 - 5, 11, 3, 0, 1),
        (2**40 - 3, 6, 2**39 - 4, 9, 2**64 - 2, 2**24 - 3, 2**32 - 4),
    ]
}


def projections() -> list[dict[str, Any]]:
    """Entries as hexadecimal floats (float64), row by row."""
    cases = []
    for family in DOMAINS:
        last = MIDDLE if family in MODERATE else FAR
        for D, d, start, rows, seed, stream, step in (SMALL, CUT, last, *MORE.get(family, [])):
            for options in OPTIONS.get(family, [{}]):
                P = Matrix(family, D, d, seed, stream, step, **options)
                entries = [
                    [P.entry(i, j).hex() for j in range(d)] for i in range(start, start + rows)
                ]
                cases.append(
                    {
                        "family": family,
                        "out_dim": D,
                        "in_dim": d,
                        "seed": seed,
                        "stream": stream,
                        "options": options,
                        "step": step,
                        "start": start,
                        "entries": entries,
                    }
                )
    return cases


def numbers() -> list[dict[str, Any]]:
    """Every reading of a sequence, and permutations."""
    cases = []
    for seed, domain, stream, step, column, start in [
        (0, 0, 0, 0, 0, 0),
        (2**32 + 1, 16, 1, 2, 3, 126),
        (2**64 - 2, 255, 2**24 - 3, 2**32 - 4, 2**32 - 5, 2**34 - 6),
    ]:
        source = Numbers(seed, domain, stream, step)
        positions = range(start, start + 6)
        cases.append(
            {
                "seed": seed,
                "domain": domain,
                "stream": stream,
                "step": step,
                "column": column,
                "start": start,
                "words": [f"{source.word(n, column):08x}" for n in positions],
                "signbits": [source.signbit(n, column) for n in positions],
                "integers_below_1000": [source.integer(n, 1000, column) for n in positions],
                "uniforms": [source.uniform(n, column).hex() for n in positions],
                "normals": [source.normal(n, column).hex() for n in positions],
                "permutations": {
                    str(size): [source.permuted(x, size, column) for x in range(min(size, 8))]
                    for size in (1, 2, 3, 7, 32, 33, 1000, 2**34)
                },
            }
        )
    return cases


def weights() -> list[dict[str, Any]]:
    """Bits of P w for ``hash``, whose products are the same everywhere; w_j = 1 / (j + 1)."""
    cases = []
    for D, d, start, rows, seed, stream, step in (SMALL, CUT, FAR):
        P = Matrix("hash", D, d, seed, stream, step)
        w = [float32(1 / (j + 1)) for j in range(d)]
        row = [
            sum(float32(w[j] * float32(P.entry(i, j))) for j in range(d))
            for i in range(start, start + rows)
        ]
        cases.append(
            {
                "out_dim": D,
                "in_dim": d,
                "seed": seed,
                "stream": stream,
                "step": step,
                "start": start,
                "weights": [struct.pack(">f", x).hex() for x in row],
            }
        )
    return cases


def float32(x: float) -> float:
    """Rounded to float32; exact for the product of two float32, which float64 holds in full."""
    return struct.unpack("f", struct.pack("f", x))[0]


if __name__ == "__main__":
    parts = {"numbers": numbers(), "projections": projections(), "weights": weights()}
    lines = [
        f'"{name}": [\n' + ",\n".join(map(json.dumps, cases)) + "\n]"
        for name, cases in parts.items()
    ]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
