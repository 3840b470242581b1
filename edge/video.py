"""Video files, cameras and network streams through OpenCV, which is imported when one is opened (extra `video`)."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from PIL import Image

from ..models.errors import InputError, MissingExtraError
from .frames import Frame, Unreadable, sample_id_of

if TYPE_CHECKING:
    import cv2
    import numpy as np

log = logging.getLogger("edgefm.edge.video")

_CAMERA = re.compile(r"camera:(\d+)")
_STREAMS = ("rtsp://", "rtsps://", "http://", "https://")
_TIMEOUT_MS = 5000
_PAUSE_S = (0.2, 0.5, 1.0, 2.0, 5.0)
PATIENCE_S = 60.0
_UNCOUNTED = (".ts", ".mpg", ".mpeg")
"""Streams without a header that says how many frames follow."""

_COUNT_SLACK = 0.05
"""Matroska says how long a video is, not how many frames it has, and its sound may be longer."""


def is_live(source: str) -> bool:
    return bool(_CAMERA.fullmatch(source)) or source.startswith(_STREAMS)


def read_video(path: Path, stride: int) -> Iterator[Frame | Unreadable]:
    """Every `stride`-th frame; a video that ends before the frames its header promises ends with an `Unreadable`.

    Raises:
        InputError: not a video that OpenCV can decode, or not a frame of it.
        MissingExtraError: OpenCV is not installed.
    """
    opencv = _opencv(path)
    name = sample_id_of(path.name)
    capture = opencv.VideoCapture(str(path), opencv.CAP_FFMPEG)
    try:
        counted = path.suffix.lower() not in _UNCOUNTED
        promised = int(capture.get(opencv.CAP_PROP_FRAME_COUNT)) if counted else 0
        number = 0
        while capture.grab():
            if number % stride == 0:
                taken, pixels = capture.retrieve()
                if not taken:
                    break
                yield Frame(f"{name}#{number:08d}", _picture(opencv, pixels))
            number += 1
        if number == 0:
            raise InputError(f"{path} is not a video that can be decoded: damaged, or of a format OpenCV does not know")
        if promised - number > max(2, _COUNT_SLACK * promised):
            detail = f"{path} ends after {number} of the {promised} frames its header promises"
            yield Unreadable(f"{name}#{number:08d}", "truncated", detail)
    finally:
        capture.release()


class LiveVideo:
    """A camera or network stream. Whoever asks gets the latest frame; what came and went unasked is counted.

    A thread of its own reads as fast as frames come, so that none grows stale in a buffer. A stream that stops is
    opened again with growing pauses.

    Args:
        source: `camera:NUMBER`, or a URL; a password in it shows up nowhere.
        patience_s: without a frame for so long, the stream counts as gone.

    Attributes:
        skipped: frames that came and were replaced by a later one before anybody asked.
        reopened: how often it stopped and came back.

    Raises:
        InputError: it cannot be opened; from `__next__`: it stopped and did not come back.
        MissingExtraError: OpenCV is not installed.
    """

    def __init__(self, source: str, patience_s: float = PATIENCE_S) -> None:
        self._opencv = _opencv(source)
        camera = _CAMERA.fullmatch(source)
        self._target: int | str = int(camera[1]) if camera else source
        self._name = _without_password(source)
        self._patience_s = patience_s
        self.skipped = 0
        self.reopened = 0
        self._number = 0
        self._last_s = time.monotonic()
        self._latest: Frame | None = None
        self._error: InputError | None = None
        self._came = threading.Condition()
        self._stop = threading.Event()
        capture = self._open()
        if capture is None:
            raise InputError(f"cannot open {self._name}: no such camera or stream, or it is in use")
        self._thread = threading.Thread(target=self._run, args=(capture,), name="capture", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Frame | Unreadable]:
        return self

    def __next__(self) -> Frame | Unreadable:
        with self._came:
            self._came.wait_for(lambda: self._latest or self._error or self._stop.is_set())
            frame, self._latest = self._latest, None
        if frame is not None:
            return frame
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Lets go of the camera; a read under way is waited for, but not longer than its own timeout."""
        with self._came:
            self._stop.set()
            self._came.notify_all()
        self._thread.join(_TIMEOUT_MS / 1e3 + 1.0)
        self._latest = None

    def counts(self) -> dict[str, int]:
        return {"frames_skipped": self.skipped, "source_reopened": self.reopened}

    def _open(self) -> cv2.VideoCapture | None:
        opencv = self._opencv
        if isinstance(self._target, int):
            capture = opencv.VideoCapture(self._target)
        else:
            timeouts = (opencv.CAP_PROP_OPEN_TIMEOUT_MSEC, opencv.CAP_PROP_READ_TIMEOUT_MSEC)
            parameters = [value for name in timeouts for value in (name, _TIMEOUT_MS)]
            capture = opencv.VideoCapture(self._target, opencv.CAP_FFMPEG, parameters)
        return capture if capture.isOpened() else None

    def _run(self, capture: cv2.VideoCapture) -> None:
        try:
            self._capture(capture)
            error = InputError(
                f"{self._name} stopped after {self._number} frames and did not come back in {self._patience_s:g} s"
            )
        except Exception as fault:  # OpenCV's own, or a picture that is none
            error = InputError(f"{self._name} failed after {self._number} frames: {fault!r}")
        with self._came:
            if not self._stop.is_set():
                self._error = error
            self._came.notify_all()

    def _capture(self, capture: cv2.VideoCapture | None) -> None:
        """Until `close`, or until the stream is gone for good."""
        while capture is not None:
            while not self._stop.is_set():
                came, pixels = capture.read()
                if not came:
                    break
                self._offer(_picture(self._opencv, pixels))
            capture.release()
            if self._stop.is_set():
                return
            log.warning("event=source_stopped source=%s frames=%d", self._name, self._number)
            capture = self._reopen()

    def _reopen(self) -> cv2.VideoCapture | None:
        """None when patience is at its end, counted from the last frame, or on `close`."""
        until, attempts = self._last_s + self._patience_s, 0
        while time.monotonic() < until:
            if self._stop.wait(_PAUSE_S[min(attempts, len(_PAUSE_S) - 1)]):
                return None
            attempts += 1
            capture = self._open()
            if capture is not None:
                self.reopened += 1
                log.info("event=source_back source=%s", self._name)
                return capture
        return None

    def _offer(self, picture: Image.Image) -> None:
        with self._came:
            self.skipped += self._latest is not None
            self._latest = Frame(f"{self._name}#{self._number:08d}", picture)
            self._number += 1
            self._last_s = time.monotonic()
            self._came.notify_all()


def _opencv(source: str | Path) -> ModuleType:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what they would write to the terminal is raised or counted
    try:
        import cv2
    except ImportError as error:
        name = _without_password(str(source))
        raise MissingExtraError(f"{name} needs OpenCV: pip install 'edgefm[video]'") from error
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def _picture(opencv: ModuleType, pixels: np.ndarray) -> Image.Image:
    """From (H, W, 3) uint8 BGR."""
    return Image.fromarray(opencv.cvtColor(pixels, opencv.COLOR_BGR2RGB))


def _without_password(source: str) -> str:
    try:
        parts = urlsplit(source)
    except ValueError:  # an address in brackets that is none; what follows the scheme may hold a password
        return source.partition("://")[0] + "://..."
    if not parts.netloc:
        return source
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
