"""A trace file line by line, the numbers in it, and errors that name the line."""

from __future__ import annotations

import math
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from ...models.errors import TraceError

_LONGEST_LINE = 65_536
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class TraceLines:
    """The lines of a file, in bytes, without their ends and surrounding white space.

    `number` is the line read last, from 1. Iterating raises TraceError for a file that cannot be read and for a line of
    more than 64 KiB: no trace, and no reason to fill the memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self._cut = False

    def __iter__(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                for line in iter(lambda: file.readline(_LONGEST_LINE), b""):
                    self.number += 1
                    self._cut = not line.endswith(b"\n")
                    if len(line) == _LONGEST_LINE:
                        raise self.error(f"a line of {_LONGEST_LINE} bytes or more; this is no trace")
                    yield (line.removeprefix(BOM_UTF8) if self.number == 1 else line).strip()
        except OSError as error:
            raise TraceError(f"{self.path}: cannot read the trace: {error.strerror or error}") from error

    def error(self, message: str, number: int | None = None) -> TraceError:
        """An error in the line read last, or in line `number`; says so where the file ends within the line."""
        number = max(number or self.number, 1)
        cut = "; the file ends within this line: was it cut off?" if self._cut and number == self.number else ""
        return TraceError(f"{self.path}: line {number}: {message}{cut}")

    def finite(self, text: str, what: str) -> float:
        """The decimal number in `text`. Raises TraceError, for instance for nan, infinity, `1_000` and other scripts."""
        if not _NUMBER.fullmatch(text):
            raise self.error(f"{what} {shown(text)} is not a number" if text else f"{what} is missing")
        value = float(text)
        if not math.isfinite(value):
            raise self.error(f"{what} {shown(text)} is too large")
        return value


def is_number(text: str) -> bool:
    """Whether it looks like one, nan and infinity included."""
    return bool(_NUMBER.fullmatch(text)) or text.lower().lstrip("+-") in ("nan", "inf", "infinity")


def shown(text: str) -> str:
    """In quotes, at most 24 characters, and nothing that a terminal would act on."""
    cut = text[:24].encode("ascii", errors="backslashreplace").decode()
    return repr(cut + ("…" if len(text) > 24 else ""))
