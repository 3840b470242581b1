"""Hands the spool's samples over when the cloud takes them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence

from ..models.clock import SteadyClock
from ..models.errors import CloudError
from .circuit import Backoff
from .cloud_client import CloudClient
from .spool import Sample, Spool

log = logging.getLogger("edgefm.edge.uploader")
_BATCH = 16
_BATCH_BYTES = 1024 * 1024  # what breaks off is sent again
_TIMEOUT_S = 30.0
_SLOWEST_BYTES_PER_S = 4000
_LOOK_AGAIN_S = 60.0
"""Pause when nothing may go: a new day begins or a sample grows too old without notice."""


class Uploader:
    """The thread that empties a spool.

    Args:
        bytes_per_day: of images sent on one UTC day, at most; 0: no cap. A batch that breaks off counts as far as the link
            has taken it.

    Attributes:
        sent_bytes: of images, in this run.
    """

    def __init__(
        self, client: CloudClient, spool: Spool, environment: str, seed: int | str = 0, bytes_per_day: int = 0
    ) -> None:
        self._client = client
        self._spool = spool
        self._environment = environment
        self._bytes_per_day = bytes_per_day
        self._backoff = Backoff(seed, longest_s=30.0)
        self._clock = SteadyClock(spool.newest_s())  # for ages; a day is the wall clock's
        self._again_at_s = 0.0
        self._asked_to_wait = False
        self._changed = threading.Condition()
        self._added = False
        self._closing_at_s: float | None = None
        self.sent_bytes = 0
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    def add(self, image: bytes, margin: float, propensity: float) -> None:
        """Keeps the sample; it survives the process from here on."""
        self._spool.add(self._environment, image, margin, propensity, self._clock.now_s())
        with self._changed:
            self._added = True
            self._changed.notify()

    def close(self, patience_s: float) -> int:
        """Goes on for `patience_s` at most while the cloud takes samples; returns how many wait for the next run."""
        with self._changed:
            self._closing_at_s = time.monotonic() + patience_s
            self._changed.notify()
        self._thread.join(patience_s)
        self._client.stop_uploads()  # one that began before may have minutes left
        self._thread.join()
        return self._spool.count(self._environment)

    def _run(self) -> None:
        while True:
            now_s, closing_at_s = time.monotonic(), self._closing_at_s
            if closing_at_s is None:
                if now_s < self._again_at_s:
                    self._wait(self._again_at_s - now_s, for_samples=False)
                elif batch := self._batch():
                    self._hand_over(batch, self._timeout_s(batch))
                else:
                    self._wait(_LOOK_AGAIN_S, for_samples=True)
                continue
            # The last word: the pause after a failure is cut short, but not the one that the cloud has asked for.
            if now_s >= closing_at_s or (self._asked_to_wait and now_s < self._again_at_s):
                return
            batch = self._batch()
            left_s = closing_at_s - now_s
            if not batch or not self._hand_over(batch, min(left_s, self._timeout_s(batch)), self._client.available):
                return

    def _wait(self, pause_s: float, for_samples: bool) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing_at_s is not None or (for_samples and self._added), pause_s)
            self._added = False

    def _timeout_s(self, batch: Sequence[Sample]) -> float:
        return _TIMEOUT_S + sum(len(sample.image) for sample in batch) / _SLOWEST_BYTES_PER_S

    def _batch(self) -> list[Sample]:
        self._spool.expire(self._clock.now_s())
        left = self._bytes_per_day - self._spool.sent_on_day(time.time()) if self._bytes_per_day else None
        return self._spool.batch(self._environment, _BATCH, _BATCH_BYTES, left)

    def _hand_over(self, batch: Sequence[Sample], timeout_s: float, wait_for_ready: bool = False) -> bool:
        """Tries; afterwards the spool holds what is still to be sent. Returns whether the cloud took any."""
        taken: list[Sample] = []

        def handing() -> Iterator[tuple[bytes, float]]:
            for sample in batch:
                taken.append(sample)
                yield sample.image, sample.propensity

        self._asked_to_wait = False
        try:
            result = self._client.upload(handing(), timeout_s, wait_for_ready)
        except CloudError as error:
            log.warning("event=upload_postponed samples=%d reason=%s", len(batch), str(error))
            self._settle((), (), taken[:-2])  # gRPC holds one, and one in its buffer
            self._pause(0.0)
            return False
        done = {batch[position].id for position in result.done if position < len(batch)}
        failed = [] if result.retry_after_s else [sample.id for sample in taken if sample.id not in done]
        self._settle(sorted(done), failed, taken)
        if done:
            self._backoff.reset()
        if result.retry_after_s or not done:
            self._asked_to_wait = result.retry_after_s > 0
            self._pause(result.retry_after_s)
        return bool(done)

    def _settle(self, done: Sequence[int], failed: Sequence[int], sent: Sequence[Sample]) -> None:
        sent_bytes = sum(len(sample.image) for sample in sent)
        self.sent_bytes += sent_bytes
        self._spool.settle(done, failed, sent_bytes, time.time())

    def _pause(self, asked_s: float) -> None:
        self._again_at_s = time.monotonic() + max(self._backoff.next_s(), asked_s)
