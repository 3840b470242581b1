"""Pensieve's format: two columns, seconds and Mbit/s, with white space between them.

A row's rate holds over the interval that *ends* at its time, as in Pensieve's own simulator (`sim/fixed_env.py`, Mao et
al., "Neural Adaptive Video Streaming with Pensieve", SIGCOMM 2017), which also starts again after the last row. So the
first row gives only the start, the last one both the last rate and the end; of rows with one time the first counts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...models.cache import write_atomic
from .lines import TraceLines
from .rates import RateRows, rates_of_trace, trace_of_rates
from .trace import Trace

WINDOW_MS = 500
"""Between the rows that are written."""


def read_pensieve(path: str | Path) -> Trace:
    """Reads a Pensieve trace; empty lines do not count.

    Raises TraceError, naming the file and the line (from 1), for a file that is missing, unreadable, empty or too long
    for `MOST_OPPORTUNITIES`, and for a line that is not two numbers, goes back in time or has a negative rate.
    """
    lines = TraceLines(Path(path))
    rows = RateRows(lines)
    for line in lines:
        columns = line.decode(errors="backslashreplace").split()
        if not columns:
            continue
        if len(columns) != 2:
            raise lines.error(f"{len(columns)} column{'s' * (len(columns) > 1)}; expected two: seconds and Mbit/s")
        rows.add(lines.finite(columns[0], "the time"), lines.finite(columns[1], "the rate"))
    rows.require_duration()
    return trace_of_rates(
        lines, np.array(rows.times_s), np.array(rows.mbit_per_s[1:]), np.array(rows.numbers[1:], dtype=np.int64)
    )


def write_pensieve(trace: Trace, path: Path, window_ms: int = WINDOW_MS) -> None:
    """Writes the mean rate of every window, the file whole or not at all.

    Raises:
        ConfigError: impossible windows. StoreError: the disk refuses.
    """
    edges_ms, mbit_per_s = rates_of_trace(trace, window_ms)
    rates = mbit_per_s.tolist()
    rows = zip((edges_ms / 1000).tolist(), [rates[0], *rates], strict=True)
    write_atomic(path, "".join(f"{time_s!r}\t{rate!r}\n" for time_s, rate in rows).encode())
