"""Sums of fixed matrices: every kind against its definition, and the laws that all obey."""

from __future__ import annotations

import math

import pytest
import scipy.fft
import scipy.linalg
import torch

from subspan import SubspanError, projections
from subspan.layers.atoms import atoms, kinds, zigzag

SHAPES = {  # kind: n, m, options
    "free": (4, 6, {}),
    "rank1": (5, 7, {"p": 3}),
    "given": (3, 4, {"tensor": torch.arange(24.0, dtype=torch.float64).view(2, 3, 4)}),
    "diagonal": (6, 6, {}),
    "circulant": (5, 5, {}),
    "block-circulant": (6, 9, {"block": 3}),
    "toeplitz": (4, 7, {}),
    "hankel": (7, 4, {}),
    "displacement": (6, 6, {"rank": 2}),
    "kronecker-left": (6, 9, {"identity": 3}),
    "kronecker-right": (12, 6, {"identity": 3, "terms": 2}),
    "convolution": (24, 36, {"height": 4, "width": 3}),
    "identity": (5, 3, {}),
    "subsample": (3, 16, {}),
    "permutation": (6, 6, {}),
    "hadamard": (8, 8, {}),
    "dct": (12, 32, {"channels": 2}),
} | {family: (6, 8, {"p": 5}) for family in projections()}


def made(kind, **more):
    n, m, options = SHAPES[kind]
    return atoms(kind, n, m, seed=3, stream=2, **options | more)


def coefficients(found, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(found.p, generator=generator, dtype=torch.float64)


def constants(found):
    return [t.double() if t.is_floating_point() else t for t in found.constants()]


def test_every_kind_is_here():
    assert sorted(SHAPES) == kinds()


@pytest.mark.parametrize("kind", sorted(SHAPES))
class TestLaws:
    def test_the_matrix_is_a_sum_of_atoms(self, kind):
        found = made(kind)
        fixed = constants(found)
        a = coefficients(found)
        M = found.matrix(a, *fixed)
        assert M.shape == (found.n, found.m)
        if found.p:
            each = [found.matrix(e, *fixed) for e in torch.eye(found.p, dtype=torch.float64)]
            torch.testing.assert_close(M, sum(x * one for x, one in zip(a, each, strict=True)))
        again = made(kind)
        torch.testing.assert_close(again.matrix(a, *constants(again)), M, rtol=0, atol=0)

    def test_products_are_those_of_the_matrix(self, kind):
        found = made(kind)
        fixed, a = constants(found), coefficients(found)
        M = found.matrix(a, *fixed)
        x, y = (torch.randn(2, 3, k, dtype=torch.float64) for k in (found.m, found.n))
        if found.apply_cost is None:
            return
        torch.testing.assert_close(found.apply(x, a, *fixed), x @ M.T)
        torch.testing.assert_close(found.apply_t(y, a, *fixed), y @ M)

    def test_the_energy_is_that_of_its_atoms(self, kind):
        drawn = kind in ("rank1", "displacement") or (
            kind in projections() and projections()[kind].norm != "exact"
        )
        seeds = range(100) if drawn else [0]
        total = 0.0
        for seed in seeds:
            n, m, options = SHAPES[kind]
            found = atoms(kind, n, m, seed=seed, **options)
            fixed = constants(found)
            unit = torch.eye(found.p, dtype=torch.float64) if found.p else [torch.zeros(1).double()]
            total += sum(float(found.matrix(e, *fixed).square().sum()) for e in unit)
        assert total / len(seeds) == pytest.approx(
            found.energy, rel=0.1 if len(seeds) > 1 else 1e-5
        )

    def test_gradients(self, kind):
        found = made(kind)
        fixed = constants(found)
        if found.p:
            a = coefficients(found).requires_grad_()
            assert torch.autograd.gradcheck(lambda a: found.matrix(a, *fixed), a)
            if found.apply_cost is not None:
                x = torch.randn(2, found.m, dtype=torch.float64, requires_grad=True)
                assert torch.autograd.gradcheck(lambda a, x: found.apply(x, a, *fixed), (a, x))


def matrix(kind, a=None, **more):
    found = made(kind, **more)
    a = coefficients(found) if a is None else a
    return a, found.matrix(a, *constants(found))


def test_structured_ones_are_what_they_are_called():
    a, M = matrix("toeplitz")  # a[m − 1] is on the diagonal
    expected = torch.from_numpy(scipy.linalg.toeplitz(a[6:].numpy(), a[:7].flip(0).numpy()))
    torch.testing.assert_close(M, expected)
    a, M = matrix("hankel")
    torch.testing.assert_close(
        M, torch.from_numpy(scipy.linalg.hankel(a[:7].numpy(), a[6:].numpy()))
    )
    a, M = matrix("circulant")
    torch.testing.assert_close(M, torch.from_numpy(scipy.linalg.circulant(a.numpy())))
    a, M = matrix("block-circulant")
    for i in range(2):
        for k in range(3):
            block = torch.from_numpy(scipy.linalg.circulant(a.view(2, 3, 3)[i, k].numpy()))
            torch.testing.assert_close(M[3 * i : 3 * i + 3, 3 * k : 3 * k + 3], block)
    a, M = matrix("kronecker-left")
    torch.testing.assert_close(M, torch.kron(a.view(2, 3), torch.eye(3, dtype=torch.float64)))
    a, M = matrix("kronecker-right")
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(M, torch.cat([torch.kron(eye, b) for b in a.view(2, 2, 2)]))
    a, M = matrix("diagonal")
    torch.testing.assert_close(M, torch.diag(a))


def test_a_convolution_is_one():
    a, M = matrix("convolution")
    images = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(images, a.view(2, 3, 3, 3), padding=1)
    torch.testing.assert_close(images.flatten(1) @ M.T, expected.flatten(1))


def test_low_displacement_rank_is_a_sum_of_products_of_circulants():
    found = made("displacement")
    h = constants(found)[0]
    a, M = matrix("displacement")
    expected = torch.zeros(6, 6, dtype=torch.float64)
    below = torch.ones(6, 6, dtype=torch.float64).tril()
    for one, other in zip(a.view(2, 6), h, strict=True):
        circulant = torch.from_numpy(scipy.linalg.circulant(one.numpy()))
        skew = torch.from_numpy(scipy.linalg.circulant(other.numpy())) * (2 * below - 1)
        expected += circulant @ skew
    torch.testing.assert_close(M, expected)


def test_fixed_ones_are_what_they_are_called():
    a = torch.zeros(1, dtype=torch.float64)
    _, M = matrix("hadamard", a)
    expected = torch.from_numpy(scipy.linalg.hadamard(8)).double() / math.sqrt(8)
    torch.testing.assert_close(M, expected)
    for n, m in ((3, 5), (5, 3)):
        M = atoms("identity", n, m).matrix(a)
        torch.testing.assert_close(M, torch.eye(n, m, dtype=torch.float64))
    for kind in ("subsample", "permutation"):
        _, M = matrix(kind, a)
        assert M.sum(dim=1).tolist() == [1] * len(M)
        assert M.sum(dim=0).max() == 1
        assert set(M.flatten().tolist()) == {0, 1}
        other = made(kind)
        n, m, _ = SHAPES[kind]
        assert any(
            (atoms(kind, n, m, seed=s).matrix(a, *constants(atoms(kind, n, m, seed=s))) != M).any()
            for s in range(3)
        )
        assert other.n == n


def test_the_cosines_are_those_of_an_image_in_zigzag_order():
    assert zigzag(3) == [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (1, 2), (2, 1), (2, 2)]
    image = torch.randn(2, 4, 4, dtype=torch.float64)
    found = made("dct")
    y = found.apply(image.flatten(), coefficients(found), *constants(found))
    spectrum = scipy.fft.dctn(image.numpy(), axes=(1, 2), norm="ortho")
    expected = [spectrum[c][place] for c in range(2) for place in zigzag(4)[:6]]
    torch.testing.assert_close(y, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_random_atoms_are_a_file_format():
    """docs/format.md: these numbers never change."""
    u, v = atoms("rank1", 4, 3, p=2, seed=11, stream=5).constants()
    expected = [-0.2915760278701782, -0.005801324266940355, -0.38758477568626404]
    assert (2 * u)[:3, 0].tolist() == expected
    assert (v * math.sqrt(3))[:2, 0].tolist() == pytest.approx(
        [-1.0745301246643066, -0.6245308518409729], rel=1e-6
    )
    h, _ = atoms("displacement", 4, 4, rank=1, seed=11, stream=5).constants()
    assert (2 * h).flatten()[:3].tolist() == expected
    [order] = atoms("permutation", 9, 9, seed=11, stream=5).constants()
    assert order.tolist() == [7, 0, 8, 6, 3, 4, 1, 5, 2]
    [picked] = atoms("subsample", 4, 20, seed=11, stream=5).constants()
    assert picked.tolist() == [1, 11, 15, 18]


@pytest.mark.parametrize(
    ("kind", "n", "m", "options", "message"),
    [
        ("circulant", 4, 5, {}, "circulant must be square, got 4 × 5"),
        ("diagonal", 4, 5, {}, "diagonal must be square, got 4 × 5"),
        ("displacement", 4, 5, {"rank": 1}, "displacement must be square, got 4 × 5"),
        ("displacement", 4, 4, {"rank": 0}, "displacement needs a rank >= 1, got 0"),
        ("rank1", 4, 5, {"p": 0}, "rank1 needs p >= 1 atoms, got 0"),
        ("rank1", 4, 5, {}, "rank1 needs p"),
        ("gaussian", 4, 5, {"p": 0}, "gaussian needs p >= 1 atoms, got 0"),
        ("gaussian", 4, 5, {"p": 21}, "does not fit in D=20"),
        ("hadamard", 6, 6, {}, "hadamard needs a power of 2, got 6 × 6"),
        ("dct", 17, 16, {}, "dct of an image of 16 pixels has no 17 components"),
        ("dct", 4, 15, {}, "dct is of square images: 15 pixels are none"),
        ("dct", 3, 32, {"channels": 2}, "dct needs channels that divide 3 and 32, got 2"),
        ("block-circulant", 4, 6, {"block": 4}, "needs a block that divides 4 and 6, got 4"),
        ("kronecker-left", 4, 6, {"identity": 3}, "an identity that divides 4 and 6, got 3"),
        ("kronecker-right", 4, 6, {"identity": 3}, "needs an identity that divides 6 and"),
        ("subsample", 5, 4, {}, "subsample picks from 4 coordinates, it cannot give 5"),
        ("permutation", 3, 4, {}, "permutation must be square, got 3 × 4"),
        ("given", 2, 3, {"tensor": torch.ones(1, 3, 2)}, "given matrices must be 2 × 3, got 3 × 2"),
        ("given", 2, 3, {"tensor": torch.zeros(1, 2, 3)}, "must be finite, and not all zero"),
        ("given", 2, 3, {"tensor": torch.ones(2, 3)}, r"must be one floating tensor \(p, n, m\)"),
        ("convolution", 9, 9, {"height": 3, "width": 3, "kernel": 2}, "odd kernel, got 3 × 3 pix"),
        ("convolution", 9, 8, {"height": 3, "width": 3}, "needs images that divide 9 and 8"),
        ("rank2", 4, 5, {"p": 1}, "unknown kind of atoms 'rank2': did you mean rank1"),
        ("rank1", 4, 5, {"p": 1, "q": 1}, "unknown option of rank1 'q'"),
        ("free", 4, 5, {"p": 1}, "free has no options, got 'p'"),
    ],
)
def test_what_cannot_be(kind, n, m, options, message):
    with pytest.raises(SubspanError, match=message):
        atoms(kind, n, m, **options)
