"""Triton kernels of all generated families, for vectors on a CUDA device."""

from subspan.kernels.gpu import dense, fastfood, kronecker, orthogonal, rademacher, sparse
from subspan.kernels.gpu import hash as hash_

KERNELS = (
    dense.KERNELS
    | rademacher.KERNELS
    | sparse.KERNELS
    | hash_.KERNELS
    | orthogonal.KERNELS
    | fastfood.KERNELS
    | kronecker.KERNELS
)
