"""Compiles every GPU kernel for an H100, without one; run by test_gpu_compile.py as a process.

``python -m tests.kernels.compile_gpu`` prints a line for each kernel.
"""

from __future__ import annotations

import pkgutil
import sys
import time

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import subspan.kernels.gpu
from subspan.kernels.gpu.launch import Case

H100 = GPUTarget("cuda", 90, 32)
POINTERS = {"w": "*fp32", "g": "*fp32", "x": "*fp32", "out": "*fp32", "table": "*fp32"}
POINTERS |= {"sums": "*i64", "marks": "*i32"}
# What is 64 bits wide for the largest projections, and 32 else.
WIDE = {"n", "start", "size", "last", "first", "rows", "begin", "end"}
CASES: list[Case] = [
    case
    for file in pkgutil.iter_modules(subspan.kernels.gpu.__path__)
    for case in getattr(sys.modules[f"subspan.kernels.gpu.{file.name}"], "CASES", ())
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
