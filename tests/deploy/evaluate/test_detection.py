"""Detection measured on many resamples at once, against one at a time by others' code."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.deploy.bench.bootstrap import resampled
from edgefm.deploy.evaluate.detection import auroc, fpr95
from sklearn.metrics import roc_auc_score


@pytest.mark.parametrize("ties", [False, True])
def test_every_resample_is_measured_as_if_alone(ties):
    rng = np.random.default_rng(0)
    positive = rng.random(80) < 0.6
    scores = rng.normal(0, 1, 80) + positive
    if ties:
        scores = np.round(scores * 2)
    counts = resampled(80)[:50]
    areas, passing = auroc(scores, positive, counts), fpr95(scores, positive, counts)
    for row, area, passed in zip(counts.astype(int), areas, passing, strict=True):
        drawn, kind = np.repeat(scores, row), np.repeat(positive, row)
        assert area == pytest.approx(roc_auc_score(kind, drawn))
        assert passed == pytest.approx((drawn[~kind] >= np.quantile(drawn[kind], 0.05)).mean())


def test_one_kind_alone_tells_nothing():
    scores, counts = np.arange(4.0), np.array([[1, 1, 1, 1], [2, 2, 0, 0], [0, 0, 1, 3]])
    positive = np.array([False, False, True, True])
    assert auroc(scores, positive, counts).tolist() == [1.0, 0.5, 0.5]
    assert np.isnan(fpr95(scores, positive, counts)).tolist() == [False, True, True]
