"""What the speed benchmarks send."""

from __future__ import annotations

from edgefm.deploy.bench.pictures import LABELS, pictures
from edgefm.models.images import decode_image


def test_pictures_are_of_that_size_and_follow_from_the_seed():
    made = pictures(64, 48, len(LABELS) + 1, seed=3)
    assert {decode_image(data).size for data in made} == {(64, 48)}
    assert len(set(made)) == len(made)  # the second crop of a photograph is another one
    assert made == pictures(64, 48, len(made), seed=3) != pictures(64, 48, len(made), seed=4)
