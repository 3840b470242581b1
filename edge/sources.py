"""Where frames come from: a folder, a tar archive, a Python iterator."""

from __future__ import annotations

import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ..models.errors import InputError
from ..models.images import decode_image, encode_jpeg

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Frame:
    """One image of a stream.

    Attributes:
        sample_id: the source's name for it; stays on the device.
        content: encoded bytes, or a decoded RGB image (then encoded as JPEG if it has to be sent).
    """

    sample_id: str
    content: bytes | Image.Image

    @cached_property
    def image(self) -> Image.Image:
        """The decoded image; raises `ImageError` when the bytes are damaged."""
        return decode_image(self.content) if isinstance(self.content, bytes) else self.content.convert("RGB")

    @cached_property
    def encoded(self) -> bytes:
        """What a query sends."""
        return self.content if isinstance(self.content, bytes) else encode_jpeg(self.image)


def open_source(path: Path, prefix: str = "", shuffle_seed: int | None = None) -> Iterator[Frame]:
    """The images of a folder or tar archive.

    Args:
        prefix: only names that begin with it, for instance `train/`.
        shuffle_seed: None keeps the order of the names; a number orders by a hash of content and seed, so that names
            (which may tell the label) do not matter to the order.

    Raises:
        InputError: there is no such folder or archive, or no image in it.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        names = [(file.relative_to(path).as_posix(), file) for file in files]
        pairs = ((name, _read(file)) for name, file in names if _wanted(name, prefix))
    elif path.is_file():
        pairs = _read_tar(path, prefix)
    else:
        raise InputError(f"there is no folder or archive {path}")
    if shuffle_seed is not None:
        salt = str(shuffle_seed).encode()
        pairs = iter(sorted(pairs, key=lambda pair: hashlib.sha256(salt + pair[1]).digest()))
    return _frames(pairs, path, prefix)


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


def _wanted(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name.lower().endswith(IMAGE_SUFFIXES)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _read_tar(path: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile() and _wanted(name, prefix) and (file := tar.extractfile(member)):
                    yield name, file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path} is not a readable tar archive: {error}") from error


def _frames(pairs: Iterator[tuple[str, bytes]], path: Path, prefix: str) -> Iterator[Frame]:
    empty = True
    for name, data in pairs:
        empty = False
        yield Frame(name, data)
    if empty:
        where = f" below {prefix}" if prefix else ""
        raise InputError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {path}{where}")
