"""mahimahi's format: a line is one millisecond timestamp, one opportunity to deliver 1500 bytes."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from ...models.cache import write_atomic
from .lines import TraceLines, shown
from .trace import LARGEST_MS, MOST_OPPORTUNITIES, Trace

_DIGITS = len(str(LARGEST_MS)) - 1
_LINES_AT_ONCE = 1_000_000


def read_mahimahi(path: str | Path) -> Trace:
    """Reads a mahimahi trace: one decimal number of milliseconds a line, sorted; the trace takes the file's name.

    Raises TraceError, naming the file and the line (from 1), for a file that is missing, unreadable, empty, not text or
    of more than `MOST_OPPORTUNITIES` lines, and for a line that is not a number, is negative, is too large or goes back
    in time.
    """
    lines = TraceLines(Path(path))
    times_ms = array("q")
    previous = 0
    for line in lines:
        if not line.isdigit():  # bytes: the ten ASCII digits only
            text = line.decode(errors="backslashreplace")
            kind = "negative" if line[:1] == b"-" and line[1:].isdigit() else "not a number"
            raise lines.error(f"{shown(text)} is {kind}; expected a timestamp in ms")
        if len(line) > _DIGITS:
            raise lines.error(f"{shown(line.decode())} is too large; the limit is {LARGEST_MS} ms")
        time_ms = int(line)
        if time_ms < previous:
            raise lines.error(f"{time_ms} ms comes after {previous} ms; sort the trace")
        if len(times_ms) == MOST_OPPORTUNITIES:
            raise lines.error(f"more than {MOST_OPPORTUNITIES:,} opportunities; split the trace")
        times_ms.append(time_ms)
        previous = time_ms
    if not times_ms:
        raise lines.error("the trace is empty; it needs one timestamp in ms a line")
    if previous == 0:
        raise lines.error("the last timestamp is 0 ms; a trace must last at least 1 ms")
    return Trace(lines.path.name, np.array(times_ms, dtype=np.int64))


def write_mahimahi(trace: Trace, path: Path) -> None:
    """Writes the file whole or not at all. Raises StoreError when the disk refuses."""
    times_ms = trace.opportunities_ms
    starts = range(0, times_ms.size, _LINES_AT_ONCE)
    parts = ("\n".join(map(str, times_ms[start : start + _LINES_AT_ONCE].tolist())) for start in starts)
    write_atomic(path, b"".join(f"{part}\n".encode() for part in parts))
