"""The Triton kernels against the families' own torch code, which defines them.

Without a CUDA device they are interpreted, a program after the other, in NumPy: sizes are small.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import subspan
from subspan import Projection
from subspan.philox import Source, philox4x32

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from subspan.kernels.gpu import (  # noqa: E402
    KERNELS,
    dense,
    draws,
    fastfood,
    fastfood_passes,
    fixed,
    kronecker,
    launch,
    rademacher,
    sparse,
)
from subspan.kernels.gpu import hash as hash_  # noqa: E402
from tests.reference import ROUNDED  # noqa: E402

pytestmark = pytest.mark.heavy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton's interpreter patches its language at every call of a function in a kernel, in which
    # most of its time goes by; once for each function does as well, and is not undone.
    from triton.runtime import interpreter

    patch, unchanged = interpreter._patch_lang, SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = functools.cache(lambda function: patch(function) and unchanged)

    def words(*arguments: Any) -> list[Any]:
        """The words of a call by their definition, twenty times as fast; see test_words."""
        low = [a.handle.data.astype(np.uint32).astype(np.int64) for a in arguments]
        *counter, k0, k1 = torch.broadcast_tensors(*map(torch.from_numpy, low))
        found = [word.numpy().astype(np.uint32) for word in philox4x32(counter, (k0, k1))]
        of_blocks = any(a.type.is_block() for a in arguments)
        kind = tl.block_type(tl.uint32, list(found[0].shape)) if of_blocks else tl.uint32
        return [tl.tensor(interpreter.TensorHandle(word, tl.uint32), kind) for word in found]

    interpreter.InterpretedFunction.rewritten_fn[draws.philox.fn] = words
EVERYTHING = {"stream": (1 << 24) - 1, "seed": (1 << 64) - (1 << 33) + 5}
LAST_STEP = (1 << 32) - 1
NORMAL = {"gaussian", "fastfood"}  # entries to about 1e-6

OPTIONS: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in sorted(KERNELS)]
OPTIONS += [("sparse", {"s": s}) for s in (1, 17, 1 << 31)]
# These have the kernels of sparse-original and sparse, with entries of their own (test_entries).
TWINS = {"sparse2", "sparse2full"}


def without_twins(cases: list[tuple[Any, ...]]) -> list[Any]:
    """Mark the cases of twins as slow; a case begins with its family."""
    return [
        pytest.param(*case, marks=pytest.mark.slow if case[0] in TWINS else ()) for case in cases
    ]


def project(
    p: Projection, x: Tensor, step: int, rows: range, adjoint: bool, kernel: bool = True
) -> Tensor:
    """A product by the kernels on the device, or by the family's own hooks on the CPU."""
    arguments = (torch.tensor(step), rows.start, rows.stop)
    if kernel:
        product = KERNELS[p.family].rmatvec if adjoint else KERNELS[p.family].matvec
        out = product(p, x.to(DEVICE), *arguments)
        assert out.dtype == torch.float32
        assert out.device.type == DEVICE
        assert out.shape == (p.in_dim if adjoint else len(rows),)
        return out.cpu()
    return (p._rmatvec if adjoint else p._matvec)(x, *arguments)


def vector(length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed))


def check(p: Projection, step: int, rows: range) -> None:
    """Both products are about as exact as torch's, by the norm: a wrong entry is 1e4 times that."""
    for adjoint in (False, True):
        x = vector(len(rows) if adjoint else p.in_dim)
        ours = project(p, x, step, rows, adjoint)
        truth = project(p, x.double(), step, rows, adjoint, kernel=False)
        torchs = project(p, x, step, rows, adjoint, kernel=False)
        own = (torchs - truth).norm()
        normals = 1.5e-6 if p.family in NORMAL else 2e-7
        assert (ours - truth).norm() <= 3 * own + normals * truth.norm(), (p, adjoint)


def test_every_family_has_kernels() -> None:
    assert set(KERNELS) == set(subspan.projections()) - {"stored"}


@pytest.mark.parametrize(("family", "options"), without_twins(OPTIONS))
@pytest.mark.parametrize(
    ("D", "d", "step", "rows"),
    [
        (1, 1, 0, range(1)),
        pytest.param(33, 33, 7, range(3, 30), marks=pytest.mark.slow),
        pytest.param(137, 20, 0, range(137), marks=pytest.mark.slow),
        (515, 70, LAST_STEP, range(345, 515)),  # blocks of 3 end as the fourth of a call, cut short
    ],
)
def test_products(
    family: str, options: dict[str, Any], D: int, d: int, step: int, rows: range
) -> None:
    check(subspan.projection(family, out_dim=D, in_dim=d, **EVERYTHING, **options), step, rows)


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_entries(family: str, options: dict[str, Any]) -> None:
    p = subspan.projection(family, out_dim=300, in_dim=37, **EVERYTHING, **options)
    rows = range(101, 190)
    for adjoint, units in ((False, torch.eye(37)[[0, 35]]), (True, torch.eye(89)[[0, 67]])):
        for unit in units:
            ours = project(p, unit, 3, rows, adjoint)
            theirs = project(p, unit, 3, rows, adjoint, kernel=False)
            tolerance = 2e-6 * theirs.abs().max() if family in ROUNDED else 0.0
            assert (ours - theirs).abs().max() <= tolerance


@pytest.mark.parametrize(("family", "options"), without_twins(OPTIONS))
def test_far_rows(family: str, options: dict[str, Any]) -> None:
    # The last calls of the generator, places beyond 2³³; D with all bits set, and a power of two.
    if (
        not subspan.projections()[family].local or family == "kronecker"
    ):  # Kronecker's factor B alone would take 20 seconds
        pytest.skip("works on all rows at once")
    for D, d in (((1 << 34) - 3, 70), (1 << 34, 9)):
        p = subspan.projection(family, out_dim=D, in_dim=d, **EVERYTHING, **options)
        check(p, 1, range(D - 40, D - 2))


def test_the_place_of_a_nonzero_in_a_long_block() -> None:
    """31 bits of a word times the length: the word's last bit, the sign, must not take part."""
    s = 3 << 29
    p = subspan.projection("sparse", out_dim=1 << 34, in_dim=8, s=s, **EVERYTHING)
    words = p.source.sequence(5, 6, column=torch.arange(8))[0]
    for j, word in enumerate(words.tolist()):
        row = 5 * s + ((word >> 1) * s >> 31)
        rows, entry = range(row - 1, row + 2), (1 - 2 * (word & 1)) * p.magnitude
        ours = project(p, torch.ones(8), 0, rows, adjoint=False)
        assert torch.equal(ours, torch.tensor([0, entry, 0]))
        ours = project(p, torch.tensor([9.0, 1.0, 9.0]), 0, rows, adjoint=True)
        assert torch.equal(ours[j], torch.tensor(entry))


@launch.kernel
def _words(out, call, column, step, tag, k0, k1):
    place, beside = tl.arange(0, 8)[:, None], tl.arange(0, 4)[None, :]
    a, b, c, d = draws.philox(call + place, column + beside, step, tag, k0, k1)
    out += place * 16 + beside * 4
    tl.store(out, a.to(tl.int64))
    tl.store(out + 1, b.to(tl.int64))
    tl.store(out + 2, c.to(tl.int64))
    tl.store(out + 3, d.to(tl.int64))


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator as a device computes it; of calls and columns the low 32 bits count."""
    if DEVICE == "cpu":
        monkeypatch.delitem(interpreter.InterpretedFunction.rewritten_fn, draws.philox.fn)
    p = subspan.projection("rademacher", out_dim=9, in_dim=3, **EVERYTHING)
    call, column, out = (1 << 32) - 3, (1 << 31) - 2, torch.empty(8, 4, 4, dtype=torch.int64)
    for step in (5, LAST_STEP):
        ours = out.to(DEVICE)
        _words[(1,)](ours, call, column, *launch.counter(p, torch.tensor(step)))
        calls = (call + torch.arange(8)) % (1 << 32)
        theirs = p.source.words(calls[:, None], column + torch.arange(4)[None, :], step)
        assert torch.equal(ours.cpu(), torch.stack(theirs, dim=-1))


@launch.kernel
def _permuted(index, out, last, step, tag, k0, k1, BITS: tl.constexpr):
    place = tl.arange(0, 128)
    x = tl.load(index + place)
    x = x.to(tl.uint32) if BITS <= 32 else x.to(tl.uint64)
    column = tl.full((1,), 1, tl.uint32)
    image = draws.permute(x, last, BITS, column, step, tag, k0, k1)
    tl.store(out + place, image.to(tl.int64))


@pytest.mark.parametrize("D", [20, 33, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, (1 << 34) - 3])
def test_permutations_about_32_bits(D: int) -> None:
    """Permutations of orthogonal and fastfood, up to 2³⁴ elements, with both numbers of rounds."""
    p = subspan.projection("orthogonal", out_dim=D, in_dim=3, **EVERYTHING)
    index = torch.cat((torch.arange(64) % D, D - 1 - torch.arange(64) % D))
    ours = torch.empty(128, dtype=torch.int64, device=DEVICE)
    arguments = (D - 1, *launch.counter(p, torch.tensor(5)), (D - 1).bit_length())
    _permuted[(1,)](index.to(DEVICE), ours, *arguments)
    assert torch.equal(ours.cpu(), p.source.permutation(D, column=1, step=5)(index))


TWENTY = (1 << 20) + (1 << 11) + 77  # two blocks and a tail


@pytest.mark.parametrize(
    ("D", "d", "rows"),
    [
        (20, 3, range(20)),  # a tail of 32 rounds
        (1000, 9, range(7, 1000)),  # and one of 8
        (1024, 1, range(1024)),  # one block
        (3 << 10, 1000, range(1000, 3 << 10)),  # two, and programs that begin before the range
        (3 << 10, 7, range(2048, 2100)),
        ((1 << 12) + 1, 64, range((1 << 12) - 1, (1 << 12) + 1)),  # a tail of one row
        (TWENTY, 5000, range((1 << 20) - 130, (1 << 20) + 1)),
        (TWENTY, 12_345, range((1 << 20) + 2000, TWENTY)),
        ((1 << 32) - 1, 1000, range((1 << 32) - 1500, (1 << 32) - 1)),  # 22 blocks
        (1 << 32, 1000, range((1 << 32) - 130, 1 << 32)),
        ((1 << 32) + (1 << 31) + 5, 77, range((1 << 32) - 50, (1 << 32) + 50)),
        ((1 << 32) + (1 << 31) + 5, 1 << 16, range(3 << 31, (3 << 31) + 5)),
        (1 << 40, 100_003, range((1 << 39) - 1100, (1 << 39) + 1100)),  # signs of two columns
        (1 << 40, 2, range((1 << 40) - 1100, 1 << 40)),
        ((1 << 40) - 3, 70, range((1 << 40) - 2100, (1 << 40) - 3)),
    ],
)
def test_shuffled_rows(D: int, d: int, rows: range) -> None:
    """In blocks of all sizes, across their borders and in the tail, the bits of the definition."""
    p = subspan.projection("hash", out_dim=D, in_dim=d, **EVERYTHING)
    w = vector(d)
    assert torch.equal(project(p, w, 5, rows, False), project(p, w, 5, rows, False, kernel=False))
    check(p, 5, rows)


def test_only_the_tail_is_part_of_the_program() -> None:
    """Projections whose tails are about as long share a kernel, however large they are."""
    constants = set()
    for blocks in (0, 1, 1 << 10, 1 << 29):
        p = subspan.projection("hash", out_dim=(blocks << 10) + 1000, in_dim=9)
        grid, arguments = hash_._arguments(p, torch.tensor(0), 0, p.out_dim)
        assert grid == (blocks + 1,)
        constants.add(arguments[-1])
    assert constants == {10}


@launch.kernel
def _rest(x, out, lead, d, factor):
    place = tl.arange(0, 128)
    word, factor = tl.load(x + place).to(tl.uint32), factor.to(tl.uint32).to(tl.uint64)
    rest = hash_._modulo(word, lead.to(tl.uint32), d.to(tl.uint32), factor)
    tl.store(out + place, rest.to(tl.int64))


@pytest.mark.parametrize("d", [1, 2, 3, 641, 1 << 16, (1 << 30) + 1, 1 << 30, (1 << 31) - 1])
def test_remainders(d: int) -> None:
    """Words about multiples of d, where a quotient that is wrong by one shows."""
    multiples = torch.linspace(0, (1 << 32) // d, 32, dtype=torch.float64).long() * d
    x = torch.cat([multiples + k for k in (-1, 0, 1, d // 2)]).clamp(0, (1 << 32) - 1)
    for offset in (0, d - 1, d // 3):
        ours = torch.empty(128, dtype=torch.int64, device=DEVICE)
        _rest[(1,)](x.to(DEVICE), ours, offset, d, launch.word(((1 << 32) - 1) // d))
        assert torch.equal(ours.cpu(), (x + offset) % d)


@pytest.mark.parametrize("family", ["hash", "kronecker", "orthogonal", "gaussian", "sparse"])
def test_many_columns(family: str) -> None:
    check(subspan.projection(family, out_dim=900, in_dim=300, seed=1), 1, range(830, 890))


def test_the_largest_block_of_one_program() -> None:
    check(subspan.projection("fastfood", out_dim=5000, in_dim=2100), 1, range(4400, 4490))


@pytest.mark.parametrize("programs", [1, 1 << 10])
def test_slabs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: longer vectors go through in parts."""
    monkeypatch.setattr(rademacher, "SLAB", 128)
    monkeypatch.setattr(rademacher, "PROGRAMS", programs)
    check(subspan.projection("rademacher", out_dim=500, in_dim=140, seed=1), 1, range(100, 400))
    monkeypatch.setattr(sparse, "SLAB", 50)
    monkeypatch.setattr(sparse, "PROGRAMS", programs)
    check(subspan.projection("sparse", out_dim=500, in_dim=30, s=23), 1, range(100, 210))
    monkeypatch.setattr(kronecker, "PART", 60)
    check(subspan.projection("kronecker", out_dim=500, in_dim=30), 1, range(100, 450))
    monkeypatch.setattr(dense, "LEAST", 2)
    monkeypatch.setattr(dense, "PROGRAMS", programs)
    check(subspan.projection("gaussian", out_dim=500, in_dim=5), 1, range(100, 390))
    monkeypatch.setattr(fastfood, "PROGRAMS", programs)
    check(subspan.projection("fastfood", out_dim=3000, in_dim=5), 1, range(100, 2400))


def test_factors_of_more_rows_than_a_call_has_signs() -> None:
    check(subspan.projection("kronecker", out_dim=(1 << 14) + 1, in_dim=9), 1, range(7000, 7100))


@pytest.mark.parametrize("family", without_twins([(family,) for family in sorted(KERNELS)]))
def test_the_same_bits_twice_wherever_a_vector_begins(family: str) -> None:
    p = subspan.projection(family, out_dim=150, in_dim=12)
    rows, whole = range(40, 70), vector(31)
    there = whole.to(DEVICE)[1:]
    ours = project(p, whole[1:].clone(), 0, rows, True)
    assert torch.equal(project(p, there, 0, rows, True), ours)
    assert torch.equal(
        project(p, there[:12], 0, rows, False), project(p, whole[1:13], 0, rows, False)
    )


@pytest.mark.parametrize(("levels", "group"), [(1, 256), (2, 1 << 20)])
def test_blocks_of_several_passes(levels: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastfood, "LARGEST", 3)
    for name, value in {
        "ROW": 5,
        "LEVELS": levels,
        "BESIDE": 8,
        "TILE": 64,
        "GROUP": group,
    }.items():
        monkeypatch.setattr(fastfood_passes, name, value)
    check(subspan.projection("fastfood", out_dim=900, in_dim=100, **EVERYTHING), 9, range(200, 390))
    check(subspan.projection("fastfood", out_dim=400, in_dim=65, **EVERYTHING), 9, range(129, 256))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("family", without_twins([(family,) for family in sorted(KERNELS)]))
@pytest.mark.parametrize("value", [math.nan, pytest.param(-math.inf, marks=pytest.mark.slow)])
def test_what_is_not_finite_stays_so(family: str, value: float) -> None:
    p = subspan.projection(family, out_dim=90, in_dim=20, seed=3)
    for adjoint, size in ((False, 20), (True, 60)):
        x = vector(size)
        x[size // 2] = value
        ours = project(p, x, 0, range(20, 80), adjoint)
        torchs = project(p, x, 0, range(20, 80), adjoint, kernel=False)
        assert not ours[~torchs.isfinite()].isfinite().any()
        if family == "hash" or (family.startswith("sparse") and "s" in vars(p)):
            # Sums of few elements: the others do not notice.
            torch.testing.assert_close(ours, torchs, equal_nan=True)


def test_both_infinities_are_nan() -> None:
    p = subspan.projection("hash", out_dim=40, in_dim=1)
    g = p.matvec(torch.full((1,), math.inf))
    assert project(p, g, 0, range(40), True) == math.inf
    assert project(p, -g, 0, range(40), True) == -math.inf
    assert project(p, g.abs(), 0, range(40), True).isnan()


@pytest.mark.parametrize("size", [2.0**-140, 1.0, 2.0**120])
def test_fixed_point_has_room_for_every_size(size: float) -> None:
    p = subspan.projection("hash", out_dim=130, in_dim=3)
    x = vector(130) * size
    x[::2] *= 2.0**-9
    ours = project(p, x, 0, range(130), True)
    truth = project(p, x.double(), 0, range(130), True, kernel=False)
    torch.testing.assert_close(ours, truth.float(), rtol=3e-7, atol=2.0**-148)
    # All of one sign, the largest sum that there can be; and one that float32 cannot hold.
    equal = torch.full((130,), 1.99).copysign(p.matvec(torch.ones(3))) * size
    truth = project(p, equal.double(), 0, range(130), True, kernel=False)
    torch.testing.assert_close(
        project(p, equal, 0, range(130), True), truth.float(), rtol=3e-7, atol=2.0**-148
    )
    equal *= torch.finfo(torch.float32).max / equal.abs()
    assert project(p, equal, 0, range(130), True).isinf().all()
    assert not project(p, torch.zeros(130), 0, range(130), True).any()


@triton.jit
def _normals(words, out, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    cosine, sine = draws.normal_pair(tl.load(words + place).to(tl.uint32))
    tl.store(out + place * 2, cosine)
    tl.store(out + place * 2 + 1, sine)


def test_normals_of_every_radius_and_angle() -> None:
    """To 3e-6, all 2¹⁶ radii and all 2¹⁴ angles, signs included; as the definition has them."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1 << 32, (1 << 17,), generator=generator)
    words[: 1 << 16] = words[: 1 << 16] & 0xFFFF0000 | torch.arange(1 << 16)
    angles = torch.arange(1 << 14).repeat(4) << 16
    words[1 << 16 :] = words[1 << 16 :] & 0xC000FFFF | angles

    class Words(Source):
        def _calls(self, *arguments: Any) -> Any:
            return words.view(-1, 4).unbind(dim=1)

    truth = Words(0, 1).normals(0, 2 * words.numel(), dtype=torch.float64)
    signed = (words - (words >> 31 << 32)).to(torch.int32).to(DEVICE)
    ours = torch.empty(2 * words.numel(), device=DEVICE)
    _normals[(1 << 5,)](signed, ours, 1 << 12)
    assert (ours.cpu() - truth).abs().max() < 3e-6


def test_largest_finite_element() -> None:
    x = torch.tensor([1.0, -7.0, math.nan, -math.inf, 3.0], device=DEVICE)
    sums = fixed.Sums.of(x, 4, 5)
    assert sums.scale == 2.0 ** (62 - 3 - 3)
    assert sums.scale * sums.inverse == 1


# ---- on a device -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "options"), OPTIONS)
@pytest.mark.parametrize(("D", "d"), [(61_706, 290), (472_610, 75), (20_000, 6_000)])
def test_public_products_on_a_device(family: str, options: dict[str, Any], D: int, d: int) -> None:
    p = subspan.projection(family, out_dim=D, in_dim=d, **EVERYTHING, **options)
    rows = range(D // 3, D - 7)
    for product, x in ((p.matvec, vector(d)), (p.rmatvec, vector(len(rows)))):
        truth = product(x.double(), step=LAST_STEP, rows=rows)
        ours = product(x.cuda(), step=LAST_STEP, rows=rows)
        assert ours.is_cuda
        assert torch.equal(product(x.cuda(), step=LAST_STEP, rows=rows), ours)
        own = (product(x, step=LAST_STEP, rows=rows) - truth).norm()
        assert (ours.cpu() - truth).norm() <= 4 * own + 2e-6 * truth.norm()
    if p.bitwise:
        w = vector(d)
        assert torch.equal(p.matvec(w.cuda(), rows=rows).cpu(), p.matvec(w, rows=rows))


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    p = subspan.projection("rademacher", out_dim=1000, in_dim=70)
    w = vector(70)
    with torch.cuda.device(0):
        there = p.matvec(w.to("cuda:1"))
        assert there.device == torch.device("cuda:1")
        assert torch.equal(there.cpu(), p.matvec(w.to("cuda:0")).cpu())
