"""Bounds on the error of a classifier that was chosen after its samples had been seen.

A classifier is a string of bytes h that a fixed decoder turns into a function. Before anyone looks
at the samples, every string gets a prior probability P(h), Σ P(h) ≤ 1: a length of L bytes has
1 / (L (L + 1)), which sums up to 1 over L ≥ 1, and the 256^L strings of that length share it
alike. Hence, in nats,

    −ln P(h) = 8 L ln 2 + ln(L (L + 1)).

**Occam's bound, with the exact tail** (Blumer et al. 1987; Langford, JMLR 2005). Of n
independent samples, a fixed h with error R errs on K, which is binomial. Let B(k, α) be the largest
p with P[Bin(n, p) ≤ k] ≥ α (Clopper and Pearson 1934). Then P[R > B(K, α)] ≤ α. Take α = δ P(h)
for each h: the probability that *any* h has an error above B(K(h), δ P(h)) is at most
Σ δ P(h) ≤ δ. So with probability 1 − δ over the samples the bound holds for all strings at once,
and therefore for the one that training, or a person, has chosen by looking at them.

**The PAC-Bayes bound** (Seeger 2002; Maurer 2004) is for comparison with papers: with probability
1 − δ, for all distributions Q over classifiers at once,

    kl(R̂(Q) ‖ R(Q)) ≤ (KL(Q ‖ P) + ln(2 √n / δ)) / n,    n ≥ 8,

and for one classifier KL(Q ‖ P) = −ln P(h). It is never below Occam's: by Chernoff's inequality
P[Bin(n, p) ≤ k] ≤ exp(−n kl(k/n ‖ p)), so that inverting the exact tail already gives no more than
kl ≤ (−ln P(h) + ln(1 / δ)) / n, and 2 √n > 1.

δ P(h) is far below the least float64 (2^−1280 for a file of 160 bytes), so that quantiles of the
beta distribution do not give B: the tail is added up, and solved for p, in logarithms.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, rel_entr
from scipy.stats import binom

ALMOST_ONE = math.nextafter(1.0, 0.0)


def log_prior(size: int) -> float:
    """Return ln P(h) of a string of ``size`` bytes, at least one."""
    return -8 * size * math.log(2) - math.log(size) - math.log(size + 1)


def log_binomial_tail(mistakes: int, samples: int, error: float) -> float:
    """Return ln P[Bin(samples, error) ≤ mistakes]."""
    terms = binom.logpmf(np.arange(mistakes + 1), samples, error)
    return min(0.0, float(logsumexp(terms)))


def occam_bound(mistakes: int, samples: int, log_confidence: float) -> float:
    """Return the largest error, in (0, 1], with which so few mistakes are not too improbable.

    ``log_confidence`` is ln(δ P(h)), which is negative.
    """

    def excess(error: float) -> float:
        return log_binomial_tail(mistakes, samples, error) - log_confidence

    if mistakes == samples or excess(ALMOST_ONE) >= 0:
        return 1.0
    return float(brentq(excess, 0.0, ALMOST_ONE))


def kl_inverse(error: float, divergence: float) -> float:
    """Return the largest p with kl(error ‖ p) ≤ divergence, of Bernoulli variables, in nats."""

    def excess(p: float) -> float:
        return float(rel_entr(error, p) + rel_entr(1 - error, 1 - p)) - divergence

    if divergence <= 0 or error >= 1:
        return min(error, 1.0)
    if excess(ALMOST_ONE) <= 0:
        return 1.0
    return float(brentq(excess, error, ALMOST_ONE))


def pac_bayes_bound(mistakes: int, samples: int, log_prior: float, delta: float) -> float:
    """Return the bound of Seeger and Maurer for one classifier of this prior probability.

    It is proved for eight samples or more; for fewer it is 1.
    """
    if samples < 8:
        return 1.0
    divergence = (math.log(2 * math.sqrt(samples) / delta) - log_prior) / samples
    return kl_inverse(mistakes / samples, divergence)
