"""Where frames come from: a folder, a tar archive, a list of paths, a video, a camera, a Python iterator."""

from __future__ import annotations

import hashlib
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from tarfile import (
    EOFHeaderError,  # pyright: ignore[reportAttributeAccessIssue]
    HeaderError,
    ReadError,
    TarError,
    TarFile,
    TarInfo,
)

import numpy as np
from PIL import Image

from ..models.errors import ConfigError, InputError
from .frames import Frame, Source, Unreadable, sample_id_of
from .video import LiveVideo, is_live, read_video

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LIST_SUFFIX = ".txt"
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")

_DAMAGED = (TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


def open_source(
    source: str | Path, prefix: str = "", shuffle_seed: int | None = None, stride: int | None = None
) -> Source:
    """The frames of a folder, tar archive, list (`.txt`), video file, `camera:NUMBER` or stream (`rtsp://...`).

    What cannot be read in a source of many is yielded as `Unreadable`, and the source goes on, or ends where no more
    can be read. Videos and cameras need the extra `video`.

    Args:
        prefix: only names that begin with it, for instance `train/`.
        shuffle_seed: None keeps the order of the names; a number orders by a hash of content and seed, so that names
            (which may tell the label) do not matter to the order.
        stride: of a video file: every so many frames; None takes all.

    Raises:
        InputError: at once: there is no such source, or nothing in it.
        ConfigError: an argument that does not apply to such a source.
        MissingExtraError: OpenCV is not installed.
    """
    path = Path(source)
    live, video = is_live(str(source)), path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()
    if (live or video) and (prefix or shuffle_seed is not None):
        raise ConfigError(f"{source} has no names and no order of its own: leave out prefix and shuffle_seed")
    if stride is not None and (not video or stride < 1):
        raise ConfigError(f"stride counts the frames of a video file from 1 on, got {stride} for {source}")
    if live:
        return LiveVideo(str(source))
    if path.is_dir():
        items = _read_folder(path, prefix)
    elif not path.exists():
        raise InputError(
            f"there is no folder or archive {path}; a source is a folder, a tar archive, a list of paths ({LIST_SUFFIX}), "
            f"a video ({' '.join(VIDEO_SUFFIXES)}), camera:NUMBER or rtsp://..."
        )
    elif video:
        items = read_video(path, stride or 1)
    elif path.suffix.lower() == LIST_SUFFIX:
        items = _read_list(path, prefix)
    else:
        items = _read_tar(path, prefix)
    if shuffle_seed is not None:
        items = _shuffled(items, shuffle_seed)
    first = next(items, None)
    if first is None:
        where = f" below {prefix}" if prefix else ""
        raise InputError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {path}{where}")
    return _from_first(first, items)


def frames_of(images: Iterable[Image.Image | np.ndarray | bytes]) -> Iterator[Frame]:
    """Frames from a Python iterator: PIL images, (H, W, 3) uint8 RGB arrays, or encoded bytes.

    Raises:
        InputError: at an element that is none of these, with its position.
    """
    for number, item in enumerate(images):
        if isinstance(item, np.ndarray):
            if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or item.size == 0:
                raise InputError(f"frame {number}: expected (H, W, 3) uint8 RGB, got {item.shape} {item.dtype}")
            item = Image.fromarray(item)
        if not isinstance(item, (bytes, Image.Image)):
            raise InputError(f"frame {number}: expected a PIL image, an array or bytes, got {type(item).__name__}")
        yield Frame(f"{number:08d}", item)


def _from_first(first: Frame | Unreadable, rest: Iterator[Frame | Unreadable]) -> Source:
    def items():
        yield first
        yield from rest

    return items()


def _shuffled(items: Iterator[Frame | Unreadable], seed: int) -> Iterator[Frame | Unreadable]:
    salt = str(seed).encode()

    def order(item: Frame | Unreadable) -> tuple[bool, bytes]:
        if isinstance(item, Frame) and isinstance(item.content, bytes):
            return False, hashlib.sha256(salt + item.content).digest()
        return True, b""

    return iter(sorted(items, key=order))


def _wanted(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name.lower().endswith(IMAGE_SUFFIXES)


def _read(name: str, path: Path) -> Frame | Unreadable:
    sample_id = sample_id_of(name)
    try:
        if path.exists() and not path.is_file():
            return Unreadable(sample_id, "cannot-read", f"{path} is not a file")
        return Frame(sample_id, path.read_bytes())
    except OSError as error:
        return Unreadable(sample_id, "cannot-read", f"cannot read {path}: {error.strerror}")


def _read_folder(root: Path, prefix: str) -> Iterator[Frame | Unreadable]:
    closed: list[OSError] = []
    found: dict[str, Path] = {}
    for folder, _, files in os.walk(root, onerror=closed.append):
        for file in files:  # a dangling link is among them
            path = Path(folder, file)
            found[path.relative_to(root).as_posix()] = path
    for name, path in sorted(found.items()):
        if _wanted(name, prefix):
            yield _read(name, path)
    for error in closed:
        name = sample_id_of(f"{os.path.relpath(error.filename, root)}/")
        yield Unreadable(name, "cannot-read", f"cannot open the folder {error.filename}: {error.strerror}")


def _read_list(path: Path, prefix: str) -> Iterator[Frame | Unreadable]:
    """One path a line, relative to the list; empty lines and lines that begin with # do not count."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the list {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a list of paths in UTF-8: {error}") from error
    for line in lines:
        name = line.strip()
        if name and not name.startswith("#") and name.startswith(prefix):
            yield _read(name, path.parent / name)


class _CheckedMember(TarInfo):
    """tarfile takes a damaged or missing header in mid-archive for the end; only a block of zeros is one."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> TarInfo:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(f"{error} at byte {tarfile.offset}") from error


def _read_tar(path: Path, prefix: str) -> Iterator[Frame | Unreadable]:
    try:
        tar = TarFile.open(path, tarinfo=_CheckedMember)
    except _DAMAGED as error:
        raise InputError(f"{path} is not a readable tar archive: {error}") from error
    with tar:
        images = 0
        try:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile() and _wanted(name, prefix) and (file := tar.extractfile(member)):
                    data = file.read()
                    images += 1
                    yield Frame(sample_id_of(name), data)
        except _DAMAGED as error:
            ended = isinstance(error, EOFError) or str(error).startswith(("unexpected end", "empty", "truncated"))
            detail = f"{path} cannot be read past its image {images}: {error}; what came after is lost"
            yield Unreadable(sample_id_of(path.name), "truncated" if ended else "damaged", detail)
