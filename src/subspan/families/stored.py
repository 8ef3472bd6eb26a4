"""A projection that is stored after all: what the generated ones are compared with.

Source: Minut 2023, supplement: the same matrix kept dense, or sparse by coordinates (coo), rows
(csr) or columns (csc); QR makes the columns of the dense one orthonormal.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.errors import SubspanError, unknown
from subspan.families.base import Projection
from subspan.families.registry import projection
from subspan.families.sparse import Sparse

LAYOUTS = {  # and the methods that give what a sparse matrix holds
    "dense": (),
    "coo": ("indices", "values"),
    "csr": ("crow_indices", "col_indices", "values"),
    "csc": ("ccol_indices", "row_indices", "values"),
}


@dataclass(frozen=True)
class Stored(Projection, family="stored"):
    """Another family's matrix, materialised and kept (Minut 2023): for comparison only.

    Args:
        of: the family whose entries are stored.
        layout: "dense", "coo", "csr" or "csc".
        qr: orthonormalise the columns by a QR decomposition first (of the dense layout only).
    """

    of: str = "gaussian"
    layout: str = "dense"
    qr: bool = False
    domain = 0
    norm = "expected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        if self.of == self.family:
            raise SubspanError("'stored' cannot store itself: give `of` another projection")
        if self.qr and self.layout != "dense":
            raise SubspanError(f"qr fills the matrix: use layout='dense', not {self.layout!r}")
        _ = self.inner

    @property
    def inner(self) -> Projection:
        """The projection whose entries are stored."""
        return projection(
            self.of, out_dim=self.out_dim, in_dim=self.in_dim, seed=self.seed, stream=self.stream
        )

    def _rows(self, x: Tensor, step: Tensor, start: int, stop: int, adjoint: bool) -> Tensor:
        """Return stored rows, or their transpose; the matrix is built once, ranges are cut."""
        matrix = _matrix(self, int(step), x.device, x.dtype)
        if (start, stop) != (0, self.out_dim):
            matrix = _layout(matrix.to_dense()[start:stop], self.layout)
        return matrix.t() if adjoint else matrix  # .T does not know the compressed layouts

    def _matvec(self, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        return self._rows(w, step, start, stop, adjoint=False) @ w

    def _rmatvec(self, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        return self._rows(g, step, start, stop, adjoint=True) @ g


@functools.lru_cache(maxsize=64)  # as many layers; see `forget`
def _matrix(stored: Stored, step: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if stored.layout != "dense" and isinstance(stored.inner, Sparse):
        like = torch.empty(0, device=device, dtype=dtype)
        return _layout(stored.inner.coo(like, torch.tensor(step)), stored.layout)
    matrix = stored.inner.dense(step=step, dtype=dtype).to(device)
    if stored.qr:
        # Signs of R's diagonal made positive: the factor is then unique.
        q, r = torch.linalg.qr(matrix)
        matrix = q * r.diagonal().sign()
    return _layout(matrix, stored.layout)


def forget() -> None:
    """Drop all matrices."""
    _matrix.cache_clear()


def stored_bytes(stored: Stored, device: torch.device) -> int:
    """Count the bytes of the float32 matrix on a device: values and indices."""
    matrix = _matrix(stored, 0, device, torch.float32)
    parts = [getattr(matrix, method)() for method in LAYOUTS[stored.layout]] or [matrix]
    return sum(part.nbytes for part in parts)


def _layout(matrix: Tensor, layout: str) -> Tensor:
    if layout == "dense":
        return matrix
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        sparse: Tensor = getattr(matrix, f"to_sparse_{layout}")()
    return sparse.coalesce() if layout == "coo" else sparse
