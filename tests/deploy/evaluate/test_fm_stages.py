"""The FM in pieces: the same answers, the cost of each piece, and what is sent in between."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from edgefm.deploy.camera import DAY, walk
from edgefm.deploy.evaluate.fm_stages import StagedFM, measure, pack, unpack
from edgefm.models.errors import ConfigError
from edgefm.models.images import decode_image


@pytest.fixture(scope="module")
def fm(synclip) -> StagedFM:
    return StagedFM(synclip)


@pytest.fixture(scope="module")
def frames() -> list[bytes]:
    return [frame.image_bytes for frame in walk(DAY, seed=0, frames=12)]


def test_the_pieces_one_after_another_and_what_is_left_from_each_give_the_fms_embeddings(fm, synclip, frames):
    images, seen = synclip.preprocess.batch([decode_image(data) for data in frames]), {}
    expected = synclip.embed(images)
    assert fm.run(images, lambda boundary, reached: seen.setdefault(boundary, reached)) == pytest.approx(expected)
    assert list(seen) == list(range(1, fm.end)) and len(fm.names) == fm.end + 1
    for boundary, reached in {0: images, **seen}.items():
        assert fm.go_on(boundary, reached) == pytest.approx(expected, abs=1e-5), fm.names[boundary]
    sides = [seen[boundary].shape[-1] for boundary in seen]
    assert sides == sorted(sides, reverse=True) and sides[0] == synclip.input_size // 2 and sides[-1] == 5


def test_only_the_embedded_fm_is_cut():
    class Other:
        name = "openclip:another"

    with pytest.raises(ConfigError, match="openclip:another"):
        StagedFM(Other())  # pyright: ignore[reportArgumentType]


def test_features_arrive_within_half_a_level_and_compressed():
    features = np.random.default_rng(0).normal(size=(8, 10, 10)).astype(np.float32)
    data, level = pack(features), (features.max() - features.min()) / 255
    assert np.abs(unpack(data, features.shape) - features).max() <= 0.5001 * level
    assert len(data) <= len(zlib.compress(bytes(features.size))) + features.size
    assert len(pack(np.maximum(features, 0))) < 0.8 * len(data), "half of the values are one: zlib finds it"
    flat = np.full((2, 3, 3), 1.5, np.float32)
    assert np.array_equal(unpack(pack(flat), flat.shape), flat)


def test_costs_grow_along_the_device_and_shrink_in_the_cloud(fm, frames):
    looked = np.zeros(fm.end - 1, int)

    def exit_at(index: int):
        def look(reached: np.ndarray) -> None:
            looked[index] += 1

        return look

    costs = measure(fm, frames, [exit_at(index) for index in range(fm.end - 1)], repeats=9)
    assert (looked == 12).all(), "every exit on the way is part of the time; the first three are warm-up"
    assert costs.device_ms[0] == 0 and (np.diff(costs.device_ms) > 0).all()
    assert costs.work[0] == 1 and costs.work[-1] == 0 and costs.work[-2] < 0.5
    assert costs.size_bytes[0] == pytest.approx(np.mean([len(data) for data in frames[3:]]), rel=0.1)
    assert (costs.size_bytes[1:-1] > 2000).all() and (costs.pack_ms[1:-1] > 0).all()
    assert costs.pack_ms[0] == costs.pack_ms[-1] == costs.size_bytes[-1] == 0
    factors = costs.draw(np.random.default_rng(0), 2000, 8.0)
    assert np.median(factors) == pytest.approx(8.0, rel=0.1) and costs.spread >= 1
