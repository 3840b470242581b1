"""CSV with named columns, as measurement campaigns publish them: a time, a rate, and much else.

A row's rate holds from its time to the next row's; the last row's holds as long as the one before. Rows with one time
(campaigns often write whole seconds) count as one with the mean of their rates.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...models.errors import ConfigError
from .columns import (
    TIME_UNITS,
    find_rate_column,
    find_time_column,
    named_rate_unit,
    named_time_unit,
    seconds_of_date,
    unit_by_size,
)
from .lines import TraceLines, is_number, shown
from .rates import RATE_UNITS, RateRows, trace_of_rates
from .trace import Trace

DELIMITERS = ",;\t"
_MUCH_LONGER = 10
"""Than the median time between rows: a gap, in which nobody measured."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CsvOptions:
    """What the names of the columns do not tell; None leaves it to them.

    Attributes:
        time_column, rate_column: names of columns.
        time_unit: s, ms, us or ns; of numbers, not of dates.
        rate_unit: bit/s, kbit/s, Mbit/s, Gbit/s, B/s, kB/s, MB/s or GB/s, also written kbps, Mbps, ...
        longest_hold_s: a rate holds at most so long, and until the next row nothing gets through. None: it holds until the
            next row, and a gap is logged.
    """

    time_column: str | None = None
    rate_column: str | None = None
    time_unit: str | None = None
    rate_unit: str | None = None
    longest_hold_s: float | None = None

    def __post_init__(self) -> None:
        if self.time_unit is not None and named_time_unit(self.time_unit) is None:
            raise ConfigError(f"a unit of time is one of {', '.join(TIME_UNITS)}; got {self.time_unit!r}")
        if self.rate_unit is not None and named_rate_unit(self.rate_unit) is None:
            raise ConfigError(f"a unit of rates is one of {', '.join(RATE_UNITS)}; got {self.rate_unit!r}")
        if self.longest_hold_s is not None and not self.longest_hold_s > 0:
            raise ConfigError(f"a rate must hold longer than 0 s; got {self.longest_hold_s}")


BY_NAME = CsvOptions()


def read_csv(path: str | Path, options: CsvOptions = BY_NAME) -> Trace:
    """Reads the time and the rate from a CSV file whose first line names its columns; empty lines do not count.

    The delimiter is the one of comma, semicolon and tab that the first line has most of. Times are numbers or dates
    (`2018-02-12T16:14:01.5Z`, `2018.02.12_16.14.01`; without a zone all in the same one). Numbers without a unit in
    the column's name are seconds, or by their size Unix times in s, ms, us or ns.

    Raises TraceError, naming the file and the line (from 1), for a file that is missing, unreadable, empty or too long
    for `MOST_OPPORTUNITIES`, for columns that cannot be told, and for a line that has fewer columns than the first,
    something else than a number or date, a negative rate or a time that goes back.
    """
    lines = TraceLines(Path(path))
    texts = (text for line in lines if (text := line.decode(errors="backslashreplace")))
    first = next(texts, None)
    if first is None:
        raise lines.error("the trace is empty; its first line must name the columns")
    delimiter = max(DELIMITERS, key=first.count)
    header = _fields(lines, first, delimiter)
    time_at = find_time_column(lines, header, options.time_column)
    rate_at, unit = find_rate_column(lines, header, time_at, options.rate_column, options.rate_unit)
    rows = RateRows(lines)
    seconds: Callable[[str], float] | None = None
    for text in texts:
        fields = _fields(lines, text, delimiter)
        if len(fields) < len(header) or any(fields[len(header) :]):
            raise lines.error(f"{len(fields)} columns where the first line names {len(header)}")
        if seconds is None:
            seconds = _clock(lines, header[time_at], fields[time_at], options.time_unit)
        rows.add(seconds(fields[time_at]), lines.finite(fields[rate_at], f"the rate {shown(header[rate_at])}"), unit)
    rows.require_duration()
    times_s, mbit_per_s, numbers = _merged(rows)
    edges_s = np.append(times_s, 2 * times_s[-1] - times_s[-2])
    if options.longest_hold_s is None:
        _log_gap(lines.path, edges_s, numbers)
    else:
        edges_s, mbit_per_s, numbers = _held(edges_s, mbit_per_s, numbers, options.longest_hold_s)
    return trace_of_rates(lines, edges_s, mbit_per_s, numbers)


def _fields(lines: TraceLines, text: str, delimiter: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([text], delimiter=delimiter, strict=True))]
    except csv.Error as error:
        raise lines.error(f"not CSV: {error}") from error


def _clock(lines: TraceLines, name: str, first: str, unit: str | None) -> Callable[[str], float]:
    """From a field of the time column to seconds."""
    what = f"the time {shown(name)}"
    given = named_time_unit(unit) if unit else None
    if given is None and not is_number(first):
        return lambda text: seconds_of_date(lines, text, what)
    factor = TIME_UNITS[given or named_time_unit(name) or unit_by_size(lines.finite(first, what))]
    return lambda text: lines.finite(text, what) * factor


def _merged(rows: RateRows) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Times, rates and line numbers, all (N,), with one row for each time."""
    times_s, first, counts = np.unique(np.array(rows.times_s), return_index=True, return_counts=True)
    rates = np.add.reduceat(np.array(rows.mbit_per_s), first) / counts
    return times_s, rates, np.array(rows.numbers, dtype=np.int64)[first]


def _held(
    edges_s: NDArray[np.float64], mbit_per_s: NDArray[np.float64], numbers: NDArray[np.int64], longest_s: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """The same, with a rate of 0 from `longest_s` after a row on: (N+1,), (N,), (N,) with larger N."""
    long = np.flatnonzero(np.diff(edges_s) > longest_s)
    return (
        np.insert(edges_s, long + 1, edges_s[long] + longest_s),
        np.insert(mbit_per_s, long + 1, 0.0),
        np.insert(numbers, long + 1, numbers[long]),
    )


def _log_gap(path: Path, edges_s: NDArray[np.float64], numbers: NDArray[np.int64]) -> None:
    steps_s = np.diff(edges_s)
    longest = int(np.argmax(steps_s))
    if steps_s[longest] > _MUCH_LONGER * np.median(steps_s):
        message = "event=trace_gap file=%s line=%d gap_s=%.3f gaps=%d remedy=longest_hold_s"
        gaps = int((steps_s > _MUCH_LONGER * np.median(steps_s)).sum())
        log.warning(message, path, numbers[longest], steps_s[longest], gaps)
