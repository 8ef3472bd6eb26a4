"""Occam's bound and its relatives: known answers, and how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import beta, binom

from subspan.training.occam import (
    kl_inverse,
    log_binomial_tail,
    log_prior,
    occam_bound,
    pac_bayes_bound,
)


def test_the_prior_is_one():
    """Over all lengths, of which 256^L strings each; the rest of the sum is 1 / (L + 1)."""
    total = sum(math.exp(log_prior(size) + 8 * size * math.log(2)) for size in range(1, 1001))
    assert total == pytest.approx(1 - 1 / 1001, rel=1e-12)
    assert log_prior(1) == pytest.approx(-math.log(512))


@pytest.mark.parametrize(("mistakes", "samples"), [(0, 20), (3, 20), (19, 20), (40, 1000)])
@pytest.mark.parametrize("confidence", [0.3, 0.05, 1e-9, 1e-200])
def test_occams_bound_is_clopper_and_pearsons(mistakes, samples, confidence):
    expected = beta.isf(confidence, mistakes + 1, samples - mistakes)
    found = occam_bound(mistakes, samples, math.log(confidence))
    assert found == pytest.approx(expected, rel=1e-9)


def test_occams_bound_far_below_the_least_float():
    """Without a mistake it is 1 − α^(1/n) in closed form, here of α = 2^−1280."""
    log_confidence = -1280 * math.log(2)
    assert math.exp(log_confidence) < 1e-300
    expected = -math.expm1(log_confidence / 60_000)
    assert occam_bound(0, 60_000, log_confidence) == pytest.approx(expected, rel=1e-9)
    # With mistakes the tail that was solved for comes out, and scipy has it, too, up to 1e-300.
    error = occam_bound(1800, 60_000, -600.0)
    assert log_binomial_tail(1800, 60_000, error) == pytest.approx(-600, rel=1e-9)
    assert math.log(binom.cdf(1800, 60_000, error)) == pytest.approx(-600, rel=1e-6)


def test_nothing_is_claimed_of_what_proves_nothing():
    assert occam_bound(20, 20, math.log(0.05)) == 1.0
    assert occam_bound(3, 20, -1e9) == 1.0
    assert kl_inverse(0.1, 1e9) == 1.0
    assert kl_inverse(1.0, 0.1) == 1.0
    assert pac_bayes_bound(0, 7, -0.1, 0.05) == 1.0  # it is not proved of so few samples
    assert pac_bayes_bound(0, 8, -0.1, 0.05) < 1.0


def test_the_inverse_of_kl():
    """kl(0 ‖ p) = −ln(1 − p) has a closed form; the others are solved on the sum itself."""
    for divergence in (1e-6, 0.015, 0.7, 5.0):
        assert kl_inverse(0.0, divergence) == pytest.approx(-math.expm1(-divergence), rel=1e-8)
    for error, divergence in ((0.03, 0.015), (0.5, 0.2), (0.9, 0.01)):

        def excess(p, q=error, c=divergence):
            return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) - c

        expected = brentq(excess, error, 1 - 1e-12)
        assert kl_inverse(error, divergence) == pytest.approx(expected, rel=1e-9)
    assert kl_inverse(0.25, 0.0) == 0.25
    assert kl_inverse(0.5, 2 * 0.1**2) > 0.5 + 0.1 * 0.99  # Pinsker's inequality is nearly tight


@pytest.mark.parametrize("size", [5, 160, 4664])
@pytest.mark.parametrize("error", [0.0, 0.03, 0.5])
def test_the_exact_tail_is_never_above_the_others(size, error):
    samples = 60_000
    mistakes = round(error * samples)
    occam = occam_bound(mistakes, samples, log_prior(size) + math.log(0.05))
    chernoff = kl_inverse(error, (math.log(20) - log_prior(size)) / samples)
    assert error < occam <= chernoff * (1 + 1e-9)  # equal without a mistake
    assert chernoff < pac_bayes_bound(mistakes, samples, log_prior(size), 0.05)


def test_it_grows_with_bytes_and_mistakes_and_falls_with_samples_and_delta():
    def bound(size=160, error=0.03, samples=60_000, delta=0.05):
        return occam_bound(round(error * samples), samples, log_prior(size) + math.log(delta))

    assert bound() < bound(size=161) < bound(size=320)
    assert bound() < bound(error=0.031) < bound(error=0.3)
    assert bound() > bound(samples=120_000) > bound(samples=10**6)
    assert bound() > bound(delta=0.1) > bound(delta=0.5)
    assert bound() == pytest.approx(0.0692, abs=5e-5)


@pytest.mark.parametrize("delta", [0.05, 0.3])
def test_it_is_wrong_for_some_classifier_in_few_draws_only(delta):
    """All of 40 classifiers must be bounded at once, whichever of them the samples favour.

    4,000 draws of 100 samples tell: a bound that forgets the union is wrong far more often.
    """
    rng = np.random.default_rng(7)
    classifiers, samples, draws = 40, 100, 4000
    errors = np.linspace(0.2, 0.4, classifiers)
    log_confidence = math.log(delta / classifiers)
    of_mistakes = np.array([occam_bound(k, samples, log_confidence) for k in range(samples + 1)])
    of_one = np.array([occam_bound(k, samples, math.log(delta)) for k in range(samples + 1)])
    mistakes = rng.binomial(samples, errors, size=(draws, classifiers))
    wrong = (of_mistakes[mistakes] < errors).any(axis=1).mean()
    assert 0 < wrong <= delta
    assert (of_one[mistakes] < errors).any(axis=1).mean() > 3 * delta
