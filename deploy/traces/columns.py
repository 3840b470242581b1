"""Which column of a CSV file is the time, which the rate, and their units, from names that people chose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

from .lines import TraceLines, shown
from .rates import RATE_UNITS

TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_TIME_WORDS = {"time", "timestamp", "datetime", "elapsed", "epoch", "t"}
_RATE_WORDS = ("bitrate", "throughput", "bandwidth", "goodput", "datarate", "capacity")
_G_NETTRACK = {"dl_bitrate": "kbit/s", "ul_bitrate": "kbit/s"}
"""Columns of the logging application that the 4G and 5G campaigns of University College Cork ran; its unit is kbit/s."""
_TIME_UNIT_NAMES = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("ms", "msec", "millis", "millisecond", "milliseconds"), "ms"),
    **dict.fromkeys(("us", "usec", "micros", "microsecond", "microseconds"), "us"),
    **dict.fromkeys(("ns", "nsec", "nanos", "nanosecond", "nanoseconds"), "ns"),
}
_RATE_UNIT = re.compile(
    r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?P<prefix>[kKmMgG]?)(?P<thing>[bB](?:its?|ytes?)?|BITS?|BYTES?)"
    r"(?:ps|PS|/s(?:ec)?|_?per_?s(?:ec(?:ond)?)?|_s)[)\]]?\s*$"
)
_DATE = re.compile(
    r"(\d{4})[-./](\d\d)[-./](\d\d)[T _](\d\d)[:.](\d\d)[:.](\d\d)(?:[.,](\d{1,9}))?\s*(Z|[+-]\d\d:?\d\d)?", re.ASCII
)


def named_time_unit(name: str) -> str | None:
    """The unit that a name ends with: `time_ms`, `Timestamp (s)`, `ms`."""
    words = _words(name)
    return _TIME_UNIT_NAMES.get(words[-1]) if words else None


def named_rate_unit(name: str) -> str | None:
    """The unit that a name ends with: `throughput_mbps`, `DL [kbit/s]`, `rate_MB_per_s`; a small b is a bit, a capital B
    before a small letter a byte."""
    found = _RATE_UNIT.search(name)
    if not found:
        return _G_NETTRACK.get(name.strip().lower())
    thing = found["thing"]
    byte = thing.lower().startswith("byte") or (thing == "B" and "PS" not in found[0])
    prefix = {"": "", "k": "k", "m": "M", "g": "G"}[found["prefix"].lower()]
    return f"{prefix}{'B' if byte else 'bit'}/s"


def unit_by_size(number: float) -> str:
    """Unix times since 1973 in ms, us and ns are larger than any number of seconds that a trace may have."""
    return next((unit for unit, least in (("ns", 1e17), ("us", 1e14), ("ms", 1e11)) if number >= least), "s")


def find_time_column(lines: TraceLines, header: Sequence[str], wanted: str | None) -> int:
    """Its place. Raises TraceError, which lists the columns, where none fits or several do."""
    if wanted is not None:
        return _place(lines, header, wanted)
    fit = [place for place, name in enumerate(header) if _TIME_WORDS.intersection(_words(name))]
    return _only(lines, header, fit, "time", "--time-column")


def find_rate_column(
    lines: TraceLines, header: Sequence[str], time_at: int, wanted: str | None, wanted_unit: str | None
) -> tuple[int, str]:
    """Its place and unit. Raises TraceError, which lists the columns, where none fits or several do."""
    if wanted is not None:
        place = _place(lines, header, wanted)
    else:
        fit = [place for place, name in enumerate(header) if place != time_at and _may_be_rate(name)]
        place = _only(lines, header, fit, "rate", "--rate-column")
    unit = named_rate_unit(wanted_unit or header[place])
    if unit is None:
        raise lines.error(
            f"the name {shown(header[place])} does not tell the unit; give --rate-unit ({', '.join(RATE_UNITS)})"
        )
    return place, unit


def seconds_of_date(lines: TraceLines, text: str, what: str) -> float:
    """Seconds since 1970 of a date with a time of day; without a zone it is taken as UTC."""
    found = _DATE.fullmatch(text)
    if not found:
        forms = "a number, 2018-02-12T16:14:01.5Z or 2018.02.12_16.14.01"
        raise lines.error(f"{what} {shown(text)} is not a time; expected {forms}" if text else f"{what} is missing")
    *parts, fraction, zone = found.groups()
    try:
        date = datetime(*map(int, parts), tzinfo=timezone.utc)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise lines.error(f"{what} {shown(text)} is not a time: {error}") from None
    offset = timedelta()
    if zone and zone != "Z":
        offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:])) * (-1 if zone[0] == "-" else 1)
    try:
        return (date - offset).timestamp() + float(f"0.{fraction or 0}")
    except OverflowError:
        raise lines.error(f"{what} {shown(text)} is not a time within the calendar") from None


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def _may_be_rate(name: str) -> bool:
    return named_rate_unit(name) is not None or any(word in name.lower() for word in _RATE_WORDS)


def _place(lines: TraceLines, header: Sequence[str], wanted: str) -> int:
    if header.count(wanted) != 1:
        many = "several columns" if wanted in header else "no column"
        raise lines.error(f"{many} {shown(wanted)}; there are {_listed(header)}")
    return header.index(wanted)


def _only(lines: TraceLines, header: Sequence[str], fit: Sequence[int], what: str, option: str) -> int:
    if len(fit) == 1:
        return fit[0]
    listed = _listed([header[place] for place in fit] or header)
    problem = f"several columns may be the {what}" if fit else f"no column is called like a {what}"
    raise lines.error(f"{problem}; choose with {option} among {listed}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in names)
