"""The laboratory from images to report, on the simulated camera: real FM, real learning, tiny numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.camera import DAY, PHOTOGRAPHS, walk
from edgefm.deploy.evaluate.looks import Look, open_look, take
from edgefm.deploy.evaluate.study import FULL, HEAD, StudySettings, fm_of, study

STREAM, SCORING = 160, 36
SETTINGS = StudySettings("lite0-64", (100,), 50, 0.99)


def write_place(folder: Path, seed: int) -> Path:
    for part, count, offset in (("train", STREAM, 0), ("val", 4 * SCORING, 1000)):
        for number, frame in enumerate(walk(DAY, seed + offset, count)):
            path = folder / part / frame.label / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(frame.image_bytes)
    return folder


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Look, Path]]:
    base = tmp_path_factory.mktemp("looks")
    place = write_place(base / "yard", 3)
    looks = [Look(place, "clean"), Look(place, "night")]
    return [(look, take(look, "lite0-64", 150, SCORING, base / str(i))) for i, look in enumerate(looks)]


def test_a_look_is_what_was_asked_for(seen: list[tuple[Look, Path]]) -> None:
    look, folder = seen[0]
    found = open_look(look, folder)
    sizes = [len(each) for each in (found.stream, found.scored, found.truth, found.size_bytes)]
    assert sizes == [150, SCORING, SCORING, SCORING]
    assert found.pool.labels == tuple(sorted(photograph.label for photograph in PHOTOGRAPHS))
    assert len(set(found.truth)) > 5, "scoring images are spread over the labels"
    assert seen[1][0].name == "yard, night"


def test_versions_follow_the_surroundings(seen: list[tuple[Look, Path]]) -> None:
    versions = study(seen, SETTINGS, seed=0)
    assert [(v.look, v.method, v.samples) for v in versions] == [
        (look, method, count)
        for look in ("yard", "yard, night")
        for method, count in (("version 0", 0), (FULL, 0), (FULL, 100), (HEAD, 0), (HEAD, 100))
    ]
    by_day = {(v.method, v.samples): v for v in versions if v.look == "yard"}
    assert np.array_equal(by_day[FULL, 0].similarities, by_day["version 0", 0].similarities)
    by_night = {(v.method, v.samples): v for v in versions if v.look == "yard, night"}
    assert not np.array_equal(by_night[HEAD, 0].similarities, by_night["version 0", 0].similarities), "it came along"
    fm = fm_of(*seen[0])
    labels = np.array(fm.labels, dtype=object)
    known = fm.similarities.max(axis=1) >= fm.unknown_floor
    fm_right = known & (labels[fm.similarities.argmax(axis=1)] == fm.truth)
    assert np.array_equal(fm_right, by_day[HEAD, 100].recording.cloud_right)
    again = study(seen[:1], SETTINGS, seed=0)
    assert np.array_equal(again[-1].similarities, by_day[HEAD, 100].similarities), "one seed, one outcome"
