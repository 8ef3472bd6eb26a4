"""Independent signs: P_ij = ±1/√D.

Source: Achlioptas, "Database-friendly random projections", JCSS 2003 (the dense variant); used for
re-drawn bases by Gressmann, Eaton-Rosen and Luschi, NeurIPS 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.families.dense import DenseProjection


@dataclass(frozen=True)
class Rademacher(DenseProjection, family="rademacher"):
    """Independent signs, divided by √D (Achlioptas 2003).

    The sign of entry (i, j) is bit i of sequence j of the source's signs.
    """

    domain = 2
    norm = "exact"

    def _entries(
        self, step: Tensor, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        columns = torch.arange(self.in_dim, device=device)
        signs = self.source.signs(
            start, stop, column=columns, step=step, device=device, dtype=dtype
        )
        return signs / math.sqrt(self.out_dim)
