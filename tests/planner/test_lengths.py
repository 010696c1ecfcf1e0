"""Estimates of remaining output: exact before anything is known, conditional afterwards, never out of bounds."""

from __future__ import annotations

import numpy as np
import pytest

from batchllm.planner import LengthEstimator
from batchllm.planner.lengths import KEPT_LENGTHS, SPREAD, TRUSTED_LENGTHS


def estimate(estimator, decoded, max_tokens=1000, params=0):
    decoded = np.atleast_1d(decoded)
    return estimator.estimate(
        np.full(len(decoded), params), decoded, np.full(len(decoded), max_tokens)
    ).tolist()


def test_max_tokens_until_something_is_known():
    estimator = LengthEstimator()
    assert estimate(estimator, [0, 1, 999, 1000]) == [1000, 999, 1, 1]
    estimator.observe(1, 5)
    assert estimate(estimator, [0], params=0) == [1000]  # another parameter set's lengths say nothing


def test_mean_and_spread_of_the_longer_ones():
    rng = np.random.default_rng(6)
    estimator = LengthEstimator()
    seen = rng.integers(1, 400, size=500)
    for length in seen:
        estimator.observe(3, int(length))
    decoded = np.arange(0, 500, 7)
    for d, found in zip(decoded.tolist(), estimate(estimator, decoded, 1000, params=3)):
        longer = seen[seen > d]
        expected = longer.mean() + SPREAD * longer.std() if len(longer) else 0.0
        trust = len(longer) / (len(longer) + TRUSTED_LENGTHS)
        total = trust * expected + (1 - trust) * 1000
        assert found == pytest.approx(max(total - d, 1), abs=1.0)
        assert found >= max(total - d, 1) - 1e-6


def test_few_observations_are_hardly_believed():
    estimator = LengthEstimator()
    estimator.observe(0, 10)
    (one,) = estimate(estimator, 0)
    for _ in range(200):
        estimator.observe(0, 10)
    (many,) = estimate(estimator, 0)
    assert 900 < one < 1000
    assert 10 <= many < 100


def test_never_beyond_max_tokens():
    estimator = LengthEstimator()
    for _ in range(100):
        estimator.observe(0, 5000)
    assert estimate(estimator, [0, 60, 99, 100], max_tokens=100) == [100, 40, 1, 1]


def test_old_lengths_are_forgotten():
    estimator = LengthEstimator()
    for length in [900] * KEPT_LENGTHS + [20] * KEPT_LENGTHS:
        estimator.observe(0, length)
    assert estimate(estimator, 0)[0] <= 30


def test_mixed_parameters_in_one_call():
    estimator = LengthEstimator()
    for _ in range(1000):
        estimator.observe(0, 8)
        estimator.observe(1, 300)
    found = estimator.estimate(
        np.array([1, 0, 1, 2]), np.array([0, 0, 300, 4]), np.array([400, 400, 400, 50])
    )
    assert 300 <= found[0] <= 302
    assert 8 <= found[1] <= 15
    assert found[2:].tolist() == [100, 46]


def test_empty():
    none = np.empty(0, dtype=np.int64)
    assert len(LengthEstimator().estimate(none, none, none)) == 0


def test_mean_of_whole_outputs():
    rng = np.random.default_rng(7)
    seen = rng.integers(1, 400, size=300)
    estimator = LengthEstimator()
    for length in seen:
        estimator.observe(2, int(length))
    limits = np.array([1, 50, 399, 1000])
    found = estimator.mean_total(np.full(4, 2), limits)
    assert found.tolist() == [round(float(np.minimum(seen, most).mean())) for most in limits]
    assert estimator.mean_total(np.array([0, 2]), np.array([64, 400]))[0] == 64  # nothing is known of these
    assert len(estimator.mean_total(np.empty(0, np.int64), np.empty(0, np.int64))) == 0
