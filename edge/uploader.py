"""Hands samples over later that could not be asked about in time. In memory: a restart forgets them."""

from __future__ import annotations

import logging
import threading
import time

from ..models.errors import CloudError
from .cloud_client import CloudClient

log = logging.getLogger("edgefm.edge.uploader")
_BATCH = 16
_TIMEOUT_S = 30.0
_PAUSE_S = 2.0


class Uploader:
    """A bounded queue and the thread that empties it; past the bound the most certain sample goes.

    Attributes:
        dropped: samples that found no room.
        sent_bytes: of images the cloud has acknowledged.
    """

    def __init__(self, client: CloudClient, capacity: int) -> None:
        self._client = client
        self._capacity = capacity
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, bytes, float]] = []  # margin, image, propensity
        self._closing_at: float | None = None
        self.dropped = 0
        self.sent_bytes = 0
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    def add(self, image: bytes, margin: float, propensity: float) -> None:
        with self._changed:
            self._waiting.append((margin, image, propensity))
            if len(self._waiting) > self._capacity:
                self._waiting.remove(max(self._waiting, key=lambda sample: sample[0]))
                self.dropped += 1
            self._changed.notify()

    def close(self, patience_s: float) -> int:
        """Goes on for `patience_s` at most; returns how many samples are left behind."""
        with self._changed:
            self._closing_at = time.monotonic() + patience_s
            self._changed.notify()
        self._thread.join()
        return len(self._waiting)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and self._closing_at is None:
                    self._changed.wait()
                batch = self._waiting[:_BATCH]
            left = _TIMEOUT_S if self._closing_at is None else self._closing_at - time.monotonic()
            if not batch or left <= 0:
                return
            try:
                acknowledged = self._client.upload([(image, p) for _, image, p in batch], min(left, _TIMEOUT_S))
            except CloudError as error:
                log.warning("event=upload_postponed samples=%d reason=%r", len(batch), str(error))
                acknowledged = []
            done = {id(batch[position]) for position in acknowledged if position < len(batch)}
            with self._changed:
                self._waiting = [sample for sample in self._waiting if id(sample) not in done]
                self.sent_bytes += sum(len(sample[1]) for sample in batch if id(sample) in done)
                if not done:
                    self._changed.wait(_PAUSE_S if self._closing_at is None else min(_PAUSE_S, max(left, 0)))
