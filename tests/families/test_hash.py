"""Promises of ``hash`` beyond the laws: equal buckets, refinement, the same bits everywhere."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import subspan
from subspan import Projection, shuffle
from subspan.cache import cache
from subspan.errors import SubspanError


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


# ---- how random the index is: strides are distances of neighbours in weights -----------------

KERNELS = (1, 2, 3, 5, 9, 25)  # neighbours in a kernel of a convolution
ROWS = (28, 64, 84, 120, 128, 256, 384, 512, 576, 768, 784, 1024, 1152, 1536, 3072, 4096)
BLOCKS = (8192, 32768, 49152)  # heads, gates, and whole parts of stacked weights
SIZES = [61_706, 1 << 17, 300_000]  # blocks of many sizes; one block; a mean of both


def index(p: Projection) -> tuple[Tensor, Tensor]:
    """Bucket and sign of every weight."""
    word = p._index(torch.tensor(0), 0, p.out_dim, torch.device("cpu"))[0]
    return word // 2, 1 - 2 * (word % 2)


def surprise(counts: Tensor, expected: Tensor, freedom: int) -> float:
    """By how many standard deviations χ² is too large."""
    chi = float(((counts - expected) ** 2 / expected).sum())
    return (chi - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", [256, 1000])
def test_buckets_of_neighbours_are_independent(size: int, dim: int) -> None:
    worst, total = 0.0, []
    for seed in range(3):
        bucket, _ = index(hash_(size, dim, seed=seed))
        for part in (bucket * 16 // dim, bucket % 16):  # high digits of a bucket, and low ones
            for stride in (*KERNELS, *ROWS, *BLOCKS):
                pair = part[stride:] * 16 + part[:-stride]
                counts = pair.bincount(minlength=256).double().view(16, 16)
                expected = counts.sum(0) * counts.sum(1, keepdim=True) / counts.sum()
                total.append(surprise(counts, expected, 225))
    worst = max(total)
    assert worst < 5, worst
    assert abs(sum(total) / len(total)) < 0.3


@pytest.mark.parametrize("size", SIZES)
def test_neighbours_share_a_bucket_as_often_as_chance_has_it(size: int) -> None:
    dim, total = 500, []
    for seed in range(5):
        bucket, _ = index(hash_(size, dim, seed=seed))
        for stride in (*KERNELS, *ROWS, *BLOCKS):
            expected = (size - stride) / dim
            total.append(
                (int((bucket[stride:] == bucket[:-stride]).sum()) - expected) / expected**0.5
            )
    assert max(map(abs, total)) < 4.5
    assert abs(sum(total)) < 4 * len(total) ** 0.5


@pytest.mark.parametrize("size", SIZES)
def test_signs_are_fair_and_independent_of_buckets_and_neighbours(size: int) -> None:
    dim = 300
    for seed in range(3):
        bucket, sign = index(hash_(size, dim, seed=seed))
        assert abs(int(sign.sum())) < 4 * size**0.5
        sums = torch.zeros(dim).index_add_(0, bucket, sign.float())
        assert abs(float(sums.square().mean()) / (size / dim) - 1) < 0.35  # ± 0.08
        for stride in (*KERNELS, *ROWS, *BLOCKS):
            product = sign[stride:] * sign[:-stride]
            assert abs(int(product.sum())) < 4.5 * (size - stride) ** 0.5
            same = bucket[stride:] == bucket[:-stride]
            assert abs(int(product[same].sum())) < 4.5 * int(same.sum()) ** 0.5 + 4


def test_a_row_of_a_matrix_has_as_many_different_buckets_as_balls_in_bins() -> None:
    rows, columns, dim = 384, 1024, 2000
    bucket, _ = index(hash_(rows * columns, dim, seed=4))
    matrix = bucket.view(rows, columns)
    for lines in (matrix, matrix.T):
        different = [len(line.unique()) for line in lines]
        n = lines.shape[1]
        expected = dim * (1 - (1 - 1 / dim) ** n)
        assert abs(sum(different) / len(different) / expected - 1) < 0.005


def test_seeds_streams_and_steps_are_shuffled_independently() -> None:
    size, dim = 1 << 16, 64
    first, _ = index(hash_(size, dim))
    for other in (hash_(size, dim, seed=1), hash_(size, dim, stream=1)):
        pair = first * dim + index(other)[0]
        counts = pair.bincount(minlength=dim * dim).double()
        assert surprise(counts, torch.full_like(counts, size / dim**2), (dim - 1) ** 2) < 5


@pytest.mark.parametrize("bits", [10, 11, 13])
def test_two_places_of_a_small_block_go_to_all_pairs_of_places_alike(bits: int) -> None:
    """Over many keys, the images of two rows are independent but for being different."""
    number, size = 20_000, 1 << bits
    keys = torch.randint(1 << 32, (4, number), generator=torch.Generator().manual_seed(bits))
    images = []
    for row in (0, 1, size // 2, size - 1, 5, 5 + size // 2):
        x = torch.full((number,), row)
        for key, multiplier in zip(keys, shuffle.MULTIPLIERS, strict=True):
            x = (x ^ key) * multiplier & size - 1
            x = x ^ x >> (bits + 1) // 2
        images.append(x)
    for a, b in itertools.combinations(images, 2):
        for part in (lambda x: x % 16, lambda x: x * 16 // size):
            counts = (part(a) * 16 + part(b)).bincount(minlength=256).double().view(16, 16)
            per = size // 16
            expected = torch.full((16, 16), per * per / (size * (size - 1.0)))
            expected.fill_diagonal_(per * (per - 1) / (size * (size - 1.0)))
            assert surprise(counts, expected.double() * number, 255) < 5


@pytest.mark.parametrize("size", [1, 2, 1023, 1024, 1025, 5000, 61_706, 70_000])
def test_a_shuffle_is_a_bijection_of_blocks(size: int) -> None:
    source = hash_(max(size, 1), 1, seed=8).source
    where = {"step": torch.tensor(3), "device": torch.device("cpu")}
    images = shuffle.shuffled(source, size, 0, size, **where)
    assert images.sort().values.equal(torch.arange(size))
    for first, bits in shuffle.blocks(size):
        block = images[first : first + (1 << bits)]
        assert (block.min(), block.max()) == (first, first + (1 << bits) - 1)
    assert shuffle.shuffled(source, size, size // 3, size, **where).equal(images[size // 3 :])


@pytest.mark.parametrize("start", [0, (1 << 39) - 100, (1 << 40) - 200])
def test_rows_of_the_largest_matrix(start: int) -> None:
    p = hash_(1 << 40, 1_000_003, seed=3)
    w = torch.randn(1_000_003)
    theta = p.matvec(w, rows=range(start, start + 200))
    assert theta.equal(p._matvec(w, torch.tensor(0), start, start + 200))
    assert len(theta.unique()) == 200
    with pytest.raises(SubspanError, match="out_dim must be an integer in"):
        hash_((1 << 40) + 1, 5)
