"""Exits that the FM has taught, on the demo's photographs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from edgefm.deploy.camera import DAY, PHOTOGRAPHS, walk
from edgefm.deploy.evaluate.exits import Exit, Sent, Staged, choose_rule, fit_exits, look, on_device, record, send
from edgefm.deploy.evaluate.fm_stages import StagedFM
from edgefm.models.foundation import build_pool
from edgefm.models.pool import LabelPool, normalise

TARGET = 0.99


@pytest.fixture(scope="module")
def fm(synclip) -> StagedFM:
    return StagedFM(synclip)


@pytest.fixture(scope="module")
def pool(synclip) -> LabelPool:
    return build_pool(synclip, [photograph.label for photograph in PHOTOGRAPHS])


@pytest.fixture(scope="module")
def stream(fm) -> Staged:
    return look(fm, [frame.image_bytes for frame in walk(DAY, seed=0, frames=120)])


@pytest.fixture(scope="module")
def exits(stream, pool) -> list[Exit]:
    return fit_exits(stream, np.arange(len(stream)) % 40 >= 30, pool)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return np.array([frame.label for frame in walk(DAY, seed=1, frames=40)], dtype=object)


@pytest.fixture(scope="module")
def scored(fm) -> tuple[Staged, Sent]:
    encoded = [frame.image_bytes for frame in walk(DAY, seed=1, frames=40)]
    return look(fm, encoded), send(fm, encoded)


def said_of(pool: LabelPool, embeddings: np.ndarray) -> np.ndarray:
    return pool.with_unknown(embeddings @ pool.embeddings.T).argmax(axis=1)


def test_features_of_8_bits_say_what_the_fm_says(scored, pool):
    staged, sent = scored
    similarity = (sent.embeddings * staged.fm).sum(axis=2)  # (B, N)
    assert sent.embeddings.shape == (7, *staged.fm.shape) and similarity.min() > 0.999
    agrees = [(said_of(pool, each) == said_of(pool, staged.fm)).mean() for each in sent.embeddings]
    assert agrees[0] == 1 and min(agrees) >= 0.95
    assert sent.size_bytes.shape == (40, 7) and (sent.size_bytes[:, 1] > sent.size_bytes[:, -1]).all()


def test_exits_agree_with_the_fm_the_more_the_deeper_they_are(exits, scored, pool):
    staged, _ = scored
    agreement = [
        (one.similarities(pooled, pool).argmax(axis=1) == said_of(pool, staged.fm)).mean()
        for one, pooled in zip(exits, staged.pooled, strict=True)
    ]
    at_work = on_device(exits, pool)[3](np.tile(staged.pooled[3][:5, :, None, None], (1, 1, 10, 10)))
    assert at_work == pytest.approx(exits[3].sureness(exits[3].similarities(staged.pooled[3][:5], pool)), rel=1e-4)
    assert len(exits) == 6 and agreement[-1] > 0.8
    assert agreement[-1] > agreement[0] and np.corrcoef(np.arange(6), agreement)[0, 1] > 0.5


def test_an_exit_whose_features_hold_the_embedding_says_what_the_fm_says(pool):
    rng = np.random.default_rng(0)
    fm = normalise(pool.embeddings[rng.integers(len(pool.labels), size=400)] + rng.normal(0, 0.02, (400, 1280)))
    basis = np.linalg.svd(pool.embeddings, full_matrices=False)[2]  # of all that the labels lie in
    pooled, noise = (fm @ basis.T).astype(np.float32), rng.normal(size=(400, 9)).astype(np.float32)
    good, blind = fit_exits(Staged((pooled, noise), fm), np.arange(400) >= 300, pool)
    rows = slice(300, None)
    agreement, sureness = [], []
    for one, values in ((good, pooled), (blind, noise)):
        similarities = one.similarities(values[rows], pool)
        agreement.append((similarities.argmax(axis=1) == said_of(pool, fm[rows])).mean())
        sureness.append(one.sureness(similarities).mean())
    assert agreement[0] > 0.97 and agreement[1] < 0.35
    assert sureness[0] > 0.9 and sureness[1] < 0.35, "an exit that knows nothing is not sure either"


def test_the_threshold_is_the_lowest_that_keeps_the_target_and_needs_no_truth(exits, stream, pool):
    rule = choose_rule(exits, stream, pool, TARGET)
    assert rule.agreement >= TARGET and rule.stay[0] == 1 and rule.stay[-1] == 0
    assert (np.diff(rule.stay) <= 0).all() and 0 < rule.stay[-2] < 1
    lenient, strict = (choose_rule(exits, stream, pool, target) for target in (0.8, 1.0))
    assert lenient.threshold <= rule.threshold <= strict.threshold and strict.agreement >= 1
    assert lenient.stay[-2] <= rule.stay[-2] <= strict.stay[-2]


def test_exits_that_know_nothing_leave_everything_to_the_end(stream, pool):
    rng = np.random.default_rng(0)
    learnt_from, evidence = (
        replace(stream, pooled=tuple(rng.normal(size=values.shape).astype(np.float32) for values in stream.pooled))
        for _ in range(2)
    )
    rule = choose_rule(fit_exits(learnt_from, np.arange(len(stream)) % 40 >= 30, pool), evidence, pool, TARGET)
    assert rule.agreement >= TARGET and rule.stay[-2] > 0.9


def test_truth_scores_and_does_nothing_else(exits, scored, truth, pool):
    staged, sent = scored
    recording = record(exits, staged, sent, truth, pool)
    shuffled = record(exits, staged, sent, truth[::-1], pool)
    for name in ("sureness", "size_bytes"):
        assert np.array_equal(getattr(recording, name), getattr(shuffled, name))
    assert not np.array_equal(recording.edge_right, shuffled.edge_right)
    fm_right = np.array(pool.answers(pool.recognise(staged.fm)), dtype=object) == truth
    assert np.array_equal(recording.edge_right[:, -1], fm_right) and np.array_equal(
        recording.cloud_right[:, 0], fm_right
    )
    assert not recording.edge_right[:, 0].any() and (recording.sureness[:, 0] == 0).all()
    assert recording.edge_right[:, -2].mean() > recording.edge_right[:, 1].mean()
    part = recording.at(np.array([3, 3, 0])).with_payload(9000)
    assert part.size_bytes[:, 0].tolist() == [9000] * 3 and len(part) == 3
    assert np.array_equal(part.size_bytes[:, 1:], recording.size_bytes[[3, 3, 0], 1:])
