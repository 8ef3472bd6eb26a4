"""Independent normal entries: P_ij ~ N(0, 1/D).

Source: Li, Farkhoor, Liu and Yosinski, "Measuring the intrinsic dimension of objective
landscapes", ICLR 2018 (their dense projection, columns of unit norm).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from subspan.families.dense import Sequences


@dataclass(frozen=True)
class Gaussian(Sequences, family="gaussian"):
    """Independent normal entries of variance 1/D (Li 2018).

    Entry (i, j) is number i of sequence j of the source's normals.
    """

    domain = 1
    norm = "expected"

    @property
    def _draw(self) -> Callable[..., Tensor]:
        return self.source.normals
