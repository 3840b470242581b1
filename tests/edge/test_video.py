"""Real files and a real stream over a real socket, as a network camera serves one: motion JPEG over HTTP."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from edgefm.edge.frames import Frame, Unreadable, readable
from edgefm.edge.sources import open_source
from edgefm.edge.video import LiveVideo
from edgefm.models.errors import ConfigError, InputError
from PIL import Image

SIZE = (160, 120)
COUNT = 60


def _colour(number: int) -> tuple[int, int, int]:
    """RGB of frame `number`: every one its own, far apart from what a codec may blur."""
    return (number * 4 % 256, 40, 200)


def _number(frame: Frame) -> int:
    """Which frame it is, by its colour."""
    red, green, blue = np.asarray(frame.image).mean(axis=(0, 1))
    assert abs(green - 40) < 12 and abs(blue - 200) < 12, "red and blue are swapped"
    return round(red / 4)


@pytest.fixture(params=[("a.mp4", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "mp4v"), ("a.ts", "mp4v")], ids=lambda p: p[0])
def video(request, tmp_path) -> Path:
    name, codec = request.param
    path = tmp_path / name
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 25, SIZE)
    assert writer.isOpened()
    for number in range(COUNT):
        writer.write(np.full((SIZE[1], SIZE[0], 3), _colour(number)[::-1], np.uint8))
    writer.release()
    return path


def test_every_frame_or_every_nth(video):
    frames = list(readable(open_source(video)))
    assert [frame.sample_id for frame in frames] == [f"{video.name}#{number:08d}" for number in range(COUNT)]
    assert all(abs(_number(frame) - number) <= 1 for number, frame in enumerate(frames))
    strided = list(readable(open_source(video, stride=7)))
    assert [frame.sample_id for frame in strided] == [frame.sample_id for frame in frames[::7]]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(strided, frames[::7], strict=True))


def test_frames_are_decoded_and_become_jpeg_only_to_be_sent(video):
    frame = next(iter(readable(open_source(video))))
    assert isinstance(frame.content, Image.Image) and frame.image is frame.content and frame.image.size == SIZE
    assert "encoded" not in vars(frame) and Frame("sent", frame.encoded).image.size == SIZE


def test_a_truncated_video_gives_what_came_before(video):
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    if video.suffix == ".mp4":  # its table of frames stood at the end
        with pytest.raises(InputError, match=r"a\.mp4 is not a video that can be decoded"):
            open_source(video)
        return
    items = list(open_source(video))
    frames = [item for item in items if isinstance(item, Frame)]
    assert 15 < len(frames) < 45 and all(abs(_number(frame) - n) <= 1 for n, frame in enumerate(frames))
    if video.suffix == ".ts":  # nothing says how many there were
        assert len(items) == len(frames)
    else:
        (rest,) = items[len(frames) :]
        assert isinstance(rest, Unreadable) and rest.reason == "truncated"
        assert rest.detail == f"{video} ends after {len(frames)} of the {COUNT} frames its header promises"


def test_what_is_no_video(tmp_path):
    for name, data in (("a.mp4", b"no video" * 1000), ("b.avi", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name} is not a video that can be decoded"):
            open_source(tmp_path / name)


@pytest.mark.parametrize("arguments", [{"prefix": "train/"}, {"shuffle_seed": 0}, {"stride": 0}])
def test_arguments_that_a_video_has_no_use_for(tmp_path, arguments):
    (tmp_path / "a.mp4").write_bytes(b"never opened")
    with pytest.raises(ConfigError, match=r"a\.mp4"):
        open_source(tmp_path / "a.mp4", **arguments)


def test_opencv_is_not_loaded_before_a_video_is_opened_and_missed_politely(tmp_path):
    """In a process of its own, where the import of OpenCV fails as it does without the extra."""
    script = f"""
import sys
from edgefm.edge.sources import open_source
from edgefm.models.errors import MissingExtraError
assert "cv2" not in sys.modules
sys.modules["cv2"] = None
for source in ({str(tmp_path / "a.mp4")!r}, "camera:0", "rtsp://me:secret@127.0.0.1:1/a"):
    try:
        open_source(source)
    except MissingExtraError as error:
        assert "pip install 'edgefm[video]'" in str(error) and "secret" not in str(error), error
    else:
        raise AssertionError(source)
"""
    (tmp_path / "a.mp4").write_bytes(b"")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- live


class Camera:
    """A network camera: frames 0, 1, 2, ... to each who connects, every `period_s`; `unplug` and `plug` as often as
    wanted."""

    def __init__(self, period_s: float = 0.01) -> None:
        camera = self
        self.sent = 0
        self._plugged = threading.Event()
        self._plugged.set()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not camera._plugged.is_set():
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                number = 0
                try:
                    while camera._plugged.is_set():
                        picture = np.full((SIZE[1], SIZE[0], 3), _colour(number)[::-1], np.uint8)
                        data = cv2.imencode(".jpg", picture)[1].tobytes()
                        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                        self.wfile.write(head.encode() + data + b"\r\n")
                        number += 1
                        camera.sent += 1
                        time.sleep(period_s)
                except OSError:
                    pass  # the viewer went away

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://me:secret@127.0.0.1:{self._server.server_port}/live?token=secret"

    def unplug(self) -> None:
        self._plugged.clear()

    def plug(self) -> None:
        self._plugged.set()

    def close(self) -> None:
        self.unplug()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def camera() -> Iterator[Camera]:
    camera = Camera()
    yield camera
    camera.close()


def test_a_stream_gives_its_latest_frame_and_counts_the_others(camera, until):
    source = open_source(camera.url)
    assert isinstance(source, LiveVideo)
    first = next(source)
    before = source.skipped
    until(lambda: source.skipped > before + 20)  # nobody asks meanwhile
    second, third = next(source), next(source)
    source.close()
    assert isinstance(first, Frame) and isinstance(second, Frame) and isinstance(third, Frame)
    numbers = [int(frame.sample_id.rpartition("#")[2]) for frame in (first, second, third)]
    assert numbers[1] > numbers[0] + 20 and numbers[2] > numbers[1]
    assert "secret" not in first.sample_id and first.sample_id.startswith("http://127.0.0.1:")
    # The picture that came is the one the number says, not an older one out of a queue.
    assert abs(_number(second) - numbers[1] % 64) <= 2
    assert source.counts() == {"frames_skipped": source.skipped, "source_reopened": 0}
    assert list(source) == []  # closed
    assert not any(thread.name == "capture" for thread in threading.enumerate())


def test_a_stream_that_stops_is_opened_again(camera, until):
    source = open_source(camera.url)
    assert isinstance(source, LiveVideo)
    last = next(source)
    camera.unplug()
    until(lambda: "capture" in {thread.name for thread in threading.enumerate()} and source._latest is not None)
    next(source)  # of before
    threading.Timer(0.5, camera.plug).start()
    frame = next(source)  # waits for the camera
    source.close()
    assert source.reopened == 1 and frame.sample_id > last.sample_id


def test_a_stream_that_does_not_come_back_is_an_error(camera, caplog):
    source = LiveVideo(camera.url, patience_s=0.5)
    seen = [next(source)]
    camera.unplug()
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:\d+/live stopped after \d+ frames .* in 0\.5 s"):
        seen += source
    assert len(seen) >= 1 and "event=source_stopped" in caplog.text and "secret" not in caplog.text
    with pytest.raises(InputError, match="stopped"):
        next(source)
    source.close()


def test_patience_counts_from_the_last_frame_and_not_from_the_last_opening(video, until):
    class Silent(LiveVideo):
        """Once it has stopped, it can be opened and gives no frame."""

        def _open(self):
            capture = super()._open()
            while self._number and capture is not None and capture.grab():
                pass
            return capture

    source = Silent(str(video), patience_s=1.0)
    until(lambda: source._error is not None, 20)
    next(source)
    with pytest.raises(InputError, match="did not come back in 1 s"):
        next(source)
    assert source.reopened >= 1
    source.close()


def test_a_fault_of_the_capture_reaches_who_waits_for_a_frame(camera, until):
    class Faulty(LiveVideo):
        def _offer(self, picture: Image.Image) -> None:
            raise MemoryError("no room for a picture")

    source = Faulty(camera.url)
    until(lambda: source._error is not None, 20)
    with pytest.raises(InputError, match=r"failed after 0 frames: MemoryError\('no room"):
        next(source)
    source.close()


@pytest.mark.parametrize("source", ["camera:63", "rtsp://me:secret@127.0.0.1:1/live", "http://127.0.0.1:1/live"])
def test_what_cannot_be_opened_is_an_error_at_once(source):
    with pytest.raises(InputError, match=r"cannot open (camera:63|rtsp://127|http://127)") as refused:
        open_source(source)
    assert "secret" not in str(refused.value)


def test_opencv_and_ffmpeg_write_nothing_to_the_terminal(tmp_path):
    """In a process of its own: FFmpeg's level is set when OpenCV first uses it."""
    (tmp_path / "a.mp4").write_bytes(b"no video" * 1000)
    script = f"""
from edgefm.edge.sources import open_source
from edgefm.models.errors import InputError
for source in ({str(tmp_path / "a.mp4")!r}, "camera:63", "rtsp://127.0.0.1:1/a", "http://127.0.0.1:1/a"):
    try:
        open_source(source)
    except InputError:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("refused\n" * 4, "")


def test_a_stream_has_no_names_to_choose_from(camera):
    for arguments in ({"prefix": "train/"}, {"shuffle_seed": 0}, {"stride": 2}):
        with pytest.raises(ConfigError):
            open_source(camera.url, **arguments)
