"""The benchmark of rankings: a place shows some labels more often, none of its images twice, and the draw is the seed's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.bench import ranking
from edgefm.deploy.bench.labels import Scored
from edgefm.deploy.weights import WEIGHTS
from edgefm.models.pool import UNKNOWN
from rich.console import Console

LABELS = ("cat", "dog", "owl", "bus")


@pytest.fixture
def data(synclip) -> Scored:
    embeddings = np.random.default_rng(0).normal(size=(400, synclip.dim)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return Scored("place.tar", embeddings, np.repeat(np.array(LABELS, dtype=object), 100))


def test_a_place_shows_some_labels_more_often_and_nothing_twice(data: Scored, synclip, monkeypatch):
    monkeypatch.setattr(ranking, "UNSURE", 1.0)
    place = ranking.Place.draw(data, synclip, 4, seed=3)
    shown = sorted((np.count_nonzero(data.truth[place.unsure] == label) for label in LABELS), reverse=True)
    assert len(set(place.unsure.tolist())) == len(place.unsure)
    assert 35 <= shown[0] <= 65 and 12 <= shown[1] <= 38 and shown[3] < 25  # halves of 100, 50, 33 and 25
    assert place.name == "place" and 0 < len(place.recent) <= ranking.RECENT
    same, other = (ranking.Place.draw(data, synclip, 4, seed) for seed in (3, 4))
    assert same.recent == place.recent and same.unsure.tolist() == place.unsure.tolist()
    assert other.unsure.tolist() != place.unsure.tolist()


def test_the_least_sure_are_ranked_and_a_place_may_have_fewer_labels(data: Scored, synclip):
    place = ranking.Place.draw(data, synclip, 2, seed=0)
    assert len(place.pool.labels) == 2 and set(data.truth[place.unsure]) <= set(place.pool.labels)
    assert set(place.recent) <= {*place.pool.labels, UNKNOWN}
    assert (np.diff(place.found.margins[place.unsure]) >= 0).all()


def test_every_way_is_scored_on_the_same_samples(tmp_path: Path, make_picture, smollm2):
    for number, label in enumerate(LABELS):
        (tmp_path / "val" / label).mkdir(parents=True)
        for seed in range(4):
            make_picture(10 * number + seed).save(tmp_path / "val" / label / f"{seed}.jpg")
    result = ranking.bench_ranking([tmp_path], WEIGHTS["smollm2"].path, 4, 2, Console(quiet=True))
    (row,) = result["rows"]
    ways = {"FM", "FM and counts", *(f"FM, counts and language model, {weight:g}" for weight in ranking.WEIGHTS)}
    assert set(row) == {"data", "labels", "samples", *ways} and row["labels"] == len(LABELS) and row["samples"] >= 2
    for way in ways - {"FM"}:
        assert row[way]["gain"] == pytest.approx(row[way]["right"] - row["FM"]["right"], abs=2e-3)
        assert row[way]["gain_interval"][0] <= row[way]["gain"] <= row[way]["gain_interval"][1]
        over = row[way]["right"] - row["FM and counts"]["right"]
        assert row[way]["over_counts"] == pytest.approx(over, abs=2e-3)
