"""The benchmarks' learner: the product's own learning on a small folder of pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from edgefm.cloud.config import CustomizationConfig
from edgefm.cloud.learning import held_out_mask, judge
from edgefm.deploy.bench.learner import Learner, Place, Score, choose_threshold, every_core, summarise
from edgefm.models.checks import require_finite
from edgefm.models.errors import ConfigError, InputError
from edgefm.models.images import encode_jpeg
from edgefm.models.students import student_profile
from rich.console import Console

CONFIG = replace(CustomizationConfig(), first_at=30, tail_from=40, tail_samples=30, views=2, epochs=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_picture, synclip) -> Place:
    root: Path = tmp_path_factory.mktemp("pictures")
    for part, count in (("train", 30), ("val", 6)):
        for number, label in enumerate(("cat", "bus")):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                seed = number + 2 * i + 1000 * (part == "val")
                (folder / f"{i}.jpeg").write_bytes(encode_jpeg(make_picture(seed), 90))
    return Place.open(root, synclip, 60)


@pytest.fixture(scope="module")
def learner(synclip) -> Learner:
    return Learner(synclip, student_profile("lite0-64"), CONFIG)


def test_too_few_images_are_an_error_that_says_how_many(place: Place, synclip, tmp_path: Path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "0.jpeg").write_bytes(place.stream[0].encoded)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    (tmp_path / "val" / "cat" / "0.jpeg").write_bytes(place.stream[1].encoded)
    with pytest.raises(InputError, match=r"has 1 images below train/, 2 are wanted"):
        Place.open(tmp_path, synclip, 2)


def test_it_learns_from_samples_and_scores_by_truth_alone(place: Place, learner: Learner):
    seen, scored = (learner.look(images, 2) for images in (place.stream_under("clean"), place.scoring_under("night")))
    assert len(seen) == 60 and seen.views.shape[:2] == (60, 2)
    few, all_of_them = (learner.learn(seen.at(np.arange(count)), place.pool) for count in (30, 60))
    assert few.tail is None, "below tail_from"
    assert {few.method, all_of_them.method} <= {"head", "head+tail", "refused"}
    for learnt in (learner.version0(place.pool), few, all_of_them):
        threshold = choose_threshold(learnt, seen, place.pool, 0.99)
        score = Score.of(learnt, threshold, scored, place)
        margins = place.pool.recognise(learnt.embed(scored), top_k=1).margins
        assert score.on_edge.tolist() == (margins >= threshold).tolist()
        right = np.where(score.on_edge, score.student_right, score.fm_right)
        assert score.system_minus_fm.tolist() == (right.astype(int) - score.fm_right).tolist()
    flipped = Score.of(
        few, threshold, scored, replace(place, truth=place.truth[::-1])
    )  # two labels, one after the other
    answered = ~place.pool.recognise(few.embed(scored), top_k=1).unknown
    as_it_is = Score.of(few, threshold, scored, place)
    assert flipped.on_edge.tolist() == as_it_is.on_edge.tolist()
    assert (flipped.student_right == ~as_it_is.student_right)[answered].all()


def test_after_an_alarm_the_new_samples_judge(place: Place, learner: Learner):
    day = learner.look(place.stream_under("clean"), 1)
    samples = day.then(replace(day, fm=day.fm[::-1]))
    mask = held_out_mask(np.arange(120), CONFIG)
    for start in (0, 60):
        learnt = learner.learn(samples, place.pool, judge_from=start)
        judges = samples.at(np.flatnonzero(mask & (np.arange(120) >= start)))
        by_them = judge(learnt.embed(judges), judges.fm, np.ones(len(judges)), place.pool)
        assert learnt.method != "refused" and learnt.confidence == by_them.confidence


def test_too_few_samples_to_judge_or_to_train_a_tail_are_an_error(place: Place, learner: Learner):
    samples = learner.look(place.stream_under("clean")[:35], 1)
    for wrong in ({"judge_from": 10}, {"beside": samples}):
        with pytest.raises(ConfigError, match="too few"):
            learner.learn(samples, place.pool, **wrong)


def test_the_summary_counts_points_and_its_interval_holds_the_mean():
    rng = np.random.default_rng(1)
    scores = [Score(*(rng.random(50) < share for share in (0.7, 0.8, 0.9))) for _ in range(3)]
    row = summarise(scores)
    system = [np.where(s.on_edge, s.student_right, s.fm_right).mean() - s.fm_right.mean() for s in scores]
    assert row["system_minus_fm"] == pytest.approx(np.mean(system), abs=1e-4)
    assert row["edge_share"] == pytest.approx(np.mean([s.on_edge.mean() for s in scores]), abs=1e-4)
    low, high = row["edge_share_interval"]
    assert low < row["edge_share"] < high


def test_results_come_in_order_from_processes_of_their_own_and_errors_as_they_were():
    with pytest.raises(ConfigError, match="growth"), every_core(Console(quiet=True)) as each:
        results = each(_process_of, [(1.5,), (2.5,), (float("nan"),), (3.5,)])
        (first, process), (second, _) = next(results), next(results)
        assert (first, second) == (1.5, 2.5) and process != os.getpid()
        next(results)


@dataclass
class _Settings:
    growth: float


def _process_of(growth: float) -> tuple[float, int]:
    require_finite(_Settings(growth))
    return growth, os.getpid()
