"""The laws of every projection. A law is a function of one projection.

``LAWS`` hold at every size; ``COSTLY`` ones need seconds or redraw P many times at a size of their
own, and are run once for every family and option. tests/families/test_laws.py enrols every
registered family by itself; a family of somebody else is held to them by

    for law in (*laws.LAWS, *laws.COSTLY):
        law(subspan.projection("mine", out_dim=1009, in_dim=40))

The dense float64 matrix that products are compared with is :meth:`Projection.dense`; its entries
are compared with the definition in docs/format.md in tests/families/test_entries.py.
"""

from __future__ import annotations

import functools
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspan import Projection, SubspanError, kernels
from subspan.families import base
from subspan.families.operator import project
from subspan.families.registry import from_recipe

Law = Callable[[Projection], None]
LAWS: list[Law] = []
COSTLY: list[Law] = []

examples = settings(max_examples=5, deadline=None, derandomize=True, database=None)
DTYPES = (torch.float32, torch.float64)
LAST = 2**32 - 1  # step


def law(function: Law) -> Law:
    """Enrol a law that holds at every size."""
    LAWS.append(function)
    return function


def costly(function: Law) -> Law:
    """Enrol a law that is run once for every family and option."""
    COSTLY.append(function)
    return function


def ranges(p: Projection) -> st.SearchStrategy[range]:
    """Ranges of rows, empty ones too."""
    ends = st.tuples(st.integers(0, p.out_dim), st.integers(0, p.out_dim))
    return ends.map(lambda pair: range(min(pair), max(pair)))


@functools.lru_cache(maxsize=16)
def dense(p: Projection, step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """:meth:`Projection.dense`, made once for the laws of a projection, which follow each other."""
    return p.dense(step=step, dtype=dtype)


def vector(length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(length, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, rounded: Tensor, exact: Tensor, size: Tensor) -> None:
    """Whether a product is as good as a matrix product in its own dtype.

    Args:
        got: the product.
        rounded: the same by a dense matrix in the dtype of ``got``.
        exact: the same in float64.
        size: the same of absolute values: the rounding error of one operation is eps times this.
    """
    assert got.shape == exact.shape
    own = (rounded.double() - exact).abs().max() if exact.numel() else torch.tensor(0.0)
    tolerance = 4 * own + 4 * torch.finfo(got.dtype).eps * size.norm()
    assert ((got.double() - exact).abs() <= tolerance).all()


# ---- products ------------------------------------------------------------------------------------


@law
def entries_are_the_products_of_unit_vectors(p: Projection) -> None:
    """P e_j is column j of the dense matrix, and row i is the adjoint of e_i."""
    for dtype in DTYPES:
        P = dense(p, LAST, dtype)
        assert P.shape == (p.out_dim, p.in_dim)
        assert P.dtype == dtype
        for j in {0, p.in_dim // 2, p.in_dim - 1}:
            unit = torch.eye(p.in_dim, dtype=dtype)[j]
            scale = P.abs().max() * torch.finfo(dtype).eps
            assert (p.matvec(unit, step=LAST) - P[:, j]).abs().max() <= (
                0 if p.bitwise else 16
            ) * scale
        for i in {0, p.out_dim // 2, p.out_dim - 1}:
            row = p.rmatvec(torch.ones(1, dtype=dtype), step=LAST, rows=range(i, i + 1))
            scale = P.abs().max() * torch.finfo(dtype).eps
            assert (row - P[i]).abs().max() <= (0 if p.bitwise else 16) * scale
    single, double = (dense(p, 0, dtype).double() for dtype in DTYPES)
    assert (single - double).abs().max() <= 1e-6 * max(1.0, float(double.abs().max()))


@law
def products_are_those_of_the_dense_matrix(p: Projection) -> None:
    """In both precisions, as exactly as a dense product in that precision."""

    @examples
    @given(rows=ranges(p), step=st.sampled_from([0, LAST]), seed=st.integers(0, 99))
    def check(rows: range, step: int, seed: int) -> None:
        for dtype in DTYPES:
            w, g = vector(p.in_dim, dtype, seed), vector(len(rows), dtype, seed)
            exact = dense(p, step)[rows.start : rows.stop]
            rounded = dense(p, step, dtype)[rows.start : rows.stop]
            forward = p.matvec(w, step=step, rows=rows)
            backward = p.rmatvec(g, step=step, rows=rows)
            w64, g64 = w.double(), g.double()
            assert_close(forward, rounded @ w, exact @ w64, exact.abs() @ w64.abs())
            assert_close(backward, g @ rounded, g64 @ exact, g64.abs() @ exact.abs())

    check()


@law
def products_are_adjoint(p: Projection) -> None:
    """⟨P w, g⟩ = ⟨w, Pᵀ g⟩ on any range of rows."""
    P = dense(p, LAST)

    @examples
    @given(rows=ranges(p), seed=st.integers(0, 99))
    def check(rows: range, seed: int) -> None:
        for dtype in DTYPES:
            w, g = vector(p.in_dim, dtype, seed), vector(len(rows), dtype, seed + 1)
            one = p.matvec(w, step=LAST, rows=rows).double() @ g.double()
            other = w.double() @ p.rmatvec(g, step=LAST, rows=rows).double()
            size = g.double().abs() @ P[rows.start : rows.stop].abs() @ w.double().abs()
            assert abs(one - other) <= 4 * torch.finfo(dtype).eps * size

    check()


@law
def rows_are_a_range(p: Projection) -> None:
    """Any parts of P put together are P, bit for bit; so is P w if it is one product per weight."""
    some = range(0, p.in_dim, p.in_dim // 3 + 1)
    wholes = {}
    for dtype in DTYPES:
        units = [torch.eye(p.in_dim, dtype=dtype)[j] for j in some]
        columns = [p.matvec(unit) for unit in units]
        expected = dense(p, 0, dtype)[:, [*some]]
        torch.testing.assert_close(torch.stack(columns, 1), expected, atol=1e-6, rtol=1e-5)
        w, g = vector(p.in_dim, dtype), vector(p.out_dim, dtype)
        wholes[dtype] = [*zip(units, columns, strict=True)], (w, p.matvec(w)), (g, p.rmatvec(g))

    @examples
    @given(
        cuts=st.lists(st.integers(0, p.out_dim), max_size=3),
        which=st.sampled_from(range(len(some))),
    )
    def check(cuts: list[int], which: int) -> None:
        ends = [0, *sorted(cuts), p.out_dim]
        parts = [range(a, b) for a, b in itertools.pairwise(ends)]
        for columns, (w, forward), (g, backward) in wholes.values():
            unit, column = columns[which]
            assert torch.equal(torch.cat([p.matvec(unit, rows=rows) for rows in parts]), column)
            together = torch.cat([p.matvec(w, rows=rows) for rows in parts])
            if p.bitwise:
                assert torch.equal(together, forward)
            torch.testing.assert_close(together, forward)
            added = sum(p.rmatvec(g[rows.start : rows.stop], rows=rows) for rows in parts)
            assert isinstance(added, Tensor)
            torch.testing.assert_close(added, backward, atol=1e-5, rtol=1e-5)

    check()


@law
def low_precisions_are_computed_in_float32(p: Projection) -> None:
    """A 16-bit vector comes back in its dtype, rounded once at the end."""
    for dtype in (torch.float16, torch.bfloat16):
        w, g = vector(p.in_dim).to(dtype), vector(p.out_dim).to(dtype)
        assert torch.equal(p.matvec(w), p.matvec(w.float()).to(dtype))
        assert torch.equal(p.rmatvec(g), p.rmatvec(g.float()).to(dtype))


@law
def updates_in_place_are_the_products_added(p: Projection) -> None:
    """θ + α P w and w + α Pᵀ g, in every precision of θ and g, whatever the blocks of rows."""
    rows = range(p.out_dim // 4, p.out_dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "BLOCK", max(1, p.out_dim // 3))
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            exact = torch.float64 if dtype == torch.float64 else torch.float32
            w, g = vector(p.in_dim, exact), vector(len(rows), seed=1).to(dtype)
            step = torch.tensor(2)
            theta, c = g.clone(), w.clone()
            assert p.addmv_(theta, w, alpha=-0.5, step=step, rows=rows) is theta
            assert p.addrmv_(c, g, alpha=-0.5, step=step, rows=rows) is c
            forward = g.to(exact) - 0.5 * p.matvec(w, step=step, rows=rows)
            backward = w - 0.5 * p.rmatvec(g.to(exact), step=step, rows=rows)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(theta, forward.to(dtype), rtol=2 * eps, atol=4 * eps)
            torch.testing.assert_close(c, backward, rtol=1e-5, atol=1e-5)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@law
def defaults_of_pytorch_do_not_matter(p: Projection) -> None:
    """The default dtype, the default device and autocast leave every product as it is."""

    narrow = replace(p, in_dim=min(p.in_dim, 3))

    def products() -> list[Tensor]:
        found = [narrow.dense()]
        for dtype, (w, g) in zip(DTYPES, vectors, strict=True):
            updates = p.addmv_(g.clone(), w), p.addrmv_(w.clone(), g)
            found += [p.matvec(w), p.rmatvec(g), narrow.dense(dtype=dtype), *updates]
        return found

    vectors = [(vector(p.in_dim, dtype), vector(p.out_dim, dtype)) for dtype in DTYPES]
    for find in (kernels.find, lambda *_: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "find", find)
            expected = products()
            autocast = torch.autocast("cpu", torch.bfloat16)
            dtypes = map(default_dtype, (torch.bfloat16, torch.float64))
            for default in (*dtypes, torch.device("meta"), autocast):
                with default:
                    found = products()
                torch.testing.assert_close(found, expected, rtol=0, atol=0)


@law
def strides_do_not_matter(p: Projection) -> None:
    """A slice of something larger is as good as a copy, and neither is changed."""
    for dtype in DTYPES:
        w, g = vector(3 * p.in_dim, dtype)[1::3], vector(2 * p.out_dim, dtype)[::2]
        before = w.clone(), g.clone()
        assert torch.equal(p.matvec(w), p.matvec(before[0]))
        assert torch.equal(p.rmatvec(g), p.rmatvec(before[1]))
        assert torch.equal(w, before[0])
        assert torch.equal(g, before[1])


# ---- columns -------------------------------------------------------------------------------------


@law
def columns_have_unit_norm(p: Projection) -> None:
    """To the last digits, where the family says so."""
    if p.norm == "exact":
        norms = dense(p).norm(dim=0)
        assert (norms - 1).abs().max() < 1e-12


@law
def columns_are_orthonormal(p: Projection) -> None:
    """PᵀP = I, where the family says so."""
    if p.orthonormal:
        P = dense(p, LAST)
        assert (P.T @ P - torch.eye(p.in_dim, dtype=torch.float64)).abs().max() < 1e-12


@functools.lru_cache(maxsize=1)
def redraws(p: Projection) -> Tensor:
    """160 matrices (160, 36, 9), by seeds and by steps. 36 rows are whole blocks for every s.

    They are those of float32, for which there are kernels.
    """
    seeds = [replace(p, out_dim=36, in_dim=9, seed=n) for n in range(40)]
    drawn = [seed.dense(step=t, dtype=torch.float32) for seed in seeds for t in range(4)]
    return torch.stack(drawn).double()


def assert_mean(samples: Tensor, expected: Tensor | float) -> None:
    """Means over the first dimension, to within six of their standard errors, in float32."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    assert ((samples.mean(dim=0) - expected).abs() <= 6 * error + 1e-6).all()


@costly
def columns_have_unit_norm_in_expectation(p: Projection) -> None:
    """The mean of squared norms over seeds and steps is 1."""
    assert_mean(redraws(p).square().sum(dim=1), 1)


@costly
def no_direction_is_preferred(p: Projection) -> None:
    """E[P] = 0 and E[P Pᵀ] = d/D I: over the redraws all weights are moved, alike and apart."""
    P = redraws(p)
    assert_mean(P, 0)
    assert_mean(P @ P.mT, 9 / 36 * torch.eye(36, dtype=torch.float64))


@costly
def redraws_are_unrelated(p: Projection) -> None:
    """Another step, stream or seed is another matrix, with nearly no correlation."""
    p = replace(p, out_dim=1009, in_dim=12, seed=5, stream=0)
    others = [replace(p, **change) for change in ADDRESSES]
    drawn = [p.dense(), *(p.dense(step=step) for step in STEPS), *(q.dense() for q in others)]
    correlation = torch.corrcoef(torch.stack([P.flatten() for P in drawn]))
    assert correlation.triu(1).abs().max() < 6 / math.sqrt(p.out_dim)


STEPS = (1, 2, 1 << 8, LAST)
ADDRESSES: list[dict[str, Any]] = [
    {"seed": 6},
    {"seed": 5 << 32},
    {"seed": 5 + (1 << 32)},
    {"seed": (1 << 64) - 1},
    {"stream": 1},
    {"stream": (1 << 24) - 1},
    {"seed": 6, "stream": 1},
]


# ---- pure data -----------------------------------------------------------------------------------


@law
def a_projection_is_pure_data(p: Projection) -> None:
    """It compares, hashes, pickles to a few bytes before and after use, and cannot be changed."""
    p.rmatvec(p.matvec(vector(p.in_dim)))
    pickled = pickle.dumps(p)
    assert len(pickled) < 300
    assert not any(isinstance(value, Tensor) for value in vars(p).values())
    copy, w, g = pickle.loads(pickled), vector(p.in_dim), vector(p.out_dim)
    for twin in (copy, from_recipe(p.recipe)):
        assert twin == p
        assert hash(twin) == hash(p)
        assert type(twin) is type(p)
        assert torch.equal(twin.matvec(w), p.matvec(w))
        assert torch.equal(twin.rmatvec(g), p.rmatvec(g))
    for change in ({"seed": p.seed + 1}, {"stream": p.stream + 1}, {"out_dim": p.out_dim + 1}):
        assert replace(p, **change) != p
        assert replace(p, **change).recipe != p.recipe
    with pytest.raises(FrozenInstanceError):
        p.seed = 1  # type: ignore[misc]


@law
def what_does_not_fit_is_refused(p: Projection) -> None:
    """With a SubspanError that names the argument; an empty range of rows fits."""
    D, d = p.out_dim, p.in_dim
    w, g = torch.ones(d), torch.ones(D)
    assert p.matvec(w, rows=range(D, D)).shape == (0,)
    assert torch.equal(p.rmatvec(g[:0], rows=range(0)), torch.zeros(d))
    for name, product, x in (("w", p.matvec, w), ("g", p.rmatvec, g)):
        for bad in (
            torch.ones(len(x) + 1),
            torch.ones(1, len(x)),
            x.long(),
            x.tolist(),
            x.cfloat(),
        ):
            with pytest.raises(SubspanError, match=rf"^{name} must be"):
                product(bad)
        for rows in (range(-1, D), range(D + 1), range(D, -1, -1), range(2, 1), [0]):
            with pytest.raises(SubspanError, match=r"^rows must be a range inside"):
                product(x, rows=rows)
        for step in (-1, 1 << 32, 1.0, torch.tensor(1.0), torch.tensor([1])):
            with pytest.raises(SubspanError, match=r"^step must be"):
                product(x, step=step)
    with pytest.raises(SubspanError, match="shape"):
        p.rmatvec(torch.ones(2), rows=range(1))
    for update, x, y in ((p.addmv_, g, w), (p.addrmv_, w, g)):
        before = x.clone()
        for bad in (
            (x, torch.ones(len(y) + 1)),
            (x, y.long()),
            (x, y.to("meta")),
            (w.half(), g) if x is w else (g, w.half()),
        ):
            with pytest.raises(SubspanError, match=r"must be|is on"):
                update(*bad)
        with pytest.raises(SubspanError, match=r"^step must be"):
            update(x, y, step=-1)
        assert torch.equal(x, before)


# ---- the operator --------------------------------------------------------------------------------


def both_products(p: Projection) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor, bool]]:
    """Each product of some rows, a vector that fits, and whether it is the adjoint."""
    some = {"step": 2, "rows": range(p.out_dim // 3, p.out_dim // 3 + 20)}
    yield functools.partial(p.matvec, **some), vector(p.in_dim), False
    yield functools.partial(p.rmatvec, **some), vector(20), True


@costly
def products_are_differentiable_twice(p: Projection) -> None:
    """Their derivative is the other product, and so on."""
    p = replace(p, out_dim=61, in_dim=7)
    for product, x, _ in both_products(p):
        assert torch.autograd.gradcheck(product, x.requires_grad_(), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(product, x)
        for dtype in (torch.bfloat16, torch.float32):  # kernels, where there are some
            leaf = x.detach().to(dtype).requires_grad_()
            (grad,) = torch.autograd.grad(product(leaf).sum(), leaf)
            assert grad.dtype == dtype
            assert grad.shape == leaf.shape


@costly
def the_operator_is_well_made(p: Projection) -> None:
    """PyTorch's own checks of a custom operator: schema, aliasing, fake tensors, autograd."""
    p = replace(p, out_dim=61, in_dim=7)
    for _, x, adjoint in both_products(p):
        arguments = (x.requires_grad_(), torch.tensor(2), p.recipe, 20, 40, adjoint)
        torch.library.opcheck(project, arguments)


@costly
def a_step_that_changes_does_not_recompile(p: Projection) -> None:
    """The products go through torch.compile in one graph, which takes the step as an input.

    So do their derivatives.
    """
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def there_and_back(x: Tensor, step: Tensor) -> Tensor:
        return p.rmatvec(p.matvec(x, step=step, rows=rows), step=step, rows=rows)

    p, rows = replace(p, out_dim=61, in_dim=7), range(5, 50)
    torch.compiler.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend=backend)
    for step in range(4):
        x = vector(p.in_dim, torch.float32, step).requires_grad_()
        ours, theirs = (run(x, torch.tensor(step)) for run in (compiled, there_and_back))
        assert torch.equal(ours, theirs)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)))
    assert len(graphs) == 1
