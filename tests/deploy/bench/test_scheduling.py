"""Policies over recorded lengths, and the files they come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.language.scheduling import ContinuousBatching, SequenceScheduling, StaticBatches
from edgefm.deploy.bench.scheduling import FLAT, MOST, StepTimes, judged, read_lengths, replayed
from edgefm.models.errors import InputError


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    """Of 300 answers, like Alpaca's: most are short, some as long as they may be."""
    random = np.random.default_rng(0)
    return np.minimum(random.lognormal(4.4, 1.0, 300).astype(np.int64) + 1, MOST)


def test_a_flat_step_costs_the_longest_of_each_static_batch(lengths):
    found = replayed(lengths, lengths, StaticBatches(16), FLAT)
    # The first token comes with the prompt, the end with a last step; who reaches the most is not asked for an end.
    steps = sum(min(lengths[i : i + 16].max(), MOST - 1) for i in range(0, 300, 16))
    assert found["requests_per_s"] == pytest.approx(300 / steps)


def test_the_order_of_the_policies_under_a_flat_step(lengths):
    random = np.random.default_rng(1)
    guess = np.clip(lengths + random.laplace(0, 60, 300), 1, MOST)
    static = replayed(lengths, guess, StaticBatches(), FLAT)["requests_per_s"]
    oracle = replayed(lengths, lengths, SequenceScheduling(), FLAT)["requests_per_s"]
    predicted = replayed(lengths, guess, SequenceScheduling(), FLAT)
    free = replayed(lengths, guess, ContinuousBatching(16), FLAT)["requests_per_s"]
    assert static < predicted["requests_per_s"] < oracle and static < free
    assert 0 < predicted["again"] < 0.5


def test_a_step_that_costs_what_is_in_it_leaves_nothing_to_gain(lengths):
    times = StepTimes((1, 1000), (1.0, 1000.0), 0.0)
    static = replayed(lengths, lengths, StaticBatches(), times)["requests_per_s"]
    free = replayed(lengths, lengths, ContinuousBatching(16), times)["requests_per_s"]
    assert free == pytest.approx(static, rel=1e-6)


def test_reading_prompts_costs_time():
    times = StepTimes((1, 10), (1.0, 1.0), 0.5)
    found = replayed(np.array([3]), np.array([3]), StaticBatches(), times)
    assert found["requests_per_s"] == pytest.approx(1 / (64 * 0.5 + 3))


def test_judged():
    found = judged([100, 100, 10], [100, 160, 200])
    assert found["mean_error"] == pytest.approx(250 / 3, abs=0.1)
    assert found["within_50"] == pytest.approx(1 / 3, abs=1e-3)
    assert found["within_100"] == pytest.approx(2 / 3, abs=1e-3)
    assert found["longer_than_predicted"] == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot read the lengths"),
        ("no json", "is no record of answers' lengths"),
        ("[]", "it is empty"),
        ('[{"length": 3}]', "'L_t0.0'"),
        ('{"L_t0.0": 3}', "is no record"),
        ('[{"L_t0.0": "many", "L_t0.3": 3}]', "is no record"),
        ('[{"L_t0.0": 3, "L_t0.3": 4}, {"L_t0.0": 3}]', "is no record"),
        ('[{"L_t0.0": -3}]', "below 1"),
    ],
)
def test_files_that_are_no_record_are_refused(tmp_path: Path, text, reason):
    path = tmp_path / "lengths.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=reason):
        read_lengths(path)


def test_lengths_are_of_the_cool_answer_and_of_the_longest(tmp_path: Path):
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps([{"id": "1", "L_gt": 900, "L_t0.0": 20, "L_t0.7": 30}, {"L_t0.0": 9, "L_t0.7": 9999}]))
    cool, longest = read_lengths(path)
    assert cool.tolist() == [20, 9] and longest.tolist() == [30, MOST]
