"""What a source yields: frames, and samples it could not read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from PIL import Image

from ..models.errors import InputError, UnreadableReason
from ..models.images import decode_image, encode_jpeg


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
        if isinstance(self.content, bytes):
            return decode_image(self.content)
        return self.content if self.content.mode == "RGB" else self.content.convert("RGB")

    @cached_property
    def encoded(self) -> bytes:
        """What a query sends."""
        return self.content if isinstance(self.content, bytes) else encode_jpeg(self.image)


@dataclass(frozen=True)
class Unreadable:
    """A sample, or the rest of an archive or video, that its source could not read: counted, never answered.

    Attributes:
        sample_id: the source's name for it.
        reason: for the count.
        detail: one sentence for the log.
    """

    sample_id: str
    reason: UnreadableReason
    detail: str


class Source(Protocol):
    """An iterator of frames that can be let go of; a generator is one.

    Raises (from `__next__`):
        InputError: the source as a whole has failed.
    """

    def __iter__(self) -> Iterator[Frame | Unreadable]: ...
    def __next__(self) -> Frame | Unreadable: ...
    def close(self) -> None: ...


def sample_id_of(name: str) -> str:
    """A file's name as text that can be written as UTF-8: bytes that are none of it become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def readable(source: Iterable[Frame | Unreadable]) -> Iterator[Frame]:
    """For data that must be whole, such as a measurement's: raises `InputError` at what cannot be read."""
    for item in source:
        if isinstance(item, Unreadable):
            raise InputError(f"{item.sample_id} is unreadable ({item.reason}): {item.detail}")
        yield item
