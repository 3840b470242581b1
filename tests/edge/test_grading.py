from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from edgefm.edge.grading import grade
from edgefm.edge.queries import CloudAnswer
from edgefm.models.confidence import Confidence, graded_agreement
from edgefm.models.pool import UNKNOWN, LabelPool, normalise

LABELS = tuple("abcdefgh")
POOL = LabelPool(LABELS, normalise(np.random.default_rng(0).standard_normal((8, 16))), "fm", temperature=0.05)


def answer(fm: np.ndarray, label: str, unknown: bool = False) -> CloudAnswer:
    """What the cloud says of a sample with this FM embedding, asked about the student's label too."""
    found = POOL.recognise(fm[None], 5)
    return CloudAnswer(
        labels=tuple(LABELS[i] for i in found.indices[0]),
        similarities=tuple(found.similarities[0].tolist()),
        unknown=unknown,
        margin=float(found.margins[0]),
        queue_ms=0.0,
        compute_ms=0.0,
        pool_version=POOL.version,
        samples_labelled=0,
        edge_similarity=float(fm @ POOL.embeddings[LABELS.index(label)]) if label in LABELS else None,
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_grade_from_the_best_labels_is_nearly_that_of_the_whole_pool(seed: int):
    rng = np.random.default_rng(seed)
    fm, student = normalise(rng.standard_normal((2, 16)))
    label = LABELS[int((POOL.embeddings @ student).argmax())]
    whole = graded_agreement((POOL.embeddings @ fm)[None], (POOL.embeddings @ student)[None], 0.05, Confidence(0.07))[0]
    assert grade(answer(fm, label), label, student, POOL, Confidence(0.07)) == pytest.approx(whole, abs=0.02)


def test_unknown_is_a_label_as_similar_as_the_floor():
    pool = replace(POOL, unknown_floor=0.9)
    fm = POOL.embeddings[0]  # similarity 1 with "a": just above the floor
    unknown = answer(fm, UNKNOWN, unknown=True)
    assert (
        grade(answer(fm, "a"), "a", fm, pool, Confidence(0.05))
        == grade(unknown, UNKNOWN, fm, pool, Confidence(0.05))
        == 1.0
    )
    torn = replace(answer(0.89 * fm, "a"), unknown=True)  # just below the floor
    assert grade(torn, "a", fm, pool, Confidence(0.05)) > grade(torn, "a", 0.91 * fm, pool, Confidence(0.05)) > 0.5
    by_the_floor = graded_agreement(np.array([[1.0, 0.9]]), np.array([[-1.0, 0.9]]), 0.05, Confidence(0.05))[0]
    assert grade(answer(fm, UNKNOWN), UNKNOWN, -fm, pool, Confidence(0.05)) == pytest.approx(by_the_floor, abs=0.05)


def test_a_label_that_the_cloud_does_not_have_agrees_with_nothing():
    assert grade(answer(POOL.embeddings[0], "zebra"), "zebra", POOL.embeddings[1], POOL, Confidence(0.05)) == 0.0
