"""Triton kernels of all generated families, for vectors on a CUDA device."""

import sys

from subspan.kernels import collect

KERNELS = collect(sys.modules[__name__])
