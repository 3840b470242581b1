from __future__ import annotations

from pathlib import Path

import numpy as np
from edgefm.deploy.camera import DAY, FRAME_SIZE, NIGHT, PHOTOGRAPHS, UNSEEN_BY_DAY, walk
from edgefm.deploy.demo_data import camera_environments
from edgefm.models.images import decode_image


def test_the_walk_follows_from_its_seed_and_shows_every_label():
    frames = list(walk(DAY, 1, 200))
    assert frames == list(walk(DAY, 1, 200))
    assert frames[0] != next(walk(DAY, 2, 1))
    assert {frame.label for frame in frames} == {photograph.label for photograph in PHOTOGRAPHS}


def test_frames_decode_and_nights_are_dark():
    day = [np.asarray(decode_image(frame.image_bytes)) for frame in walk(DAY, 3, 120)]
    night = [np.asarray(decode_image(frame.image_bytes)) for frame in walk(NIGHT, 3, 120)]
    assert day[0].shape == (FRAME_SIZE, FRAME_SIZE, 3)
    assert np.mean(night) < 0.6 * np.mean(day)


def test_the_night_shows_what_the_day_did_not(tmp_path: Path) -> None:
    day, night = camera_environments(tmp_path, 40, seed=0)
    assert day.place == night.place
    assert day.labels == night.labels
    unseen = set(UNSEEN_BY_DAY)
    assert {label for _, label in day.scoring} == set(day.labels) - unseen
    assert {label for _, label in night.scoring} == set(night.labels)
