"""Without a CUDA device Triton interprets the GPU kernels; it must know before it is imported."""

import os
import sys

import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "something imported Triton before it was told to interpret"
    os.environ["TRITON_INTERPRET"] = "1"
