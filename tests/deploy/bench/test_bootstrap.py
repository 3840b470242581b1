"""Intervals by bootstrap: as wide as theory has them, and equal for equal input."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.deploy.bench.bootstrap import estimate_of_seeds, interval, resampled

VALUES = np.random.default_rng(0).normal(0.3, 1.0, (1, 400))


def test_a_resample_takes_as_many_as_there_are_and_the_first_takes_each_once():
    counts = resampled(50)
    assert (counts.sum(axis=1) == 50).all() and (counts[0] == 1).all() and counts[1:].max() > 3
    assert abs((counts[1:] == 0).mean() - (1 - 1 / 50) ** 50) < 0.01
    assert not np.array_equal(resampled(50), resampled(50, 1))


def test_the_interval_of_a_mean_is_as_wide_as_theory_has_it():
    low, high = interval(VALUES)
    spread = 1.96 * VALUES.std() / np.sqrt(VALUES.size)
    assert low == pytest.approx(VALUES.mean() - spread, abs=0.1 * spread)
    assert high == pytest.approx(VALUES.mean() + spread, abs=0.1 * spread)
    assert interval(VALUES) == [low, high]
    assert interval(np.ones((2, 10))) == [1.0, 1.0]


def test_seeds_that_differ_widen_it():
    apart = np.concatenate((VALUES - 1, VALUES, VALUES + 1))
    low, high = interval(apart)
    assert high - low > 2 * (interval(VALUES)[1] - interval(VALUES)[0])


def test_a_ratio_is_drawn_together_and_not_from_nothing():
    over = np.abs(VALUES) + 0.1
    assert interval(3 * over, over) == [3.0, 3.0]
    rare = np.zeros((1, 3))
    rare[0, 0] = 1.0  # in many draws it is not there
    assert interval(2 * rare, rare) == [2.0, 2.0]


def test_what_was_found_of_each_seed_is_averaged_and_empty_draws_are_left_out():
    counts = resampled(400)
    by_seed = np.array([counts @ row / 400 for row in (VALUES[0], VALUES[0] + 0.2)])
    by_seed[:, 7] = np.nan
    row = estimate_of_seeds(by_seed)
    assert row["mean"] == pytest.approx(VALUES.mean() + 0.1, abs=1e-4)
    assert row["interval"][0] < row["mean"] < row["interval"][1]
