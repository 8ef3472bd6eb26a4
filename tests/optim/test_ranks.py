"""Which ranks a rule leaves, on spectra that are given."""

from __future__ import annotations

import pytest
import torch

from subspan.optim.ranks import RankRule

SHAPES = {"a": (20, 30), "b": (10, 10)}
SPECTRA = {"a": 0.5 ** torch.arange(16.0), "b": torch.ones(8)}
ALL = 16 * 50 + 8 * 20  # numbers, Σ r (n + m)


def numbers(ranks):
    return sum(r * sum(SHAPES[name]) for name, r in ranks.items())


def test_a_tolerance_counts_layer_by_layer():
    rule = RankRule(tolerance=0.26)
    # Of a: ‖tail‖/‖all‖ = 0.5^r. Of b: √((8 − r)/8).
    assert rule.ranks(0, SPECTRA, SHAPES, ALL) == {"a": 2, "b": 8}
    assert RankRule(tolerance=0.36).ranks(0, SPECTRA, SHAPES, ALL) == {"a": 2, "b": 7}
    bounded = RankRule(tolerance=0.26, min_rank=3, max_rank=5)
    assert bounded.ranks(0, SPECTRA, SHAPES, ALL) == {"a": 3, "b": 5}


def test_a_tolerance_rises_over_its_warm_up():
    rule = RankRule(tolerance=0.5001, tolerance_warmup=3)  # 1/4, 2/4, 3/4 of it, then all
    assert [rule.ranks(step, SPECTRA, SHAPES, ALL)["a"] for step in range(6)] == [3, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("rank_every", [1, 2])
def test_a_target_is_approached_along_a_cubic(rank_every):
    """The greatest network within target + (first − target) (1 − t)³, at a common tolerance."""
    rule = RankRule(target_ratio=0.75, adapt_from=2, freeze_after=13, rank_every=rank_every)
    target = 0.25 * (600 + 100)
    steps = [step for step in range(20) if rule.may_change(step)]
    assert steps == list(range(2, 13, rank_every))
    for step in steps:
        left = (1 - (step - 2) / 10) ** 3
        budget = target + (ALL - target) * left
        found = rule.ranks(step, SPECTRA, SHAPES, ALL)
        assert numbers(found) <= budget
        assert numbers(found) > budget - 160 - 1  # all of b, whose singular values are equal
    assert numbers(rule.ranks(12, SPECTRA, SHAPES, ALL)) <= target


def test_a_network_smaller_than_the_target_keeps_its_ranks():
    rule = RankRule(target_ratio=0.01, freeze_after=4)
    begun = {"a": SPECTRA["a"][:2], "b": SPECTRA["b"][:3]}
    assert rule.ranks(0, begun, SHAPES, 2 * 50 + 3 * 20) == {"a": 2, "b": 3}
