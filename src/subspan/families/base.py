"""Projection: a linear map P from d coordinates to D weights, generated and never stored.

The one abstraction of this library. A family of projections is one file with one subclass of
:class:`Projection` (or of :class:`~subspan.families.dense.DenseProjection`, which needs a single
method); defining the class registers it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from subspan import kernels
from subspan.errors import SubspanError, is_integer
from subspan.families.operator import as_step, product
from subspan.families.registry import FAMILIES
from subspan.families.updates import add_, gather
from subspan.philox import Source
from subspan.precision import full_precision

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

BLOCK = 1 << 20  # rows that an update in place computes at once


@dataclass(frozen=True)
class Projection(ABC):
    """P: R^d → R^D as pure data. Holds no tensor, pickles to a few bytes, hashes and compares.

    Every entry of P is a function of (seed, family, stream, step, row, column): see
    ``docs/format.md``. Columns have unit Euclidean norm, exactly or in expectation.

    Args:
        out_dim: D, the number of weights (rows), in [d, 2³⁴]; of ``hash`` in [d, 2⁴⁰].
        in_dim: d, the number of coordinates (columns), at least 1 and below 2³¹.
        seed: in [0, 2⁶⁴).
        stream: in [0, 2²⁴); tells projections of one seed apart.

    Raises:
        SubspanError: for a value outside these ranges.
    """

    out_dim: int
    in_dim: int
    seed: int = 0
    stream: int = 0
    recipe: str = field(init=False, repr=False, compare=False)
    """The family and the arguments as JSON, which ``registry.from_recipe`` turns back into this."""

    family: ClassVar[str]
    """The registered name."""
    domain: ClassVar[int]
    """The family's own part of the random numbers' counter, in [0, 2⁸)."""
    norm: ClassVar[Literal["exact", "expected"]]
    """Whether columns have norm 1 or squared norm 1 in expectation."""
    orthonormal: ClassVar[bool] = False
    """Whether PᵀP = I exactly."""
    bitwise: ClassVar[bool] = False
    """Whether P w is one product per weight, hence bit-equal on every backend; else sums round."""
    most: ClassVar[int] = 1 << 34
    """The largest D."""
    local: ClassVar[bool] = True
    """Whether a range of rows costs in proportion to its length; else as much as all rows."""

    def __init_subclass__(cls, *, family: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None:
            FAMILIES.add(family, cls)
            cls.family = family

    def __post_init__(self) -> None:
        for name, low, high in (("in_dim", 1, (1 << 31) - 1), ("out_dim", 1, self.most)):
            if not is_integer(value := getattr(self, name), low, high):
                raise SubspanError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
        if self.in_dim > self.out_dim:
            raise SubspanError(
                f"a subspace of dimension d={self.in_dim} does not fit in D={self.out_dim} "
                f"weights; use d <= {self.out_dim}"
            )
        _ = self.source  # refuses a seed or stream out of range
        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        recipe = json.dumps({"family": self.family} | arguments, sort_keys=True)
        object.__setattr__(self, "recipe", recipe)  # here, because a compiler cannot trace JSON

    @property
    def source(self) -> Source:
        """The random numbers of this projection."""
        return Source(self.seed, self.domain, self.stream)

    # ---- the public products: validate once, then the operator -------------------------------

    def matvec(self, w: Tensor, *, step: int | Tensor = 0, rows: range | None = None) -> Tensor:
        """Rows of P w.

        Args:
            w: (d,) coordinates, of a floating dtype.
            step: which redraw of P, in [0, 2³²); a 0-D int64 tensor where it changes inside a
                compiled region.
            rows: a range with step 1 inside [0, D); all rows by default.

        Returns:
            (len(rows),) in the dtype and on the device of ``w``.

        Raises:
            SubspanError: for a vector, range or step that does not fit.
        """
        rows = self._check(w, "w", step, rows, length=self.in_dim)
        return product(w, as_step(step), self.recipe, rows.start, rows.stop, False)

    def rmatvec(self, g: Tensor, *, step: int | Tensor = 0, rows: range | None = None) -> Tensor:
        """Pᵀ g restricted to the given rows: the exact adjoint of :meth:`matvec`.

        Args:
            g: (len(rows),) weights or gradients, of a floating dtype.
            step: as in :meth:`matvec`.
            rows: as in :meth:`matvec`.

        Returns:
            (d,) in the dtype and on the device of ``g``.

        Raises:
            SubspanError: for a vector, range or step that does not fit.
        """
        rows = self._check(g, "g", step, rows, length=None)
        return product(g, as_step(step), self.recipe, rows.start, rows.stop, True)

    @torch.no_grad()
    def addmv_(
        self,
        theta: Tensor,
        w: Tensor,
        *,
        alpha: float = 1.0,
        step: int | Tensor = 0,
        rows: range | None = None,
    ) -> Tensor:
        """Add to weights in place: θ ← θ + α P w for the given rows, as ``Tensor.addmv_`` would.

        Rows of P w exist BLOCK at a time (all of them for a family that is not ``local``), so that
        the update of a re-drawn basis needs no second vector of weights. No gradient is recorded.

        Args:
            theta: (len(rows),) contiguous, of a floating dtype; 16-bit weights are added up in the
                precision of ``w``, and rounded once.
            w: (d,) coordinates of float32 or float64, on the device of ``theta``.
            alpha: a factor.
            step: as in :meth:`matvec`.
            rows: as in :meth:`matvec`.

        Returns:
            ``theta``.

        Raises:
            SubspanError: for a vector, range or step that does not fit; nothing is changed then.
        """
        rows = self._check_update(w, theta, "theta", step, rows)
        if abs(alpha) == 1:  # the sign of every product, exactly
            add_(self, [theta], w * alpha, as_step(step), rows.start)
            return theta
        for block in self.blocks_of(rows):
            part = theta[block.start - rows.start : block.stop - rows.start]
            along = product(w, as_step(step), self.recipe, block.start, block.stop, False)
            part.add_(along, alpha=alpha)
        return theta

    @torch.no_grad()
    def addrmv_(
        self,
        w: Tensor,
        g: Tensor,
        *,
        alpha: float = 1.0,
        step: int | Tensor = 0,
        rows: range | None = None,
    ) -> Tensor:
        """Add to coordinates in place: w ← w + α Pᵀ g for the given rows, BLOCK of them at a time.

        So the gradients of several tensors are gathered one by one, and a 16-bit gradient is
        never copied whole. No gradient is recorded.

        Args:
            w: (d,) coordinates of float32 or float64, contiguous.
            g: (len(rows),) contiguous, of a floating dtype, on the device of ``w``.
            alpha: a factor.
            step: as in :meth:`matvec`.
            rows: as in :meth:`matvec`.

        Returns:
            ``w``.

        Raises:
            SubspanError: for a vector, range or step that does not fit; nothing is changed then.
        """
        rows = self._check_update(w, g, "g", step, rows)
        return w.add_(gather(self, [g], w, as_step(step), rows.start), alpha=alpha)

    def blocks_of(self, rows: range) -> Iterator[range]:
        """Cut rows into ranges of BLOCK, or into one where a part costs as much as the whole."""
        size = BLOCK if self.local else max(1, len(rows))
        for start in range(rows.start, rows.stop, size):
            yield range(start, min(start + size, rows.stop))

    def _check_update(
        self, w: Tensor, x: Tensor, name: str, step: int | Tensor, rows: range | None
    ) -> range:
        rows = self._check(x, name, step, rows, length=None)
        self._check(w, "w", step, rows, length=self.in_dim)
        if w.dtype not in (torch.float32, torch.float64):
            raise SubspanError(f"w must be float32 or float64 in an update, got {w.dtype}")
        for vector, of in ((w, "w"), (x, name)):
            if is_traceable_wrapper_subclass(vector):
                raise SubspanError(
                    f"{of} is a {type(vector).__name__}, which has no memory of its own: give the "
                    "ordinary tensors that it is made of, each with its rows"
                )
            if not vector.is_contiguous():
                raise SubspanError(f"{of} must be contiguous in an update: use .contiguous()")
        if w.device != x.device:
            raise SubspanError(f"w is on {w.device} and {name} on {x.device}: move one of them")
        return rows

    def dense(
        self,
        *,
        step: int | Tensor = 0,
        rows: range | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Rows of P as a (len(rows), d) matrix on the CPU: for tests, pictures, small problems."""
        like = torch.empty(self.in_dim, dtype=dtype, device="cpu")
        rows = self._check(like, "dtype", step, rows, length=self.in_dim)
        with full_precision(like.device):
            return self._dense(like, as_step(step), rows.start, rows.stop)

    def _check(
        self, x: Tensor, name: str, step: int | Tensor, rows: range | None, length: int | None
    ) -> range:
        rows = range(self.out_dim) if rows is None else rows
        inside = isinstance(rows, range) and 0 <= rows.start <= rows.stop <= self.out_dim
        if not inside or rows.step != 1:
            raise SubspanError(f"rows must be a range inside range(0, {self.out_dim}), got {rows}")
        expected = len(rows) if length is None else length
        if not isinstance(x, Tensor) or x.shape != (expected,):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise SubspanError(f"{name} must be a tensor of shape ({expected},), got {got}")
        if x.dtype not in FLOATS:
            raise SubspanError(f"{name} must be of a floating dtype, got {x.dtype}")
        if isinstance(step, Tensor):
            if step.dim() != 0 or step.dtype != torch.int64:
                raise SubspanError("step must be an integer or a 0-D int64 tensor")
        elif not isinstance(step, int) or not 0 <= step < 1 << 32:
            raise SubspanError(f"step must be an integer in [0, 2^32), got {step!r}")
        return rows

    # ---- what a family writes --------------------------------------------------------------------

    @abstractmethod
    def _matvec(self, w: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        """Rows start … stop−1 of P w, at least one; ``w`` is contiguous (d,) float32 or float64."""

    @abstractmethod
    def _rmatvec(self, g: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        """Return the adjoint; ``g`` is contiguous (stop − start,) float32 or float64."""

    def _dense(self, like: Tensor, step: Tensor, start: int, stop: int) -> Tensor:
        """Rows start … stop−1 of P, (stop − start, d); a family may have a faster way than this."""
        identity = torch.eye(self.in_dim, dtype=like.dtype, device=like.device)
        columns = [self._apply(e, step, start, stop, adjoint=False) for e in identity]
        return torch.stack(columns, dim=1)

    def check_coordinates(self, w: Tensor) -> None:
        """Refuse coordinates that have got another length: kernels would read past their end."""
        if w.numel() != self.in_dim:
            raise SubspanError(
                f"there are {w.numel()} coordinates now, and the projection has {self.in_dim} "
                "columns: subspan.grow() makes a subspace larger, no other way changes its size"
            )

    def _apply(self, x: Tensor, step: Tensor, start: int, stop: int, adjoint: bool) -> Tensor:
        """Clean input for the hooks: low precisions in float32, kernels where they exist."""
        if not adjoint:
            self.check_coordinates(x)
        if start == stop:
            return x.new_zeros(self.in_dim if adjoint else 0)
        work = x.contiguous() if x.dtype == torch.float64 else x.to(torch.float32).contiguous()
        with full_precision(x.device):
            if kernel := kernels.find(self.family, work):
                product = kernel.rmatvec if adjoint else kernel.matvec
                out = product(self, work, step, start, stop)
            else:
                out = (self._rmatvec if adjoint else self._matvec)(work, step, start, stop)
        return out.to(x.dtype)
