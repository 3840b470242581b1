"""Telling samples of no label, down to the fewest labels; labels added later are weighed by their own images."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.deploy.evaluate.looks import Look
from edgefm.deploy.evaluate.open_set import LEAST_LABELS, _Answerer, _detection, _folds, _scores
from edgefm.deploy.evaluate.run import _added
from edgefm.deploy.evaluate.study import LookAtFM

SHARPNESS = 0.4


def look(labels: int, images: int = 120) -> LookAtFM:
    rng = np.random.default_rng(0)
    truth = np.arange(images) % labels
    similarities = rng.normal(0, 0.1, (images, labels)) + SHARPNESS * np.eye(labels)[truth]
    names = tuple(f"label {i}" for i in range(labels))
    return LookAtFM(similarities, np.array(names, dtype=object)[truth], names, 0.0, 0.05)


@pytest.mark.parametrize("labels", [LEAST_LABELS, 4, 5, 20])
def test_every_label_is_hidden_once_and_the_hidden_ones_are_told(labels: int):
    fm = look(labels)
    answerer = _Answerer(fm.similarities, fm.similarities, _scores(fm.temperature)["top similarity"], -1.0)
    folds = _folds(answerer, fm)
    assert (np.sum([~known for _, known in folds], axis=0) == 1).all()
    found = _detection([answerer] * 3, fm)
    assert found["auroc"]["mean"] > 0.9 and found["fpr95"]["mean"] < 0.5
    for row in found.values():
        low, high = row["interval"]
        assert low <= row["mean"] <= high and np.isfinite([low, high]).all()


def test_a_draw_of_one_kind_alone_counts_for_nothing():
    fm = look(3, images=6)
    answerer = _Answerer(fm.similarities, fm.similarities, _scores(fm.temperature)["margin"], -1.0)
    assert np.isfinite(_detection([answerer], fm)["auroc"]["interval"]).all()


def test_added_labels_are_weighed_by_their_own_images(tmp_path):
    theirs = [np.array([True, False, False, False]), np.array([False, True, True, True])]
    right = [np.array([True, False, False, False]), np.array([False, True, False, False])]
    results = [{"theirs": t, "fm": t, "before": r, "after": t} for t, r in zip(theirs, right, strict=True)]
    (row,) = _added(Look(tmp_path / "place.tar", "clean"), results)
    assert (row["fm"]["mean"], row["before"]["mean"], row["after"]["mean"]) == (1.0, 0.5, 1.0)
