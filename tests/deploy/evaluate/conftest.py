"""Made material for experiments: a student that is right where its margin is large, beside an FM that is nearly always right."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.deploy.evaluate.exits import ExitRecording, ExitRule
from edgefm.deploy.evaluate.experiment import Link, Material, Traffic
from edgefm.deploy.evaluate.fm_stages import StageCosts
from edgefm.deploy.evaluate.rivals import Rival
from edgefm.deploy.evaluate.study import FULL, HEAD, LookAtFM, Version
from edgefm.deploy.replay.recording import Recording
from edgefm.deploy.replay.timing import BatchCost, CloudProfile, Timing
from edgefm.deploy.traces import constant_trace
from edgefm.models.confidence import Confidence

IMAGES, LABELS, SEEDS = 60, 8, 3
LOOKS = ("place", "place, night")
LINK = Link("even", constant_trace(6.0), constant_trace(6.0))
_FM_WRONG = np.arange(IMAGES) % 20 == 7


def similarities(truth: np.ndarray, margins: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(M, K) with these margins, the true label in front where it is right."""
    best = np.where(right, truth, (truth + 1) % LABELS)
    found = rng.uniform(0.0, 0.2, (len(truth), LABELS))
    found[np.arange(len(truth)), best] = found.max(axis=1) + margins
    return found


def version(look: str, seed: int, method: str, samples: int, threshold: float = 0.1) -> Version:
    rng = np.random.default_rng([seed, samples])
    truth, margins = np.arange(IMAGES) % LABELS, rng.uniform(0, 0.5, IMAGES)
    right = margins > threshold
    recording = Recording(margins, right.astype(float), right, ~_FM_WRONG, np.full(IMAGES, 2000))
    found = similarities(truth, margins, right, rng)
    return Version(look, seed, method, samples, found, recording, Confidence(0.05), threshold)


def fm(look: str) -> LookAtFM:
    rng = np.random.default_rng(9)
    truth, labels = np.arange(IMAGES) % LABELS, tuple(f"label {k}" for k in range(LABELS))
    found = similarities(truth, np.full(IMAGES, 0.3), ~_FM_WRONG, rng)
    return LookAtFM(found, np.array(labels, dtype=object)[truth], labels, -1.0, 0.05)


def rival() -> Rival:
    """Two boundaries between image and end; the second exit is sure of every other image, and right."""
    early = np.tile([0.0, 0.2, 0.9, np.inf], (IMAGES, 1))
    early[::2, 2] = 0.3
    right = np.ones((IMAGES, 4), bool)
    right[:, 0] = False
    recording = ExitRecording(early, right, np.ones((IMAGES, 4), bool), np.tile([2000, 8000, 1000, 0], (IMAGES, 1)))
    return Rival(recording, ExitRule(0.5, np.array([1.0, 1.0, 0.5, 0.0]), 0.99))


@pytest.fixture(scope="session")
def material() -> Material:
    cost = BatchCost(size=1, p50_ms=20.0, p95_ms=25.0)
    versions = [
        version(look, seed, method, count)
        for look in LOOKS
        for seed in range(SEEDS)
        for method, count in (
            ("version 0", 0),
            (FULL, 0),
            (FULL, 100),
            (FULL, 400),
            (HEAD, 0),
            (HEAD, 100),
            (HEAD, 400),
        )
    ]
    stages = StageCosts(
        ("image", "one", "two", "end"),
        np.array([0.0, 5.0, 10.0, 18.0]),
        np.array([0.0, 1.0, 0.5, 0.0]),
        np.array([2000.0, 8000.0, 1000.0, 0.0]),
        np.array([1.0, 0.7, 0.4, 0.0]),
        20.0,
        1.2,
    )
    return Material(
        looks=LOOKS,
        fm={look: fm(look) for look in LOOKS},
        versions=versions,
        seeds=SEEDS,
        target=0.99,
        student="lite0-64",
        device=Timing(4.0, 5.0),
        cloud=CloudProfile(source="a test", foundation_model="none", batches=(cost,)),
        links=[LINK],
        traffic=Traffic(),
        samples=2 * IMAGES,
        rivals=[rival()] * SEEDS,
        stages=stages,
    )
