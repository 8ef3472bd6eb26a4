"""Compiles every GPU kernel for an H100, without one; run by test_gpu_compile.py as a process.

``python -m tests.kernels.compile_gpu`` prints a line for each kernel.
"""

from __future__ import annotations

import time
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from subspan.kernels.gpu import (
    dense,
    fastfood,
    fastfood_passes,
    fixed,
    kronecker,
    orthogonal,
    rademacher,
    sparse,
)
from subspan.kernels.gpu import hash as hash_

H100 = GPUTarget("cuda", 90, 32)
POINTERS = {"w": "*fp32", "g": "*fp32", "x": "*fp32", "out": "*fp32", "table": "*fp32"}
POINTERS |= {"sums": "*i64", "marks": "*i32"}
# What is 64 bits wide for the largest projections, and 32 else.
WIDE = {"n", "start", "size", "last", "first", "rows", "begin", "end"}
OCTETS = (dense.gaussian_octet, dense.signed_octet, dense.positive_octet)

# kernel, warps, what is a float or another pointer, constants
Case = tuple[Any, int, dict[str, str], dict[str, Any]]
CASES: list[Case] = [
    (rademacher._table, 4, {}, {"GROUPS": 64}),
    (rademacher._matvec, 4, {}, {"BLOCKS": 32, "WARPS": 4}),
    (rademacher._rmatvec, 4, {}, {"COLUMNS": 128}),
    *((dense._matvec, 8, {}, {"ENTRIES": f, "OCTETS": 32, "WARPS": 8}) for f in OCTETS),
    *((dense._rmatvec, 4, {}, {"ENTRIES": f, "COLUMNS": 128}) for f in OCTETS),
    (fixed._largest, 4, {}, {"TILE": 4096}),
    *(
        (f, 1, {"scale": "*fp64"}, {"BITS": b, "ROUNDS": r})
        for f in (hash_._matvec, hash_._rmatvec)
        for b, r in ((0, 32), (5, 32), (10, 8))
    ),
    *((sparse._narrow, 8, {}, {"ROWS": r, "CALLS": 32, "WARPS": 8}) for r in (1, 4, 16)),
    (sparse._wide, 4, {"scale": "*fp64"}, {"COLUMNS": 128}),
    (sparse._rmatvec, 4, {}, {"COLUMNS": 128}),
    *((orthogonal._inner, 4, {}, {"ROWS": 64, "INVERSE": i}) for i in (False, True)),
    (orthogonal._outer, 4, {}, {"ROWS": 64}),
    (orthogonal._signs, 1, {}, {}),
    *(
        (orthogonal._chosen, 4, {}, {"BITS": b, "ROUNDS": 8, "SCATTER": s, "TILE": 256})
        for b, s in ((19, False), (34, True))
    ),
    *(
        (f, n, {"scale": "fp32"}, {"LOG": log, "ROUNDS": r, "BLOCKS": b})
        for f in (fastfood._matvec, fastfood._rmatvec)
        for log, r, b, n in ((0, 32, 1024, 4), (4, 32, 64, 4), (9, 8, 2, 4), (12, 8, 1, 16))
    ),
    (fastfood_passes._near, 8, {}, {"LOG": 12}),
    (fastfood_passes._far, 4, {}, {"LEVELS": 6, "BESIDE": 64}),
    (fastfood_passes._spread, 4, {}, {"LOG": 14, "TILE": 1024}),
    (fastfood_passes._squares, 4, {}, {"LOG": 14, "TILE": 1024}),
    *(
        (
            fastfood_passes._mix,
            4,
            {"size": "*fp32"},
            {"LOG": 31, "ROUNDS": 8, "INVERSE": i, "TILE": 1024},
        )
        for i in (False, True)
    ),
    (fastfood_passes._gather, 4, {}, {"LOG": 14, "TILE": 1024}),
    (kronecker._fill, 4, {}, {"COLUMNS": 32}),
]


def compiled(case: Case, wide: bool = False) -> CompiledKernel:
    """The kernel of a case, for large sizes or for those of 32 bits."""
    function, warps, types, constants = case
    types = {name: "i64" for name in WIDE if wide} | POINTERS | types
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in function.arg_names
    }
    aligned = [["tt.divisibility", 16]]  # as Triton finds of whatever PyTorch allocates
    attributes = {
        (place,): aligned for place, name in enumerate(signature) if "*" in signature[name]
    }
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=H100, options={"num_warps": warps})


if __name__ == "__main__":
    for case in CASES:
        for wide in (False, True):
            began = time.perf_counter()
            kernel = compiled(case, wide)
            seconds = time.perf_counter() - began
            names = {k: getattr(v, "__name__", v) for k, v in case[3].items()}
            print(f"{case[0].__module__}.{case[0].__name__} {names} wide={wide} {seconds:.1f} s")
            assert kernel.asm["cubin"]
