"""Independent signs: P_ij = ±1/√D.

Source: Achlioptas, "Database-friendly random projections", JCSS 2003 (the dense variant); used for
re-drawn bases by Gressmann, Eaton-Rosen and Luschi, NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from subspan.families.dense import Sequences


@dataclass(frozen=True)
class Rademacher(Sequences, family="rademacher"):
    """Independent signs, divided by √D (Achlioptas 2003).

    The sign of entry (i, j) is bit i of sequence j of the source's signs.
    """

    domain = 2
    norm = "exact"

    @property
    def _draw(self) -> Callable[..., Tensor]:
        return self.source.signs
