"""Triton kernels of all generated families, for vectors on a CUDA device."""

from subspan.kernels.gpu import dense, rademacher

KERNELS = dense.KERNELS | rademacher.KERNELS
