"""What a disagreement with the FM is expected to cost, judged by FM and student together. numpy only.

To count every disagreement as a loss overstates what the edge's answers cost: where student and FM differ, the FM is often
torn itself, and sometimes wrong. Both models' similarities become posteriors through a temperature each, and a product of
experts joins them,

    log p(y) = FM_WEIGHT log p_FM(y) + STUDENT_WEIGHT log p_student(y) + constant.

The graded agreement of a sample is 1 - (p(FM's label) - p(student's label)): 1 where they say the same; its mean over the
samples that the edge answers is 1 minus the accuracy those answers are expected to lose against the FM's. No label is
needed at run time: the FM's temperature comes with the FM, the student's is fitted on the FM's posteriors, and the two
weights were fitted once, on images of other classes (docs: customization).
"""

from __future__ import annotations

import numpy as np

FM_WEIGHT = 0.75
STUDENT_WEIGHT = 0.40
_TEMPERATURES = np.geomspace(0.002, 1.0, 120)


def log_posterior(similarities: np.ndarray, temperature: float) -> np.ndarray:
    """(N, K) cosines -> (N, K) log-probabilities of the labels."""
    logits = similarities / temperature
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def fit_temperature(similarities: np.ndarray, posteriors: np.ndarray) -> float:
    """The temperature at which (N, K) student similarities are closest, in cross entropy, to the FM's (N, K) posteriors."""
    losses = [-(posteriors * log_posterior(similarities, t)).sum(axis=1).mean() for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def graded_agreement(
    fm_similarities: np.ndarray, student_similarities: np.ndarray, fm_temperature: float, student_temperature: float
) -> np.ndarray:
    """(N,) graded agreement in [0, 2]: above 1 where both together trust the student's label more than the FM's.

    Args:
        fm_similarities, student_similarities: (N, K) cosines with the same K labels, the best of each among them.
    """
    joint = FM_WEIGHT * log_posterior(fm_similarities, fm_temperature) + STUDENT_WEIGHT * log_posterior(
        student_similarities, student_temperature
    )
    p = np.exp(log_posterior(joint, 1.0))
    rows = np.arange(len(p))
    return 1.0 - (p[rows, fm_similarities.argmax(axis=1)] - p[rows, student_similarities.argmax(axis=1)])
