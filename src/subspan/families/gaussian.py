"""Independent normal entries: P_ij ~ N(0, 1/D).

Source: Li, Farkhoor, Liu and Yosinski, "Measuring the intrinsic dimension of objective
landscapes", ICLR 2018 (their dense projection, columns of unit norm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.families.dense import DenseProjection


@dataclass(frozen=True)
class Gaussian(DenseProjection, family="gaussian"):
    """Independent normal entries of variance 1/D (Li 2018).

    Entry (i, j) is number i of sequence j of the source's normals.
    """

    domain = 1
    norm = "expected"

    def _entries(
        self, step: Tensor, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        columns = torch.arange(self.in_dim, device=device)
        normals = self.source.normals(
            start, stop, column=columns, step=step, device=device, dtype=dtype
        )
        return normals / math.sqrt(self.out_dim)
