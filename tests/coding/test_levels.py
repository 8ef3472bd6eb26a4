"""The coder: all integers come back, in about as many bytes as their entropy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspan import SubspanError
from subspan.coding import (
    choose_step,
    coded_bits,
    decode_levels,
    encode_levels,
    find_grid,
    round_to_levels,
)
from subspan.coding.levels import LARGEST
from subspan.coding.steps import from_levels

INTEGERS = st.integers(-LARGEST, LARGEST) | st.integers(-3, 3) | st.sampled_from([LARGEST, 0])


def array(values):
    return np.array(values, np.int64)


@given(st.lists(INTEGERS, max_size=200))
def test_all_integers_come_back_in_the_predicted_length(values):
    data = encode_levels(array(values))
    assert decode_levels(data, len(values)).tolist() == values
    assert len(data) <= coded_bits(array(values)) / 8 + 1.05 + len(values) / 1000


@pytest.mark.parametrize(
    ("values", "size"),
    [([], 0), ([0] * 10_000, 1), ([7] * 1000, 160), ([-1, 1] * 500, 135), ([LARGEST] * 9, 32)],
    ids=["none", "zeros", "equal", "signs", "largest"],
)
def test_extremes(values, size):
    data = encode_levels(array(values))
    assert decode_levels(data, len(values)).tolist() == values
    assert len(data) <= size


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("shape", ["normal", "laplace"])
def test_a_thousand_levels_take_their_entropy_and_little_more(shape, scale):
    """Against the distribution that they were drawn from, which the coder is not told."""
    draw = np.random.default_rng(0)
    levels = np.rint(getattr(draw, shape)(0, scale, 1000)).astype(np.int64)
    many = np.rint(getattr(draw, shape)(0, scale, 200_000)).astype(np.int64)
    _, often = np.unique(many, return_counts=True)
    share = often / often.sum()
    entropy = -(share * np.log2(share)).sum() * len(levels) / 8
    assert len(encode_levels(levels)) < 1.04 * entropy + 8


def test_the_golden_code():
    """These bytes are the format: a change of them makes stored models unreadable."""
    assert encode_levels(array([0, 1, -1, 0, 2, -3, 0, 40, 0, 0, -5])).hex() == GOLDEN


GOLDEN = "99fa99e93629"


def test_bytes_of_no_levels_are_refused():
    with pytest.raises(ValueError, match="too large"):
        decode_levels(b"\0" * 9, 1) and decode_levels(encode_levels(array([0])) + b"\xff" * 90, 9)


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0.5, 1, 2, 2.5, 8, 16])
def test_a_step_is_the_finest_that_the_bits_allow(bits):
    w = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 7
    step = choose_step(w, bits)
    assert coded_bits(round_to_levels(w, step)) <= bits * 1000
    finer = step * (1 - 2**-7)
    assert coded_bits(round_to_levels(w, finer)) > bits * 1000 * 0.97
    assert len(encode_levels(round_to_levels(w, step))) <= math.ceil(bits * 1000 / 8) + 2


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=60), st.integers(0x3000, 0x4A00))
def test_a_grid_is_found_in_the_numbers(levels, pattern):
    step = float(np.array(pattern << 16, np.uint32).view(np.float32))
    w = from_levels(array(levels), step, torch.float32)
    found = find_grid(w)
    if not any(levels):
        assert found is None
    elif 1 in map(abs, levels):
        assert found == step
    if found is not None:
        assert torch.equal(from_levels(round_to_levels(w, found), found, torch.float32), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("d", "bits"), [(1, 12), (5, 10), (20, 17), (400, 14), (60, 23)])
def test_every_grid_that_a_quantiser_makes_is_found(d, bits, dtype):
    """The least of the levels may be any number."""
    for seed in range(50):
        w = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        step = choose_step(w, bits)
        w = from_levels(round_to_levels(w, step), step, dtype)
        found = find_grid(w)
        assert found >= step
        assert coded_bits(round_to_levels(w, found)) <= bits * d
        assert torch.equal(from_levels(round_to_levels(w, found), found, dtype), w)


def test_ordinary_coordinates_lie_on_no_grid():
    assert find_grid(torch.randn(100, generator=torch.Generator().manual_seed(0))) is None
    assert find_grid(torch.tensor([1.0, math.inf])) is None


@pytest.mark.parametrize(
    ("w", "bits", "said"),
    [
        ([1.0], 0, "positive"),
        ([1.0], math.nan, "positive"),
        ([1.0, math.nan], 2, "not finite"),
        ([1.0] * 100, 0.01, "every coordinate becomes zero"),
        ([1.0], 1e-9, "every coordinate becomes zero"),
        ([3e38] * 9, 0.1, "every coordinate becomes zero"),
        ([1.0], "3", "bits must be a positive number of bits a coordinate, got '3'"),
        ([1e60, 1.0], 8, r"up to 1e\+60 fit no step"),
        ([1e-60, 0.0], 8, "up to 1e-60 fit no step, .*: save without bits"),
        ([2e-38, 1e-38], 8, "up to 2e-38 fit no step"),
    ],
)
def test_what_cannot_be_quantised_is_refused(w, bits, said):
    with pytest.raises(SubspanError, match=said):
        choose_step(torch.tensor(w, dtype=torch.float64), bits)


def test_a_step_that_would_round_to_infinity_is_refused():
    with pytest.raises(SubspanError, match="fit no step"):
        choose_step(torch.tensor([3.4e38, 2.4e38]), 6)
