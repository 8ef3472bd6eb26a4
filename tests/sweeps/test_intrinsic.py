"""The intrinsic dimension: known crossings, what cannot be known, and the interval."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from subspan.errors import SubspanError
from subspan.sweeps.intrinsic import intrinsic_dimension
from subspan.training.schema import to_json
from subspan.training.score import Score

DIMS = [10, 100, 1000, 10000]
LINE = [0.2, 0.4, 0.6, 0.8]  # 0.2 per decade


def test_crossing_is_linear_in_log_d():
    found = intrinsic_dimension(DIMS, [[s] for s in LINE], [1.0], threshold=0.5)
    assert found.value == pytest.approx(100 * math.sqrt(10))
    assert (found.low, found.high) == (None, None)
    assert found.note == "one seed: no interval"
    assert (found.target, found.threshold) == (0.5, 0.5)


def test_crossing_on_a_tried_d_is_that_d():
    found = intrinsic_dimension(DIMS, [[s] for s in LINE], [1.0], threshold=0.6)
    assert found.value == pytest.approx(1000)


def test_target_is_a_fraction_of_the_mean_baseline_and_curves_are_seed_means():
    scores = [[0.1, 0.3], [0.3, 0.5, 0.4], [0.6], [0.9, 0.7]]
    found = intrinsic_dimension(DIMS, scores, [0.9, 1.1], threshold=0.5)
    assert found.target == pytest.approx(0.5)
    assert found.value == pytest.approx(100 * math.sqrt(10))


def test_order_of_dims_does_not_matter():
    seeds = [[s - 0.01, s + 0.01] for s in LINE]
    ordered = intrinsic_dimension(DIMS, seeds, [0.5, 0.6])
    assert ordered.value is not None
    shuffled = [2, 0, 3, 1]
    mixed = intrinsic_dimension(
        [DIMS[i] for i in shuffled], [seeds[i] for i in shuffled], [0.5, 0.6]
    )
    assert mixed == ordered


def test_non_monotone_curve_counts_its_first_crossing():
    dip = [[0.2], [0.6], [0.3], [0.8]]
    found = intrinsic_dimension(DIMS, dip, [1.0], threshold=0.5)
    assert found.value == pytest.approx(10 ** (1 + 0.3 / 0.4))


def test_smallest_d_at_the_target_is_an_upper_bound():
    found = intrinsic_dimension(DIMS, [[0.9, 0.92]] * 4, [1.0, 1.0])
    assert found.value == 10
    assert (found.low, found.high) == (None, 10)
    assert found.note.startswith("upper bound")


def test_never_reached_says_the_best():
    found = intrinsic_dimension(DIMS, [[0.2], [0.7], [0.6], [0.5]], [1.0])
    assert (found.value, found.low, found.high) == (None, None, None)
    assert "0.7 at d = 100" in found.note


def test_interval_encloses_the_value_and_narrows_with_agreement():
    def spread(noise: float) -> tuple[float, float, float]:
        seeds = [[s - noise, s, s + noise] for s in LINE]
        found = intrinsic_dimension(DIMS, seeds, [1.0] * 3, threshold=0.5)
        assert found.value is not None
        assert found.low is not None
        assert found.high is not None
        assert found.note == ""
        return found.low, found.value, found.high

    low, value, high = spread(0.05)
    assert low < value < high
    # ± 0.05 at both neighbours moves the crossing by a quarter of a decade, and no more.
    assert value * 10**-0.25 <= low * 1.0001
    assert high <= value * 10**0.2501
    closer = spread(0.005)
    assert closer[2] - closer[0] < (high - low) / 5


def test_baseline_seeds_widen_the_interval():
    scores = [[s, s] for s in LINE]
    calm = intrinsic_dimension(DIMS, scores, [1.0, 1.0], threshold=0.5)
    assert calm.low == pytest.approx(calm.high)
    found = intrinsic_dimension(DIMS, scores, [0.9, 1.1], threshold=0.5)
    assert found.low == pytest.approx(10**2.25)  # target 0.45
    assert found.high == pytest.approx(10**2.75)


def test_interval_open_above_when_resamples_never_cross():
    found = intrinsic_dimension([10, 100], [[0.1, 0.2], [0.85, 0.96]], [1.0, 1.0])
    assert found.value is not None
    assert found.low is not None
    assert found.high is None
    assert "above the largest d tried, 100" in found.note


def test_interval_open_below_when_resamples_begin_at_the_target():
    found = intrinsic_dimension([10, 100], [[0.7, 0.95], [0.97, 0.99]], [1.0, 1.0])
    assert found.value is not None
    assert 10 < found.value < 100
    assert found.low is None
    assert found.high is not None
    assert "below the smallest d tried, 10" in found.note


def test_lower_end_is_known_where_only_some_resamples_cross():
    found = intrinsic_dimension([10, 100], [[0.1, 0.1], [0.8, 0.95]], [1.0, 1.0])
    assert found.value is None
    assert found.low is not None
    assert 10 < found.low < 100


def test_same_seed_same_interval():
    rng = np.random.default_rng(0)
    seeds = [[*(s + 0.03 * rng.standard_normal(5))] for s in LINE]
    first = intrinsic_dimension(DIMS, seeds, [1.0], threshold=0.5, seed=3)
    assert intrinsic_dimension(DIMS, seeds, [1.0], threshold=0.5, seed=3) == first
    assert intrinsic_dimension(DIMS, seeds, [1.0], threshold=0.5, seed=4) != first


def test_wider_confidence_wider_interval():
    seeds = [[s - 0.04, s - 0.01, s + 0.02, s + 0.03] for s in LINE]
    wide = intrinsic_dimension(DIMS, seeds, [1.0], threshold=0.5, confidence=0.99)
    narrow = intrinsic_dimension(DIMS, seeds, [1.0], threshold=0.5, confidence=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_interval_covers_the_truth_about_as_often_as_documented():
    rng = np.random.default_rng(7)
    truth = 10**2.5
    trials = 150
    hits = 0
    for trial in range(trials):
        seeds = np.array(LINE)[:, None] + 0.02 * rng.standard_normal((4, 10))
        base = 1 + 0.02 * rng.standard_normal(10)
        found = intrinsic_dimension(
            DIMS, seeds.tolist(), base.tolist(), threshold=0.5, resamples=300, seed=trial
        )
        hits += found.low <= truth <= found.high
    assert 0.82 <= hits / trials < 0.99  # near 0.9 with ten seeds


def test_it_is_json():
    found = intrinsic_dimension(DIMS, [[s, s + 0.01] for s in LINE], [1.0], threshold=0.5)
    assert json.loads(json.dumps(to_json(found), allow_nan=False)) == to_json(found)
    assert set(to_json(found)) == {"value", "low", "high", "target", "threshold", "note"}


@pytest.mark.parametrize(
    ("dims", "scores", "baseline", "options", "message"),
    [
        ([], [], [1.0], {}, "at least one d"),
        ([1, 2], [[0.5]], [1.0], {}, "2 dims and 1 lists"),
        ([0, 2], [[0.5]] * 2, [1.0], {}, "positive dims"),
        ([2, 2], [[0.5]] * 2, [1.0], {}, "different"),
        ([1, 2], [[0.5], []], [1.0], {}, "d = 2"),
        ([2, 1], [[math.nan], [0.5]], [1.0], {}, "d = 2"),
        ([1, 2], [0.5, 0.6], [1.0], {}, "list of finite scores"),
        ([1, 2], [[0.5]] * 2, [math.inf], {}, "the baseline"),
        ([1, 2], [[0.5]] * 2, [], {}, "the baseline"),
        ([1, 2], [[0.5]] * 2, [0.0], {}, "mean baseline better than 0, got 0"),
        ([1, 2], [[0.5]] * 2, [1.0], {"threshold": 0}, "threshold"),
        ([1, 2], [[0.5]] * 2, [1.0], {"threshold": math.nan}, "threshold"),
        ([1, 2], [[0.5]] * 2, [1.0], {"confidence": 1.0}, "confidence"),
        ([1, 2], [[0.5]] * 2, [1.0], {"resamples": 0}, "resamples"),
    ],
)
def test_bad_input(dims, scores, baseline, options, message):
    with pytest.raises(SubspanError, match=message):
        intrinsic_dimension(dims, scores, baseline, **options)


def test_a_score_of_which_less_is_better():
    """The score is like an accuracy that is the way made from zero."""
    bits = Score("bits", higher_is_better=False, zero=6.0, percent=False)
    dims, way = [10, 100, 1000], np.array([[1.0, 1.2], [3.0, 3.1], [3.9, 3.8]])
    found = intrinsic_dimension(dims, list(6 - way), [2.0, 1.9], score=bits)
    same = intrinsic_dimension(dims, list(way), [4.0, 4.1])
    assert (found.value, found.low, found.high) == (same.value, same.low, same.high)
    assert found.target == pytest.approx(6 - same.target)
    with pytest.raises(SubspanError, match=r"mean baseline better than 6, got 6\.5"):
        intrinsic_dimension(dims, list(6 - way), [6.5], score=bits)
    never = intrinsic_dimension(dims, list(6 - way), [1.0], score=bits)
    assert never.note.startswith("not reached: the best mean score is 2.15 at d = 1000, ")
