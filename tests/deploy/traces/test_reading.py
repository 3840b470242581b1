"""Which format a file has, and what else names a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.traces import (
    LTE_UP,
    CsvOptions,
    Trace,
    constant_trace,
    downlink_beside,
    open_trace,
    read_trace,
    synthetic_trace,
)
from edgefm.models.errors import ConfigError, TraceError


def same(one: Trace, other: Trace) -> bool:
    return one.name == other.name and np.array_equal(one.opportunities_ms, other.opportunities_ms)


@pytest.mark.parametrize(
    ("content", "times_ms"),
    [
        ("2\n4\n", [2, 4]),
        ("0 6\n0.004 6\n", [2, 4]),
        ("\n0.0\t6\n0.004\t6\n", [2, 4]),
        ("time_ms,mbps\n0,6\n2,6\n", [2, 4]),
        ("\ntime_ms;mbps\n0;6\n2;6\n", [2, 4]),
        ("\ufefftime_ms\tmbps\n0\t6\n2\t6\n", [2, 4]),
    ],
)
def test_the_first_line_tells_the_format(tmp_path: Path, content: str, times_ms: list[int]) -> None:
    path = tmp_path / "link"
    path.write_text(content, encoding="utf-8")
    assert read_trace(path).opportunities_ms.tolist() == times_ms
    assert open_trace(str(path)).opportunities_ms.tolist() == times_ms


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b"", 1, "the trace is empty"),
        (b"\n\n", 2, "the trace is empty"),
        (b"-5\n3\n", 1, "'-5' is negative; expected a timestamp in ms"),
        (b"0.5\n3\n", 1, "'0.5' is not a number; expected a timestamp in ms"),
        (b"nan 5\n1 5\n", 1, "the time 'nan' is not a number"),
        (b"hello\n", 1, "'hello' begins no trace: expected a number (mahimahi), two (Pensieve) or names of columns (CSV)"),
        (b"1 2 3\n", 1, "begins no trace"),
        (b"0,5\n1,5\n", 1, "'0,5': of CSV, the first line must name the columns"),
        (b"PK\x03\x04\x00\x00\n", 1, "binary data; a trace is a text file"),
        ("time,mbps\n".encode("utf-16"), 1, "binary data"),
        (b"time,mbps\n", 1, "the trace has no row"),
    ],
)  # fmt: skip
def test_what_begins_no_trace_is_refused(tmp_path: Path, content: bytes, line: int, what: str) -> None:
    path = tmp_path / "link"
    path.write_bytes(content)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}: line {line}: ") and what in str(caught.value)


def test_missing_files_and_folders_are_trace_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(TraceError, match="cannot read the trace"):
            open_trace(path)


def test_the_format_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.write_text("0 6\n0.004 6\n")
    with pytest.raises(TraceError, match="line 1: '0 6' is not a number"):
        read_trace(path, "mahimahi")
    with pytest.raises(TraceError, match="line 1: no column is called like a time"):
        read_trace(path, "csv")


def test_options_for_csv_are_for_csv(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.write_text("0 6\n0.004 6\n")
    with pytest.raises(ConfigError, match="read as pensieve, which has no columns"):
        read_trace(path, csv_options=CsvOptions(rate_unit="kbps"))
    for options in ((None, CsvOptions(rate_unit="kbps")), ("csv", CsvOptions())):
        with pytest.raises(ConfigError, match="constant:5 is a made link"):
            open_trace("constant:5", *options)


def test_made_links_have_names() -> None:
    assert same(open_trace("constant:5"), constant_trace(5))
    assert same(open_trace(Path("constant:2.5")), constant_trace(2.5))
    assert same(open_trace("synthetic:7"), synthetic_trace(7))
    assert same(open_trace("synthetic:7:down"), synthetic_trace(7))
    assert same(open_trace("synthetic:7:up"), synthetic_trace(7, states=LTE_UP))


@pytest.mark.parametrize(
    "spec",
    [
        *("constant:", "constant:fast", "constant:nan", "constant:-1", "constant:1e9"),
        *(
            "synthetic:",
            "synthetic:x",
            "synthetic:-1",
            "synthetic:7:left",
            "synthetic:7:up:9",
            "synthetic:" + "9" * 5000,
        ),
    ],
)
def test_impossible_links_are_refused(spec: str) -> None:
    with pytest.raises(TraceError):
        open_trace(spec)


def test_the_downlink_lies_beside_the_uplink(tmp_path: Path) -> None:
    up, down = tmp_path / "link.up", tmp_path / "link.down"
    assert downlink_beside(up) == up
    down.write_text("1\n")
    assert downlink_beside(up) == downlink_beside(str(up)) == down
    assert downlink_beside(down) == down
    assert downlink_beside("synthetic:7:up") == "synthetic:7:down"
    assert downlink_beside("synthetic:7") == "synthetic:7"
    assert downlink_beside("constant:5") == "constant:5"
