"""What a student learns from chosen samples: by policy of upload, and of labels that came later. In processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...cloud.config import CustomizationConfig
from ...models.foundation import load_foundation_model
from ...models.students import student_profile
from ..bench.learner import Learner
from .looks import Look, open_look
from .study import StudySettings, Version, version_of

_PASSED = 4
"""Samples that go past the device for each one that the budget lets it send."""
_ADDED_SHARE = 5
"""One label in so many is added later."""


def upload_policies(
    look: Look, folder: Path, settings: StudySettings, budgets: Sequence[int], seed: int
) -> list[Version]:
    """Students of equal budgets of samples labelled by the FM, out of `_PASSED` times as many that went past.

    `uncertain first`: those of lowest margin under version 0. `random`: drawn. `all`: everything, until the budget is spent.
    The policy is the version's method, the budget its number of samples.
    """
    learner = Learner(
        load_foundation_model("synclip"), student_profile(settings.student), CustomizationConfig(threads=1)
    )
    seen = open_look(look, folder)
    order = np.random.default_rng(seed).permutation(len(seen.stream))
    evidence = seen.stream.at(order[-settings.evidence :])
    version0 = learner.version0(seen.pool)
    versions = []
    for budget in budgets:
        passed = order[: -settings.evidence][: _PASSED * budget]
        margins = seen.pool.recognise(version0.embed(seen.stream.at(passed)), top_k=1).margins
        chosen = {
            "uncertain first": passed[np.sort(np.argsort(margins, kind="stable")[:budget])],
            "random": passed[np.sort(np.random.default_rng([seed, 1]).permutation(len(passed))[:budget])],
            "all": passed[:budget],
        }
        for policy, picked in chosen.items():
            learnt = learner.learn(seen.stream.at(picked), seen.pool)
            versions.append(version_of(learnt, policy, budget, seen, evidence, settings.target, seed))
    return versions


def added_labels(look: Look, folder: Path, settings: StudySettings, samples: int, seed: int) -> dict[str, np.ndarray]:
    """Every fifth label joins the pool as text once a student has learned without it from half of the samples; the next
    student learns from all of them with the whole pool. Returns (M,) bool: the images of added labels, and those of them
    that are answered right by the FM, by the student before, and by the one after."""
    learner = Learner(
        load_foundation_model("synclip"), student_profile(settings.student), CustomizationConfig(threads=1)
    )
    seen = open_look(look, folder)
    labels = np.array(seen.pool.labels, dtype=object)
    share = min(_ADDED_SHARE, len(labels))
    late = np.arange(len(labels)) % share == seed % share
    first_pool = replace(seen.pool, labels=tuple(labels[~late]), embeddings=seen.pool.embeddings[~late])
    order = np.random.default_rng(seed).permutation(len(seen.stream))
    before = learner.learn(seen.stream.at(order[: samples // 2]), first_pool)
    after = learner.learn(seen.stream.at(order[:samples]), seen.pool, running=before)
    theirs = np.isin(seen.truth, labels[late])

    def right(embeddings: np.ndarray) -> np.ndarray:
        return theirs & (labels[seen.pool.recognise(embeddings, top_k=1).indices[:, 0]] == seen.truth)

    return {
        "theirs": theirs,
        "fm": right(np.asarray(seen.scored.fm)),
        "before": right(before.embed(seen.scored)),
        "after": right(after.embed(seen.scored)),
    }
