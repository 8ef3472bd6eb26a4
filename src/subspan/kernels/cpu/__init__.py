"""Numba kernels for float32 vectors on the CPU, one file per family or group of families.

Sums run in an order that depends on sizes only: results do not change with the number of threads.
"""

from __future__ import annotations

from subspan.kernels import Kernel
from subspan.kernels.cpu import (
    dense,
    fastfood,
    hash,  # noqa: A004 - the family's name
    kronecker,
    orthogonal,
    rademacher,
    sparse,
)

KERNELS = dense.KERNELS | {
    "fastfood": Kernel(fastfood.matvec, fastfood.rmatvec),
    "hash": Kernel(hash.matvec, hash.rmatvec),
    "kronecker": Kernel(kronecker.matvec, kronecker.rmatvec),
    "orthogonal": Kernel(orthogonal.matvec, orthogonal.rmatvec),
    "rademacher": Kernel(rademacher.matvec, rademacher.rmatvec),
    "sparse": Kernel(sparse.matvec, sparse.rmatvec),
    "sparse2full": Kernel(sparse.matvec, sparse.rmatvec),
}
