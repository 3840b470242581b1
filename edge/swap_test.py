"""What a new student must pass on this device before it answers: it runs, it is fast enough, it is no worse."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ..models.errors import ModelError
from ..models.images import decode_image, encode_jpeg
from ..models.pool import LabelPool
from .refusals import RefusedError
from .student import Student

_TIMED_RUNS = 9
_MIN_SAMPLES = 30
SIGNIFICANCE = 0.01
_SHORT_SIDE = 256  # of a large frame that is kept: more than any student sees


@dataclass(frozen=True)
class _Answered:
    image: bytes
    label: str
    pool_version: str


class RecentAnswers:
    """The device's latest samples that the FM has labelled, in memory; the oldest go first. Threads may share it.

    Args:
        count, max_bytes: of encoded images, at most.
    """

    def __init__(self, count: int = 200, max_bytes: int = 8 * 1024 * 1024) -> None:
        self._samples: deque[_Answered] = deque()
        self._count = count
        self._max_bytes = max_bytes
        self._large_bytes = max_bytes // count
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, encoded: bytes, image: Image.Image, label: str, pool_version: str) -> None:
        """A frame, encoded and decoded, with the FM's label; one too large for its share is kept scaled down."""
        if len(encoded) > self._large_bytes:
            scale = _SHORT_SIDE / min(image.size)
            if scale < 1:
                size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
                image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
            encoded = encode_jpeg(image)
        with self._lock:
            self._samples.append(_Answered(encoded, label, pool_version))
            self._bytes += len(encoded)
            while len(self._samples) > self._count or self._bytes > self._max_bytes:
                self._bytes -= len(self._samples.popleft().image)

    def of_pool(self, version: str) -> list[tuple[bytes, str]]:
        """(encoded image, the FM's label) of those answered with that pool, oldest first."""
        with self._lock:
            return [(sample.image, sample.label) for sample in self._samples if sample.pool_version == version]

    def latest(self) -> bytes | None:
        with self._lock:
            return self._samples[-1].image if self._samples else None


@dataclass(frozen=True)
class SwapTest:
    """The test of a candidate against the student that runs.

    Attributes:
        recent: the samples it is tried on.
        slower_than: a candidate of the same profile that takes more than this multiple of the running one's time is
            refused.
        stopping: asked between two samples; True ends the test at once, unpassed.
    """

    recent: RecentAnswers
    slower_than: float
    stopping: Callable[[], bool]

    def __call__(self, candidate: Student, running: Student, pool: LabelPool) -> None:
        """Raises `RefusedError` for a candidate that is not fit to take over."""
        try:
            if candidate.manifest.profile == running.manifest.profile:
                self._check_speed(candidate, running)
            self._check_agreement(candidate, running, pool)
        except ModelError as error:
            raise RefusedError("FAILED", f"it failed on a recent frame: {error}") from error

    def _check_speed(self, candidate: Student, running: Student) -> None:
        latest = self.recent.latest()
        image = decode_image(latest) if latest else Image.new("RGB", (_SHORT_SIDE, _SHORT_SIDE), (128, 128, 128))
        candidate_ms, running_ms = _least_ms(candidate, running, image)
        if candidate_ms > self.slower_than * running_ms:  # was the device busy at the wrong moment? Once more
            candidate_ms, running_ms = _least_ms(candidate, running, image)
        if candidate_ms <= self.slower_than * running_ms:
            return
        raise RefusedError(
            "SLOW",
            f"{candidate_ms:.2f} ms a frame, version {running.manifest.version} of the same profile "
            f"({running.manifest.profile}) takes {running_ms:.2f} ms; at most {self.slower_than:g} times that is taken",
        )

    def _check_agreement(self, candidate: Student, running: Student, pool: LabelPool) -> None:
        """Paired on the samples that the FM has labelled with this pool: a one-sided exact sign test at `SIGNIFICANCE`.

        Only samples on which exactly one of the two agrees with the FM count; under the null hypothesis either is as
        likely. Most samples went to the FM because the running student was unsure of them, so that the test leans
        towards the candidate: it stops what is clearly broken, not what is a little worse. The cloud's gate does that.
        """
        samples = self.recent.of_pool(pool.version)
        if len(samples) < _MIN_SAMPLES:
            return
        lost = won = 0
        for encoded, label in samples:
            if self.stopping():
                raise RefusedError("FAILED", "the device stopped during the test")
            image = decode_image(encoded)
            before, after = _agrees(running, pool, image, label), _agrees(candidate, pool, image, label)
            lost += before and not after
            won += after and not before
        if sign_test(lost, won) < SIGNIFICANCE:
            raise RefusedError(
                "WORSE",
                f"of {len(samples)} recent samples it disagrees with the FM on {lost} that version "
                f"{running.manifest.version} has right, and the other way round on {won}",
            )


def sign_test(lost: int, won: int) -> float:
    """The probability of at least so many losses among `lost + won` tosses of a fair coin."""
    tosses = lost + won
    return sum(math.comb(tosses, losses) for losses in range(lost, tosses + 1)) / 2**tosses


def _agrees(student: Student, pool: LabelPool, image: Image.Image, label: str) -> bool:
    return student.recognise(student.preprocess(image), pool)[1] == label


def _least_ms(candidate: Student, running: Student, image: Image.Image) -> tuple[float, float]:
    """Of each on this frame. The least of several runs, in turn and in changing order: other work on the device only adds
    to a time, and it adds to the two by turns; the first run of each is warm-up.
    """
    order = random.Random(0)
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(_TIMED_RUNS + 1):
        for turn in order.sample((0, 1), 2):
            student = (candidate, running)[turn]
            started = time.perf_counter()
            student.embed(student.preprocess(image))
            times[turn].append((time.perf_counter() - started) * 1e3)
    return min(times[0][1:]), min(times[1][1:])
