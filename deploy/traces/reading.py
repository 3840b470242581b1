"""A trace from whatever names one: a file in any of the formats, or a made link."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

from ...models.errors import ConfigError, TraceError
from .lines import TraceLines, is_number, shown
from .made import LTE_DOWN, LTE_UP, constant_trace, synthetic_trace
from .mahimahi import read_mahimahi
from .pensieve import read_pensieve
from .table import BY_NAME, DELIMITERS, CsvOptions, read_csv
from .trace import Trace

TraceFormat = Literal["mahimahi", "pensieve", "csv"]
FORMATS: tuple[TraceFormat, ...] = get_args(TraceFormat)
_CONSTANT, _SYNTHETIC = "constant:", "synthetic:"
_STATES = {"up": LTE_UP, "down": LTE_DOWN}


def open_trace(spec: str | Path, trace_format: TraceFormat | None = None, csv_options: CsvOptions = BY_NAME) -> Trace:
    """`constant:RATE` (Mbit/s), `synthetic:SEED`, `synthetic:SEED:up`, `synthetic:SEED:down`, or the file of that name.

    A synthetic link without a direction is a downlink. Raises TraceError and ConfigError as `read_trace` does, and for a
    made link that cannot be.
    """
    text = str(spec)
    made = text.startswith((_CONSTANT, _SYNTHETIC))
    if made and (trace_format is not None or csv_options != BY_NAME):
        raise ConfigError(f"{text} is a made link, no file: it has no format and no columns to choose")
    if text.startswith(_CONSTANT):
        rate = text.removeprefix(_CONSTANT)
        if not is_number(rate):
            raise TraceError(f"{text}: {shown(rate)} is not a rate; write for instance constant:5, in Mbit/s")
        return constant_trace(float(rate))
    if text.startswith(_SYNTHETIC):
        found = re.fullmatch(r"(\d{1,18})(?::(up|down))?", text.removeprefix(_SYNTHETIC), re.ASCII)
        if not found:
            raise TraceError(f"{text}: a synthetic link is synthetic:SEED, synthetic:SEED:up or synthetic:SEED:down")
        return synthetic_trace(int(found[1]), states=_STATES[found[2] or "down"])
    return read_trace(text, trace_format, csv_options)


def downlink_beside(uplink: str | Path) -> str | Path:
    """The downlink that belongs to an uplink: FILE.down where it lies beside FILE.up, synthetic:SEED:down beside
    synthetic:SEED:up, otherwise the same trace."""
    text = str(uplink)
    if text.startswith(_SYNTHETIC):
        return re.sub(r":up$", ":down", text)
    sibling = Path(text).with_suffix(".down")
    return sibling if text.endswith(".up") and sibling.exists() else uplink


def read_trace(path: str | Path, trace_format: TraceFormat | None = None, csv_options: CsvOptions = BY_NAME) -> Trace:
    """Reads a file; by default its first line tells the format: one number (mahimahi), two (Pensieve), or names (CSV).

    Raises:
        TraceError: naming the file and, for what is wrong inside, the line; see the readers of the formats.
        ConfigError: options for CSV, and the file is none.
    """
    trace_format = trace_format or _format_of(Path(path))
    if trace_format == "csv":
        return read_csv(path, csv_options)
    if csv_options != BY_NAME:
        raise ConfigError(f"{path} is read as {trace_format}, which has no columns to choose; name the format csv?")
    return read_mahimahi(path) if trace_format == "mahimahi" else read_pensieve(path)


def _format_of(path: Path) -> TraceFormat:
    lines = TraceLines(path)
    for line in lines:
        if b"\0" in line:
            raise lines.error("binary data; a trace is a text file")
        text = line.decode(errors="backslashreplace")
        if not text:
            continue
        words = text.split()
        if all(map(is_number, words)) and len(words) <= 2:
            return "mahimahi" if len(words) == 1 else "pensieve"
        fields = re.split(f"[{DELIMITERS}]", text)
        if len(fields) > 1 and not any(is_number(field.strip()) for field in fields):
            return "csv"
        if len(fields) > 1:
            raise lines.error(f"{shown(text)}: of CSV, the first line must name the columns")
        raise lines.error(
            f"{shown(text)} begins no trace: expected a number (mahimahi), two (Pensieve) or names of columns (CSV)"
        )
    raise lines.error("the trace is empty")
