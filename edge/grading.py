"""How far the FM's answer agrees with the student's, from what a query brings back."""

from __future__ import annotations

import numpy as np

from ..models.confidence import graded_agreement
from ..models.pool import UNKNOWN, LabelPool
from .queries import CloudAnswer


def grade(answer: CloudAnswer, label: str, embedding: np.ndarray, pool: LabelPool, temperature: float) -> float:
    """Graded agreement (see `edgefm.models.confidence`) over the FM's best labels and the student's.

    Args:
        answer: of the FM, under the version of `pool`.
        label: the student's answer.
        embedding: (D,) the student's.
        temperature: the student's.
    """
    said = UNKNOWN if answer.unknown else answer.labels[0]
    if said == label:
        return 1.0
    if UNKNOWN in (said, label) or answer.edge_similarity is None:
        return 0.0  # "unknown" has no posterior: it is the same answer or not
    known = dict(zip(answer.labels, answer.similarities, strict=True)) | {label: answer.edge_similarity}
    fm = np.array([*known.values()])[None]  # (1, k)
    student = (pool.embeddings[[pool.labels.index(name) for name in known]] @ embedding)[None]
    return float(graded_agreement(fm, student, pool.temperature, temperature)[0])
