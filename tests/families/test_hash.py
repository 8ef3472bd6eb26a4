"""What ``hash`` promises beyond the laws: equal buckets, refinement, the same bits everywhere."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import subspan
from subspan import Projection
from subspan.cache import cache


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def hash_(D: int, d: int, **options: int) -> Projection:
    return subspan.projection("hash", out_dim=D, in_dim=d, **options)


def buckets(p: Projection) -> torch.Tensor:
    """The bucket of every row."""
    return p.dense().abs().argmax(dim=1)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(D=st.integers(1, 700), ratio=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_bucket_sizes_differ_by_one_at_most(D: int, ratio: float, seed: int) -> None:
    p = hash_(D, max(1, round(ratio * D)), seed=seed)
    P = p.dense()
    assert (P != 0).sum(dim=1).eq(1).all()
    sizes = (P != 0).sum(dim=0)
    assert sizes.sum() == D
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(sizes.sort(descending=True).values, sizes)  # the larger ones come first


@pytest.mark.parametrize(("D", "d", "k"), [(600, 10, 2), (601, 10, 3), (1009, 25, 40), (64, 1, 64)])
def test_a_finer_subspace_holds_the_coarser_one(D: int, d: int, k: int) -> None:
    # Every row has the same sign in both, and its coarse bucket is its fine one mod d.
    coarse, fine = hash_(D, d, seed=3), hash_(D, k * d, seed=3)
    assert torch.equal(buckets(fine) % d, buckets(coarse))
    w = torch.randn(d, dtype=torch.float64)
    small, larger = divmod(D, d), divmod(D, k * d)
    of_coarse, of_fine = (
        torch.tensor([n + (b < rest) for b in range(dim)]).double().sqrt()
        for dim, (n, rest) in ((d, small), (k * d, larger))
    )
    refined = (w / of_coarse).repeat(k) * of_fine
    torch.testing.assert_close(fine.matvec(refined), coarse.matvec(w), rtol=1e-13, atol=0)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_are_the_same_bits_for_any_threads_and_parts(dtype: torch.dtype) -> None:
    p = hash_(66_003, 1000, seed=5)
    w = torch.randn(1000).to(dtype)
    torch.set_num_threads(1)
    expected = p.matvec(w, step=1)
    for number in (1, 2):
        torch.set_num_threads(number)
        cache._items.clear()
        cache.held = 0
        for parts in ([0, 66_003], [0, 1, 127, 128, 50_000, 66_003], [0, 33_000, 66_003]):
            weights = [p.matvec(w, step=1, rows=range(a, b)) for a, b in itertools.pairwise(parts)]
            assert torch.equal(torch.cat(weights), expected)


def test_the_map_is_an_isometry() -> None:
    p, w = hash_(5003, 77), torch.randn(77, dtype=torch.float64)
    torch.testing.assert_close(p.matvec(w).norm(), w.norm(), rtol=1e-14, atol=0)
    torch.testing.assert_close(p.rmatvec(p.matvec(w)), w, rtol=1e-13, atol=1e-13)


def test_signs_and_buckets_are_fair() -> None:
    P = hash_(60_000, 300, seed=9).dense()
    bucket, sign = P.abs().argmax(dim=1), P.sum(dim=1).sign()
    assert abs(sign.sum()) < 4 * 60_000**0.5
    per_bucket = torch.zeros(300).index_add_(0, bucket, sign.float())
    assert abs(float(per_bucket.square().mean()) / 200 - 1) < 0.4
    first_half = bucket[:30_000].bincount(minlength=300)  # hypergeometric: 100 ± 7
    assert abs(float((first_half - 100.0).square().mean()) / 50 - 1) < 0.4
