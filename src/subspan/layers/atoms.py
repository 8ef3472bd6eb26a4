"""Sums of fixed matrices, M(a) = Σⱼ aⱼ Mⱼ: the factors of :mod:`subspan.layers.product_of_sums`.

Source: Wu, "ProdSumNet: reducing model parameters in deep neural networks via product-of-sums
matrix decompositions", arXiv 1809.02209, 2018. A class here says what its atoms Mⱼ are: how many,
their sum as a matrix, and where there is a shorter way than by that matrix, the product with
vectors. Adding a kind is adding a class; the registry, the tests and the tables find it.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from subspan.errors import SubspanError, check_options, unknown
from subspan.families import projection, projections
from subspan.philox import Source

DOMAIN = 48  # of the random numbers' counter: atoms
# A complex butterfly takes about as long as this many multiply-adds of a matrix product do.
BUTTERFLY = 16
HALF = (torch.bfloat16, torch.float16)

_kinds: dict[str, type[Sum]] = {}


class Sum(ABC):
    """M(a) = Σⱼ aⱼ Mⱼ, n × m, with p atoms. Pure data: the constants belong to the layer.

    Args:
        n: rows.
        m: columns.
        seed: of atoms that are random.
        stream: tells the factors of one seed apart.
        options: what the kind has beyond these: the arguments of :meth:`setup`.

    Attributes:
        p: number of coefficients; 0 of a fixed matrix.
        energy: Σⱼ ‖Mⱼ‖² (Frobenius), of random atoms in expectation; ‖M‖² of a fixed one.
        matrix_cost: multiply-adds of :meth:`matrix`.
        apply_cost: multiply-adds of :meth:`apply` for one vector; None where there is only the
            matrix.

    Raises:
        SubspanError: for a shape or an option that the kind cannot have.
    """

    kind: ClassVar[str]
    p: int
    energy: float
    matrix_cost: int = 0
    apply_cost: int | None = None

    def __init_subclass__(cls, *, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            if kind in _kinds:
                raise TypeError(f"a kind of atoms named {kind!r} is registered already")
            cls.kind = kind
            _kinds[kind] = cls

    def __init__(self, n: int, m: int, seed: int, stream: int, **options: Any) -> None:
        self.n, self.m = n, m
        self.source = Source(seed, DOMAIN, stream)
        check_options(self.kind, options, self.setup)
        self.options = options
        self.setup(**options)

    @abstractmethod
    def setup(self) -> None:
        """Check the shape, and set ``p``, ``energy`` and the costs."""

    def constants(self) -> tuple[Tensor, ...]:
        """Make the tensors that every product needs, from the seed."""
        return ()

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:
        """M(a), (n, m); by default what :meth:`apply` makes of the identity.

        Args:
            a: (p,); of a fixed matrix anything with the device and dtype wanted.
            constants: of :meth:`constants`.
        """
        eye = torch.eye(self.m, dtype=a.dtype, device=a.device)
        return self.apply(eye, a, *constants).T

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        """M(a) x for rows: (…, m) → (…, n)."""
        raise NotImplementedError

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:
        """M(a)ᵀ y for rows: (…, n) → (…, m)."""
        raise NotImplementedError

    def _square(self) -> None:
        if self.n != self.m:
            raise SubspanError(f"{self.kind} must be square, got {self.n} × {self.m}")

    def _count(self, p: int) -> None:
        if isinstance(p, bool) or not isinstance(p, int) or p < 1:
            raise SubspanError(f"{self.kind} needs p >= 1 atoms, got {p!r}")
        self.p = p

    def _normals(self, *shape: int, column: int = 0) -> Tensor:
        return self.source.normals(0, math.prod(shape), column=column).view(shape)


def kinds() -> list[str]:
    """All kinds by name; those of :func:`subspan.projections` are atoms, too."""
    return sorted({*_kinds, *projections()})


def atoms(kind: str, n: int, m: int, *, seed: int = 0, stream: int = 0, **options: Any) -> Sum:
    """A sum of fixed matrices by name.

    Raises:
        SubspanError: for an unknown kind or option, or a shape that the kind cannot have.
    """
    if kind in _kinds:
        if kind in projections():
            raise SubspanError(
                f"{kind!r} is a kind of atoms and a projection: give the projection another name"
            )
        return _kinds[kind](n, m, seed, stream, **options)
    if kind in projections():
        return Projected(n, m, seed, stream, family=kind, **options)
    raise unknown("kind of atoms", kind, kinds())


# ---- dense atoms ---------------------------------------------------------------------------------


class Projected(Sum):
    """A projection of the library, reshaped: column j of P is Mⱼ, row by row."""

    kind = "projection"

    def setup(self, family: str, p: int, **options: Any) -> None:  # type: ignore[override]
        """``p`` atoms, and the family's own options."""
        self.kind = family  # type: ignore[misc]
        self._count(p)
        self.projection = projection(
            family, out_dim=self.n * self.m, in_dim=p, seed=self.source.seed,
            stream=self.source.stream, **options,
        )  # fmt: skip
        self.energy = float(p)
        # A generated entry costs about a multiply-add; of hash there is one for each weight.
        self.matrix_cost = self.n * self.m * (1 if self.projection.bitwise else p)

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return self.projection.matvec(a).view(self.n, self.m)


class RankOne(Sum, kind="rank1"):
    """Mⱼ = uⱼ vⱼᵀ with normal entries, E‖Mⱼ‖² = 1: M(a) = U diag(a) Vᵀ, never expanded."""

    def setup(self, p: int) -> None:  # type: ignore[override]
        """``p`` atoms."""
        self._count(p)
        self.energy = float(p)
        self.matrix_cost = self.n * self.m * p
        self.apply_cost = (self.n + self.m) * p

    def constants(self) -> tuple[Tensor, ...]:  # noqa: D102
        # Vector by vector: with more atoms the first ones stay what they are.
        return (
            self._normals(self.p, self.n).T / math.sqrt(self.n),
            self._normals(self.p, self.m, column=1).T / math.sqrt(self.m),
        )

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        u, v = constants
        return (u * a) @ v.T

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        u, v = constants
        return F.linear((x @ v) * a, u)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        u, v = constants
        return F.linear((y @ u) * a, v)


class Free(Sum, kind="free"):
    """Every entry by itself, Mⱼ = e eᵀ: a factor as it is in any network."""

    def setup(self) -> None:
        """Nothing to choose."""
        self.p = self.n * self.m
        self.energy = float(self.p)

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return a.view(self.n, self.m)


class Given(Sum, kind="given"):
    """Matrices of the user's, (p, n, m), which a file must hold."""

    def setup(
        self, tensor: Tensor | None = None, shape: tuple[int, int, int] | None = None,
        energy: float = 1.0,
    ) -> None:  # fmt: skip
        """``tensor`` holds them; or a file does, and only ``shape`` and ``energy`` are known."""
        known = tensor is not None
        if shape is not None and not known:
            tensor = torch.zeros(*shape)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() != 3:
            raise SubspanError("given matrices must be one floating tensor (p, n, m)")
        if tensor.shape[1:] != (self.n, self.m):
            raise SubspanError(
                f"given matrices must be {self.n} × {self.m}, got "
                f"{tensor.shape[1]} × {tensor.shape[2]}"
            )
        self._count(tensor.shape[0])
        self.tensor = tensor
        self.energy = float(tensor.double().square().sum()) if known else energy
        if not 0 < self.energy < math.inf:
            raise SubspanError("given matrices must be finite, and not all zero")
        self.matrix_cost = self.n * self.m * self.p

    def constants(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (self.tensor,)

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return torch.tensordot(a, constants[0], dims=1)


# ---- structured atoms ----------------------------------------------------------------------------

Product = Callable[..., Tensor]


def in_float32(product: Product) -> Product:
    """Compute a product by Fourier transforms in float32 where 16 bits came; they know none."""

    @functools.wraps(product)
    def wide(self: Sum, *tensors: Tensor) -> Tensor:
        x, a, *_ = tensors
        out = product(self, *(t.float() if t.dtype in HALF else t for t in tensors))
        return out.to(torch.promote_types(x.dtype, a.dtype))

    return wide


class Diagonal(Sum, kind="diagonal"):
    """M(a) = diag(a)."""

    def setup(self) -> None:
        """Nothing to choose."""
        self._square()
        self.p = self.n
        self.energy = float(self.n)
        self.matrix_cost = self.apply_cost = self.n

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return a.diag()

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return x * a

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return self.apply(y, a)  # symmetric


class Toeplitz(Sum, kind="toeplitz"):
    """M[i, k] = a[i − k + m − 1]: constant along diagonals. Products by FFT."""

    def setup(self) -> None:
        """Nothing to choose."""
        self.p = self.n + self.m - 1
        self.energy = float(self.n * self.m)
        self.matrix_cost = self.n * self.m
        self.apply_cost = _fft_cost(self.p + self.m) * 2

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        # Row i is the window of the reversed sequence that begins at n − 1 − i.
        return a.flip(0).unfold(0, self.m, 1).flip(0)

    @in_float32
    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        size = self.p + self.m - 1
        product = torch.fft.rfft(x, size) * torch.fft.rfft(a, size)
        return torch.fft.irfft(product, size)[..., self.m - 1 :][..., : self.n]

    @in_float32
    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        size = self.p + self.n - 1
        product = torch.fft.rfft(y, size) * torch.fft.rfft(a.flip(0), size)
        return torch.fft.irfft(product, size)[..., self.n - 1 :][..., : self.m]


class Hankel(Sum, kind="hankel"):
    """M[i, k] = a[i + k]: constant along anti-diagonals, a Toeplitz matrix with its rows turned."""

    def setup(self) -> None:
        """Nothing to choose."""
        self._toeplitz = Toeplitz(self.n, self.m, self.source.seed, self.source.stream)
        for name in ("p", "energy", "matrix_cost", "apply_cost"):
            setattr(self, name, getattr(self._toeplitz, name))

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return a.unfold(0, self.m, 1)

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return self._toeplitz.apply(x.flip(-1), a)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return self._toeplitz.apply_t(y, a).flip(-1)


class BlockCirculant(Sum, kind="block-circulant"):
    """Blocks of b × b that are circulant, each with b numbers (CirCNN, Ding 2017)."""

    def setup(self, block: int) -> None:  # type: ignore[override]
        """``block``: b, which divides n and m."""
        if not isinstance(block, int) or block < 1 or self.n % block or self.m % block:
            raise SubspanError(
                f"{self.kind} needs a block that divides {self.n} and {self.m}, got {block!r}"
            )
        self.block = block
        self.p = self.n * self.m // block
        self.energy = float(self.n * self.m)
        self.matrix_cost = self.n * self.m
        blocks = self.n // block, self.m // block
        self.apply_cost = _fft_cost(block) * sum(blocks) + 2 * math.prod(blocks) * block

    def _spectra(self, a: Tensor) -> Tensor:
        return torch.fft.rfft(a.view(self.n // self.block, self.m // self.block, self.block))

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        b = self.block
        place = torch.arange(b, device=a.device)
        # (N, M, b) → (N, M, b, b): M[i, k] = a[(i − k) mod b]
        blocks = a.view(self.n // b, self.m // b, b)[..., (place[:, None] - place) % b]
        return blocks.transpose(1, 2).reshape(self.n, self.m)

    @in_float32
    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        h = torch.fft.rfft(x.unflatten(-1, (-1, self.block)))
        y = torch.einsum("...mf,nmf->...nf", h, self._spectra(a))
        return torch.fft.irfft(y, self.block).flatten(-2)

    @in_float32
    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        h = torch.fft.rfft(y.unflatten(-1, (-1, self.block)))
        x = torch.einsum("...nf,nmf->...mf", h, self._spectra(a).conj())
        return torch.fft.irfft(x, self.block).flatten(-2)


class Circulant(BlockCirculant, kind="circulant"):
    """M[i, k] = a[(i − k) mod n]; products by FFT."""

    def setup(self) -> None:  # type: ignore[override]
        """Nothing to choose."""
        self._square()
        super().setup(self.n)


class Displacement(Sum, kind="displacement"):
    """Low displacement rank r: M(a) = Σₖ Z₁(aₖ) Z₋₁(hₖ), h fixed and random (Sindhwani 2015).

    Z₁(a) is the circulant matrix with the first column a, Z₋₁(h) the skew-circulant one, in which
    what wraps around changes its sign.
    """

    def setup(self, rank: int) -> None:  # type: ignore[override]
        """``rank``: r."""
        self._square()
        if not isinstance(rank, int) or rank < 1:
            raise SubspanError(f"{self.kind} needs a rank >= 1, got {rank!r}")
        self.rank = rank
        self.p = self.n * rank
        self.energy = float(self.n) ** 2 * rank
        self.matrix_cost = self.n**3 * rank
        self.apply_cost = _fft_cost(self.n) * (4 * rank + 2)

    def constants(self) -> tuple[Tensor, ...]:  # noqa: D102
        # The diagonal that turns a skew-circulant into a circulant matrix: its real numbers.
        angle = torch.arange(self.n, dtype=torch.float64) * (-math.pi / self.n)
        turn = torch.stack([angle.cos(), angle.sin()])
        return self._normals(self.rank, self.n) / math.sqrt(self.n), turn.float()

    def _parts(self, a: Tensor, constants: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        h, turn = constants
        w = torch.complex(turn[0], turn[1])
        return torch.fft.fft(a.view(self.rank, self.n)), torch.fft.fft(h * w), w

    @in_float32
    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        circulant, skew, w = self._parts(a, constants)
        inner = torch.fft.ifft(torch.fft.fft(x * w).unsqueeze(-2) * skew) * w.conj()
        y = torch.fft.ifft(torch.fft.fft(inner.real) * circulant)
        return y.real.sum(dim=-2)

    @in_float32
    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        circulant, skew, w = self._parts(a, constants)
        inner = torch.fft.ifft(torch.fft.fft(y).unsqueeze(-2) * circulant.conj()).real
        x = torch.fft.ifft(torch.fft.fft(inner * w) * skew.conj()) * w.conj()
        return x.real.sum(dim=-2)


class KroneckerLeft(Sum, kind="kronecker-left"):
    """M(a) = A ⊗ I_k; [A₁ … A_r] ⊗ I_k beside a ``kronecker-right`` of r terms."""

    def setup(self, identity: int) -> None:  # type: ignore[override]
        """``identity``: k, which divides n and m."""
        if not isinstance(identity, int) or identity < 1 or self.n % identity or self.m % identity:
            raise SubspanError(
                f"{self.kind} needs an identity that divides {self.n} and {self.m}, got "
                f"{identity!r}"
            )
        self.k = identity
        self.p = self.n // identity * (self.m // identity)
        self.energy = float(self.p * identity)
        self.matrix_cost = self.n * self.m
        self.apply_cost = self.p * identity

    def _small(self, a: Tensor) -> Tensor:
        return a.view(self.n // self.k, self.m // self.k)

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return torch.kron(self._small(a), torch.eye(self.k, dtype=a.dtype, device=a.device))

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return (self._small(a) @ x.unflatten(-1, (-1, self.k))).flatten(-2)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return (self._small(a).T @ y.unflatten(-1, (-1, self.k))).flatten(-2)


class KroneckerRight(Sum, kind="kronecker-right"):
    """M(a): I_k ⊗ B₁ above I_k ⊗ B₂ … of r terms. KFC's Σᵣ Aᵣ ⊗ Bᵣ is a left factor times this."""

    def setup(self, identity: int, terms: int = 1) -> None:  # type: ignore[override]
        """``identity``: k, which divides m, as k · ``terms`` does n."""
        fits = all(isinstance(x, int) and x >= 1 for x in (identity, terms))
        if not fits or self.n % (identity * terms) or self.m % identity:
            raise SubspanError(
                f"{self.kind} needs an identity that divides {self.m} and, times the terms, "
                f"{self.n}, got {identity!r} and {terms!r}"
            )
        self.k, self.terms = identity, terms
        self.p = self.n // identity * (self.m // identity)
        self.energy = float(self.p * identity)
        self.matrix_cost = self.n * self.m
        self.apply_cost = self.p * identity

    def _small(self, a: Tensor) -> Tensor:
        return a.view(self.terms, -1, self.m // self.k)  # (r, rows, columns)

    def matrix(self, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        eye = torch.eye(self.k, dtype=a.dtype, device=a.device)
        return torch.cat([torch.kron(eye, small) for small in self._small(a)])

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        y = torch.einsum("...kc,trc->...tkr", x.unflatten(-1, (self.k, -1)), self._small(a))
        return y.flatten(-3)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        parts = y.unflatten(-1, (self.terms, self.k, -1))
        return torch.einsum("...tkr,trc->...kc", parts, self._small(a)).flatten(-2)


class Shifts(Sum, kind="convolution"):
    """A convolution of images as a matrix: the atoms of a kernel's entry are shifts of a channel.

    Rows are (channel, row, column) of the output, columns of the input, of the same height and
    width; what lies outside the image is zero.
    """

    def setup(self, height: int, width: int, kernel: int = 3) -> None:  # type: ignore[override]
        """``height`` and ``width`` of the image, and the side of the ``kernel``, odd."""
        pixels = height * width
        if min(height, width, kernel) < 1 or self.n % pixels or self.m % pixels or kernel % 2 == 0:
            raise SubspanError(
                f"{self.kind} needs images that divide {self.n} and {self.m}, and an odd kernel, "
                f"got {height} × {width} pixels and {kernel}"
            )
        self.image, self.kernel = (height, width), kernel
        self.out, self.inside = self.n // pixels, self.m // pixels
        self.p = self.out * self.inside * kernel**2
        half = kernel // 2
        seen = [sum(0 <= i + s < side for i in range(side) for s in range(-half, half + 1))
                for side in self.image]  # fmt: skip
        self.energy = float(self.out * self.inside * math.prod(seen))
        self.matrix_cost = self.n * self.m
        self.apply_cost = self.p * pixels

    def _kernel(self, a: Tensor) -> Tensor:
        return a.view(self.out, self.inside, self.kernel, self.kernel)

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        images = x.reshape(-1, self.inside, *self.image)
        y = F.conv2d(images, self._kernel(a), padding=self.kernel // 2)
        return y.reshape(*x.shape[:-1], self.n)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        images = y.reshape(-1, self.out, *self.image)
        x = F.conv_transpose2d(images, self._kernel(a), padding=self.kernel // 2)
        return x.reshape(*y.shape[:-1], self.m)


# ---- fixed matrices ------------------------------------------------------------------------------


class Fixed(Sum):
    """One matrix, without a coefficient."""

    p = 0


class Selection(Fixed):
    """Coordinates that are picked: row i of M is a row of the identity."""

    def constants(self) -> tuple[Tensor, ...]:  # noqa: D102
        return (self._picked(),)

    def _picked(self) -> Tensor:
        """(n,) of the columns picked, no two of them equal."""
        raise NotImplementedError

    def setup(self) -> None:
        """Nothing to choose."""
        if self.n > self.m:
            raise SubspanError(
                f"{self.kind} picks from {self.m} coordinates, it cannot give {self.n}"
            )
        self.energy = float(self.n)
        self.matrix_cost = self.n * self.m
        self.apply_cost = self.n

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return x[..., constants[0]]

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return y.new_zeros(*y.shape[:-1], self.m).index_copy(-1, constants[0], y)


class Identity(Fixed, kind="identity"):
    """Ones on the diagonal: the first n coordinates, or zeros behind all m of them."""

    def setup(self) -> None:
        """Nothing to choose."""
        self.energy = float(min(self.n, self.m))
        self.matrix_cost = self.n * self.m
        self.apply_cost = self.n

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return F.pad(x, (0, self.n - self.m))  # a negative padding cuts off

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return F.pad(y, (0, self.m - self.n))


class Subsample(Selection, kind="subsample"):
    """n of m coordinates at random, in order: pixels of an image."""

    def _picked(self) -> Tensor:
        order = self.source.permutation(self.m)(torch.arange(self.m))
        return order[: self.n].sort().values


class Permutation(Selection, kind="permutation"):
    """All coordinates in another order."""

    def setup(self) -> None:
        """Nothing to choose."""
        self._square()
        super().setup()

    def _picked(self) -> Tensor:
        return self.source.permutation(self.m)(torch.arange(self.m))


class Hadamard(Fixed, kind="hadamard"):
    """The Walsh–Hadamard matrix of Sylvester's order over √n, by the fast transform."""

    def setup(self) -> None:
        """Nothing to choose."""
        self._square()
        if self.n & (self.n - 1):
            raise SubspanError(f"{self.kind} needs a power of 2, got {self.n} × {self.m}")
        self.energy = float(self.n)
        self.matrix_cost = self.n * self.n
        self.apply_cost = 2 * self.n * self.n.bit_length()

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        shape, size = x.shape, 1
        while size < self.n:
            first, second = x.reshape(-1, self.n // (2 * size), 2, size).unbind(2)
            x = torch.stack([first + second, first - second], dim=2)
            size *= 2
        return x.reshape(shape) / math.sqrt(self.n)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return self.apply(y, a)  # symmetric


class Cosines(Fixed, kind="dct"):
    """The first n two-dimensional cosines of a square image in zig-zag order, orthonormal.

    DCT-II; the image has m pixels, or ``channels`` of them: then every channel has n / channels.
    """

    def setup(self, channels: int = 1) -> None:
        """``channels`` of the image."""
        if not isinstance(channels, int) or channels < 1 or self.n % channels or self.m % channels:
            raise SubspanError(
                f"{self.kind} needs channels that divide {self.n} and {self.m}, got {channels!r}"
            )
        self.channels, self.side = channels, math.isqrt(self.m // channels)
        if self.side**2 * channels != self.m:
            raise SubspanError(
                f"{self.kind} is of square images: {self.m // channels} pixels are none"
            )
        if self.n > self.m:
            raise SubspanError(
                f"{self.kind} of an image of {self.m} pixels has no {self.n} components"
            )
        self.energy = float(self.n)
        each = self.n // channels
        self.apply_cost = channels * each * (self.m // channels)
        self.matrix_cost = self.n * self.m

    def constants(self) -> tuple[Tensor, ...]:  # noqa: D102
        one = cosines(self.side)
        order = zigzag(self.side)[: self.n // self.channels]
        rows = [(one[i][:, None] * one[j]).flatten() for i, j in order]
        return (torch.stack(rows).float(),)

    def apply(self, x: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x.unflatten(-1, (self.channels, -1)), constants[0]).flatten(-2)

    def apply_t(self, y: Tensor, a: Tensor, *constants: Tensor) -> Tensor:  # noqa: D102
        return (y.unflatten(-1, (self.channels, -1)) @ constants[0]).flatten(-2)


def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, (size, size) in float64: row k has frequency k."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def zigzag(side: int) -> list[tuple[int, int]]:
    """Frequencies (row, column) of a square in JPEG's order: (0, 0), (0, 1), (1, 0), (2, 0)."""
    found = []
    for diagonal in range(2 * side - 1):
        low, high = max(0, diagonal - side + 1), min(diagonal, side - 1)
        rows = range(low, high + 1) if diagonal % 2 else range(high, low - 1, -1)
        found += [(row, diagonal - row) for row in rows]
    return found


def _fft_cost(size: int) -> int:
    """Multiply-adds that a real transform of a size is worth."""
    return BUTTERFLY * size * max(1, size.bit_length()) // 4
