"""The pieces of the swap test; the whole of it on real versions is in test_updater.py."""

from __future__ import annotations

import io

import numpy as np
import pytest
from edgefm.edge.swap_test import SIGNIFICANCE, RecentAnswers, sign_test
from edgefm.models.images import encode_jpeg
from PIL import Image
from scipy.stats import binomtest


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (7, 0), (0, 9), (12, 3), (40, 41), (100, 60)])
def test_the_sign_test_is_the_exact_binomial(lost, won):
    expected = binomtest(lost, lost + won, alternative="greater").pvalue if lost + won else 1.0
    assert sign_test(lost, won) == pytest.approx(expected)


def test_a_version_as_good_as_the_running_one_is_seldom_refused():
    rng = np.random.default_rng(0)
    refused = sum(sign_test(lost, 20 - lost) < SIGNIFICANCE for lost in rng.binomial(20, 0.5, 2000).tolist())
    assert refused <= 40


def picture(seed: int, width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_the_latest_are_kept_within_count_and_bytes():
    image = picture(0, 32, 32)
    by_count, by_bytes = RecentAnswers(count=5, max_bytes=10**6), RecentAnswers(count=20, max_bytes=2500)
    for number in range(30):
        for recent in (by_count, by_bytes):
            recent.add(bytes([number]) * 100, image, str(number), "p" if number != 28 else "q")
    assert [label for _, label in by_count.of_pool("p")] == ["25", "26", "27", "29"]
    assert by_count.of_pool("q") == [(bytes([28]) * 100, "28")] and by_count.latest() == bytes([29]) * 100
    assert len(by_bytes.of_pool("p")) == 19
    larger = RecentAnswers(count=4, max_bytes=1000)
    for number in range(4):
        larger.add(bytes([number]) * 250, image, str(number), "p")
    larger.add(bytes(200), image, "4", "p")
    assert [label for _, label in larger.of_pool("p")] == ["1", "2", "3", "4"]
    assert RecentAnswers().latest() is None


def test_a_large_frame_is_kept_small():
    recent = RecentAnswers(count=200, max_bytes=8 * 2**20)
    frame = picture(1, 1280, 720)
    encoded = encode_jpeg(frame)
    recent.add(encoded, frame, "cat", "p")
    ((kept, label),) = recent.of_pool("p")
    assert len(encoded) > 500_000 and len(kept) < 100_000 and label == "cat"
    assert Image.open(io.BytesIO(kept)).size == (455, 256)
