"""What a disagreement with the FM is expected to cost, judged by FM and student together.

To count every disagreement as a loss overstates what the edge's answers cost: where student and FM differ, the FM is often
torn itself, and sometimes wrong. Both models' similarities become posteriors through a temperature each, and a product of
experts joins them,

    log p(y) = EXPERTS ((1 - share) log p_FM(y) + share log p_student(y)) + constant.

The graded agreement of a sample is 1 - (p(FM's label) - p(student's label)): 1 where they say the same; its mean over the
samples that the edge answers is 1 minus the accuracy those answers are expected to lose against the FM's. No label is
needed at run time: the FM's temperature comes with the FM; the student's, and its share in the joint opinion, are fitted on
samples that both have seen. How the share follows from them was fitted once, on images of other classes (docs:
customization).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

EXPERTS = 1.2
"""Sum of the two weights: 2 would be independent experts, 1 a single one."""
PRIOR_SHARE = 0.27
"""A student's share before it has been judged: a standard deviation below the average of 0.35, since the switcher is to keep its
target in most places and not in half of them."""
_PRIOR_SAMPLES = 50
_SHARE, _BY_FM_DOUBT, _BY_DOUBT = 0.27, 1.8, -0.9
_SHARES = (0.2, 0.65)
MIN_TEMPERATURE = 1e-3
"""Below it, softmax(cosines / temperature) is a step; far below it, the quotient overflows and agreement is no number."""
_TEMPERATURES = np.geomspace(0.002, 1.0, 120)


def log_posterior(similarities: np.ndarray, temperature: float) -> np.ndarray:
    """(N, K) cosines -> (N, K) log-probabilities of the labels."""
    logits = similarities / temperature
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def fit_temperature(similarities: np.ndarray, posteriors: np.ndarray, weights: np.ndarray) -> float:
    """The temperature at which (N, K) student similarities are closest, in weighted cross entropy, to the FM's (N, K)
    posteriors."""
    losses = [-(weights @ (posteriors * log_posterior(similarities, t)).sum(axis=1)) for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


@dataclass(frozen=True)
class Confidence:
    """How far a student is to be believed.

    Attributes:
        temperature: softmax(similarities / temperature) is how sure it is of each label.
        share: in [0, 1], its share in the joint opinion with the FM.
    """

    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE, allow_inf_nan=False)]
    share: Annotated[float, Field(ge=0, le=1)] = PRIOR_SHARE

    def with_other_pool(self) -> Confidence:
        """Where the student answers with another pool than the one that it was judged with."""
        return replace(self, share=min(self.share, PRIOR_SHARE))

    @classmethod
    def fit(
        cls, student_similarities: np.ndarray, fm_similarities: np.ndarray, weights: np.ndarray, fm_temperature: float
    ) -> Confidence:
        """From (N, K) cosines of N samples, held out of the student's training, and their (N,) weights.

        The less sure the FM is, the more a second opinion counts; and the surer the student can be at a temperature that
        predicts the FM, the better it is.
        """
        posterior = np.exp(log_posterior(fm_similarities, fm_temperature))
        weights = weights / weights.sum()
        temperature = fit_temperature(student_similarities, posterior, weights)
        fm_doubt = 1.0 - weights @ posterior.max(axis=1)
        doubt = 1.0 - weights @ np.exp(log_posterior(student_similarities, temperature).max(axis=1))
        share = np.clip(_SHARE + _BY_FM_DOUBT * fm_doubt + _BY_DOUBT * doubt, *_SHARES)
        samples = 1.0 / (weights**2).sum()  # that many of equal weight are worth as much (Kish)
        return cls(temperature, float((samples * share + _PRIOR_SAMPLES * PRIOR_SHARE) / (samples + _PRIOR_SAMPLES)))


def graded_agreement(
    fm_similarities: np.ndarray, student_similarities: np.ndarray, fm_temperature: float, student: Confidence
) -> np.ndarray:
    """(N,) graded agreement in [0, 2]: above 1 where both together trust the student's label more than the FM's.

    Args:
        fm_similarities, student_similarities: (N, K) cosines with the same K labels, the best of each among them.
    """
    fm_log = log_posterior(fm_similarities, fm_temperature)
    student_log = log_posterior(student_similarities, student.temperature)
    p = np.exp(log_posterior(EXPERTS * ((1.0 - student.share) * fm_log + student.share * student_log), 1.0))
    rows = np.arange(len(p))
    return 1.0 - (p[rows, fm_similarities.argmax(axis=1)] - p[rows, student_similarities.argmax(axis=1)])
