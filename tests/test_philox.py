"""The generator: known answers, the definition of docs/format.md, and that it looks random.

The statistical tests use fixed seeds, so they give the same answer every time.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspan.errors import SubspanError
from subspan.philox import Permutation, Source, philox4x32
from tests import reference

few = settings(max_examples=25, deadline=None, derandomize=True)

READINGS = ["sequence", "signbits", "signs", "uniforms", "normals"]
sources = st.builds(
    Source,
    seed=st.integers(0, 2**64 - 1),
    domain=st.integers(0, 2**8 - 1),
    stream=st.integers(0, 2**24 - 1),
)
words = st.integers(0, 2**32 - 1)
positions = st.one_of(st.integers(0, 600), st.integers(2**34 - 2000, 2**34 - 600))
lengths = st.integers(0, 300)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    c, k, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    c0, c1, c2, c3 = (torch.tensor(word) for word in c)
    assert [int(word) for word in philox4x32((c0, c1, c2, c3), (k[0], k[1]))] == expected
    assert list(reference.philox(tuple(c), tuple(k))) == expected


# ---- docs/format.md, implemented twice -----------------------------------------------------------


@few
@given(source=sources, index=words, column=words, step=words)
def test_counter_layout(source: Source, index: int, column: int, step: int) -> None:
    ours = source.words(torch.tensor(index), column, step)
    numbers = reference.Numbers(source.seed, source.domain, source.stream, step)
    assert [int(word) for word in ours] == list(numbers.call(index, column))


@few
@given(source=sources, start=positions, length=st.integers(0, 12), column=words, step=words)
def test_readings_of_a_sequence(
    source: Source, start: int, length: int, column: int, step: int
) -> None:
    numbers = reference.Numbers(source.seed, source.domain, source.stream, step)
    where: Any = {"column": column, "step": step}
    n = range(start, start + length)
    stop = start + length
    assert source.sequence(start, stop, **where).tolist() == [numbers.word(i, column) for i in n]
    assert source.signbits(start, stop, **where).tolist() == [numbers.signbit(i, column) for i in n]
    assert source.signs(start, stop, **where).tolist() == [numbers.sign(i, column) for i in n]
    for dtype in (torch.float32, torch.float64):
        uniforms = source.uniforms(start, stop, dtype=dtype, **where)
        assert uniforms.dtype == dtype
        assert uniforms.tolist() == [numbers.uniform(i, column) for i in n]
    normals = source.normals(start, stop, dtype=torch.float64, **where)
    assert normals.tolist() == pytest.approx([numbers.normal(i, column) for i in n], rel=1e-12)
    for bound in (1, 10, 2**31):
        integers = source.integers(start, stop, bound, **where)
        assert integers.tolist() == [numbers.integer(i, bound, column) for i in n]


@few
@given(source=sources, size=st.integers(1, 300), step=words)
def test_permutation_is_the_documented_one(source: Source, size: int, step: int) -> None:
    numbers = reference.Numbers(source.seed, source.domain, source.stream, step)
    ours = source.permutation(size, column=1, step=step)(torch.arange(size))
    assert ours.tolist() == [numbers.permuted(x, size, 1) for x in range(size)]


# ---- position, column, step, stream and seed address the numbers ---------------------------------


@pytest.mark.parametrize("reading", READINGS)
@few
@given(source=sources, start=positions, before=lengths, length=lengths, after=lengths)
def test_a_range_is_the_slice_of_a_longer_draw(
    reading: str, source: Source, start: int, before: int, length: int, after: int
) -> None:
    first = max(0, start - before)
    draw = getattr(source, reading)
    longer = draw(first, start + length + after, column=7, step=2)
    assert torch.equal(
        draw(start, start + length, column=7, step=2),
        longer[start - first : start - first + length],
    )


@pytest.mark.parametrize("reading", READINGS)
def test_columns_at_once_are_columns_one_by_one(reading: str) -> None:
    draw = getattr(Source(3, 1), reading)
    columns = torch.tensor([[0, 5, 2], [2**32 - 1, 1, 2**31]])
    block = draw(3, 260, column=columns, step=9)
    assert block.shape == (257, 2, 3)
    for row in range(2):
        for k in range(3):
            alone = draw(3, 260, column=int(columns[row, k]), step=torch.tensor(9))
            assert torch.equal(block[:, row, k], alone)


def test_every_part_of_the_address_matters() -> None:
    # Among them pairs that differ beyond bit 32 of the seed, or by words changing places.
    drawn = [
        Source(seed, domain, stream).sequence(0, 64, column=column, step=step)
        for seed, domain, stream, column, step in [
            (0, 0, 0, 0, 0),
            (1, 0, 0, 0, 0),
            (1 << 32, 0, 0, 0, 0),
            ((1 << 32) + 1, 0, 0, 0, 0),
            (0, 1, 0, 0, 0),
            (0, 0, 1, 0, 0),
            (0, 0, 0, 1, 0),
            (0, 0, 0, 0, 1),
            (0, 0, 0, 2**8, 0),
            (0, 0, 0, 0, 2**8),
            (0, 255, 2**24 - 1, 0, 0),
            (2**64 - 1, 0, 0, 0, 0),
            (0, 0, 0, 2**32 - 1, 0),
            (0, 0, 0, 0, 2**32 - 1),
        ]
    ]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert (one == other).sum() <= 1


def test_normals_are_finite() -> None:
    # Their logarithm sees (2a + 1) / 2¹⁷, never 0: no normal is larger than 4.86.
    normals = Source(1, 1).normals(0, 400_000, dtype=torch.float64)
    assert normals.isfinite().all()
    assert normals.abs().max() < math.sqrt(2 * math.log(2**17))


# ---- the distributions ---------------------------------------------------------------------------


def kolmogorov_smirnov(sample: Tensor, cdf: Tensor) -> float:
    """√n times the largest distance to the distribution function at the sorted sample."""
    n = len(sample)
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum(ranks[1:] - cdf, cdf - ranks[:-1]).max()
    return float(distance) * math.sqrt(n)


def excess(counts: Tensor, expected: float) -> float:
    """A chi-square statistic in its own standard deviations from its mean."""
    degrees = counts.numel() - 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_uniforms_are_uniform(seed: int) -> None:
    sample = Source(seed, 1).uniforms(0, 100_000, dtype=torch.float64).sort().values
    assert sample[0] > 0
    assert sample[-1] < 1
    assert kolmogorov_smirnov(sample, sample) < 1.95  # exceeded once in 1,000 draws


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_normals_are_normal_and_independent(seed: int) -> None:
    z = Source(seed, 1).normals(0, 100_000, dtype=torch.float64)
    sample = z.sort().values
    assert kolmogorov_smirnov(sample, torch.special.ndtr(sample)) < 1.95
    for lag in (1, 2, 3, 4):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 4 / math.sqrt(len(z))
        assert abs(float((z[lag:] ** 2 * z[:-lag] ** 2).mean()) - 1) < 4 * 3 / math.sqrt(len(z))


@pytest.mark.parametrize("bound", [2, 3, 10, 1000])
def test_integers_are_uniform(bound: int) -> None:
    draws = Source(5, 1).integers(0, 100_000, bound)
    assert abs(excess(draws.bincount(minlength=bound), 100_000 / bound)) < 4
    assert draws.max() == bound - 1


def test_signs_are_balanced_and_independent_in_pairs() -> None:
    # 512 positions (the bits of 16 words) in 4,096 columns: balance of every position, and the
    # correlation of every pair of positions; and the same of columns.
    signs = Source(11, 2).signs(0, 512, column=torch.arange(4096), dtype=torch.float64)
    for matrix in (signs, signs.T[:512]):
        samples = matrix.shape[1]
        z = matrix.sum(dim=1) / math.sqrt(samples)
        assert z.abs().max() < 4.5
        assert abs(float((z**2).mean()) - 1) < 5 * math.sqrt(2 / len(z))
        pairs = (matrix @ matrix.T / math.sqrt(samples)).triu(1)
        assert pairs.abs().max() < 6  # of 130,816 pairs
        count = len(matrix) * (len(matrix) - 1) / 2
        assert abs(float((pairs**2).sum() / count) - 1) < 5 * math.sqrt(2 / count)


# ---- permutations --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*range(1, 35), 63, 64, 65, 255, 256, 257, 1000, 4096, 61_706])
def test_permutation_is_a_bijection(size: int) -> None:
    images = Source(2, 3).permutation(size)(torch.arange(size))
    assert torch.equal(images.sort().values, torch.arange(size))


@few
@given(size=st.integers(1, 2**34), seed=words, picks=st.lists(st.integers(0, 2**34), max_size=20))
def test_permutation_of_a_subset(size: int, seed: int, picks: list[int]) -> None:
    permutation = Source(seed, 3).permutation(size)
    index = torch.tensor([pick % size for pick in picks], dtype=torch.int64)
    images = permutation(index)
    assert images.shape == index.shape
    assert ((images >= 0) & (images < size)).all()
    assert len(images.unique()) == len(index.unique())
    for one, image in zip(index, images, strict=True):
        assert permutation(one.reshape(1, 1)).item() == image
    assert torch.equal(index, torch.tensor([pick % size for pick in picks], dtype=torch.int64))


def many(size: int, number: int) -> Tensor:
    """Different permutations of [0, size), (number, size)."""
    keys = Source(1, 3).sequence(0, 32 if size <= 32 else 8, column=torch.arange(number))
    permutation = Permutation(size, keys.unsqueeze(2).unbind())
    images = permutation._encrypt(torch.arange(size).expand(number, size))
    while (outside := images >= size).any():
        images = torch.where(outside, permutation._encrypt(images), images)
    return images


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_permutations_of_few_elements_are_equally_likely(size: int) -> None:
    number = 100 * math.factorial(size)
    code = (many(size, number) * size ** torch.arange(size)).sum(dim=1)
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == math.factorial(size)
    assert excess(counts, 100) < 4


@pytest.mark.parametrize("size", [7, 8, 16, 31, 32, 33])
def test_pairs_of_images_are_equally_likely(size: int) -> None:
    images = many(size, 15 * size**2)
    pairs = [(0, 1), (0, size // 2), (1, size - 1), (size - 2, size - 1)]
    for i, j in pairs:
        code = images[:, i] * size + images[:, j]
        counts = code.bincount(minlength=size**2).view(size, size)
        off = counts[~torch.eye(size, dtype=torch.bool)]
        assert counts.diagonal().sum() == 0
        assert excess(off, len(images) / len(off)) < 4.5


@pytest.mark.parametrize(("size", "planes"), [(8, 14), (16, 140), (64, 10_416)])
def test_a_permutation_is_not_affine(size: int, planes: int) -> None:
    # Four elements that sum to 0 are a plane; too few rounds keep planes together.
    images = many(size, 20_000)
    kept = (images[:, 0] ^ images[:, 1] ^ images[:, 2] ^ images[:, 3]) == 0
    chance = planes / math.comb(size, 4)
    spread = math.sqrt(chance * (1 - chance) / len(images))
    assert abs(float(kept.double().mean()) - chance) < 5 * spread


def test_a_vector_of_columns_gives_permutations_side_by_side() -> None:
    source, columns = Source(3, 5), torch.tensor([4, 1, 7])
    together = source.permutation(16, column=columns, step=2)(torch.arange(16).unsqueeze(1))
    for k, column in enumerate(columns.tolist()):
        alone = source.permutation(16, column=column, step=2)(torch.arange(16))
        assert torch.equal(together[:, k], alone)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 1 << 64),
        ("seed", 1.0),
        ("seed", True),
        ("seed", "0"),
        ("domain", -1),
        ("domain", 1 << 8),
        ("stream", -1),
        ("stream", 1 << 24),
        ("stream", None),
    ],
)
def test_addresses_out_of_range_are_refused(name: str, value: object) -> None:
    address: dict[str, Any] = {"seed": 0, "domain": 1} | {name: value}
    with pytest.raises(SubspanError, match=rf"^{name} must be an integer in \[0, 2\^\d+\), got"):
        Source(**address)


@pytest.mark.parametrize(("reading", "per_call"), [("sequence", 4), ("signs", 128), ("normals", 8)])
def test_the_end_of_a_sequence(reading: str, per_call: int) -> None:
    draw, end = getattr(Source(0, 1), reading), per_call << 32
    assert draw(end - 5, end).shape == (5,)
    with pytest.raises(SubspanError, match="past the end of a random sequence"):
        draw(end - 5, end + 1)


@pytest.mark.parametrize("bound", [0, -1, (1 << 31) + 1])
def test_bounds_of_integers(bound: int) -> None:
    with pytest.raises(SubspanError, match="bound must be in"):
        Source(0, 1).integers(0, 4, bound)
