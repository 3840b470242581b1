"""How far the FM's answer agrees with the student's, from what a query brings back."""

from __future__ import annotations

import numpy as np

from ..models.confidence import Confidence, graded_agreement
from ..models.pool import UNKNOWN, LabelPool
from .queries import CloudAnswer


def grade(answer: CloudAnswer, label: str, embedding: np.ndarray, pool: LabelPool, confidence: Confidence) -> float:
    """Graded agreement (see `edgefm.models.confidence`) over the FM's best labels, the student's, and "unknown".

    Args:
        answer: of the FM, under the version of `pool`.
        label: the student's answer.
        embedding: (D,) the student's.
        confidence: the student's.
    """
    if answer.label == label:
        return 1.0
    known = dict(zip(answer.labels, answer.similarities, strict=True))
    if label != UNKNOWN:
        if answer.edge_similarity is None:
            return 0.0  # the cloud's pool has no such label
        known[label] = answer.edge_similarity
    fm = np.array([*known.values()], np.float32)[None]  # (1, k)
    student = (pool.embeddings[[pool.labels.index(name) for name in known]] @ embedding)[None]
    return float(graded_agreement(pool.with_unknown(fm), pool.with_unknown(student), pool.temperature, confidence)[0])
