"""mahimahi's format and its errors."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.traces import mahimahi, read_mahimahi, synthetic_trace, write_mahimahi
from edgefm.deploy.traces.trace import Trace
from edgefm.models.errors import StoreError, TraceError
from hypothesis import given
from hypothesis import strategies as st


def write(folder: Path, content: bytes) -> Path:
    path = folder / "link.down"
    path.write_bytes(content)
    return path


def test_reads_repeated_timestamps_as_packets(tmp_path: Path) -> None:
    trace = read_mahimahi(write(tmp_path, b"0\n0\n3\n3\n3\n10\n"))
    assert trace.name == "link.down"
    assert trace.opportunities_ms.tolist() == [0, 0, 3, 3, 3, 10]
    assert trace.opportunities_ms.dtype == np.int64
    assert trace.period_ms == 10
    assert trace.longest_outage_ms == 7
    assert trace.mean_mbit_per_s == pytest.approx(6 * 1500 * 8 / 0.010 / 1e6)


@pytest.mark.parametrize("content", [b"1\n5", b"1\r\n5\r\n"])
def test_line_ends_may_be_missing_or_windows(tmp_path: Path, content: bytes) -> None:
    assert read_mahimahi(write(tmp_path, content)).opportunities_ms.tolist() == [1, 5]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b"", 1, "empty"),
        (b"\n", 1, "not a number"),
        (b"1\n2\nthree\n4\n", 3, "not a number"),
        (b"1\n2.5\n", 2, "not a number"),
        (b"1\n\n2\n", 2, "not a number"),
        (b"1\n-2\n", 2, "negative"),
        (b"1\n7\n6\n", 3, "6 ms comes after 7 ms"),
        (b"1\n2\n3x", 3, "not a number"),
        (b"1\n\x00\xff\x80\n", 2, "not a number"),
        ("1\n٣\n".encode(), 2, "not a number"),
        (b"1\n" + b"9" * 5000 + b"\n", 2, "too large"),
        (b"0\n0\n", 2, "at least 1 ms"),
    ],
)
def test_malformed_traces_name_file_and_line(tmp_path: Path, content: bytes, line: int, what: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(TraceError) as caught:
        read_mahimahi(path)
    message = str(caught.value)
    assert f"{path}: line {line}:" in message
    assert what in message
    assert len(message) < len(str(path)) + 150


def test_missing_file_and_directory_are_trace_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(TraceError, match="cannot read the trace") as caught:
            read_mahimahi(path)
        assert str(path) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_a_trace_error(tmp_path: Path) -> None:
    path = write(tmp_path, b"1\n")
    path.chmod(0)
    with pytest.raises(TraceError, match="cannot read the trace"):
        read_mahimahi(path)


def test_recorded_traces_read_whole(shared_data: Path) -> None:
    recorded = shared_data / "traces"
    paths = sorted([*recorded.glob("*.up"), *recorded.glob("*.down")])
    assert paths
    for path in paths:
        trace = read_mahimahi(path)
        assert trace.opportunities_ms.tolist() == [int(line) for line in path.read_text().split()]
        assert 0.1 < trace.mean_mbit_per_s < 200
        assert trace.duration_s > 10


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    assert read_mahimahi(write(tmp_path, b"\xef\xbb\xbf1\n5\n")).opportunities_ms.tolist() == [1, 5]


def test_a_last_line_that_may_be_cut_off_is_told(tmp_path: Path) -> None:
    for content, cut in ((b"1000\n1001\n10", True), (b"1000\n1001\n10\n", False)):
        with pytest.raises(TraceError, match="10 ms comes after 1001 ms") as caught:
            read_mahimahi(write(tmp_path, content))
        assert ("was it cut off?" in str(caught.value)) is cut


def test_too_many_opportunities_are_refused_before_they_fill_the_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(mahimahi, "MOST_OPPORTUNITIES", 3)
    assert read_mahimahi(write(tmp_path, b"1\n2\n3\n")).opportunities_ms.size == 3
    with pytest.raises(TraceError, match="line 4: more than 3 opportunities; split the trace"):
        read_mahimahi(write(tmp_path, b"1\n2\n3\n4\n5\n"))


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 2: a line of 65536 bytes or more; this is no trace"):
        read_mahimahi(write(tmp_path, b"1\n" + b"\x00" * 200_000))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50).map(sorted).filter(lambda times: times[-1] > 0))
def test_what_is_written_is_read(tmp_path_factory, times: list[int]) -> None:
    path = tmp_path_factory.mktemp("written") / "link"
    write_mahimahi(Trace("made", np.array(times)), path)
    assert read_mahimahi(path).opportunities_ms.tolist() == times
    assert path.read_text().splitlines() == [str(time) for time in times]


def test_blocks_of_lines_join(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(mahimahi, "_LINES_AT_ONCE", 1000)
    trace = synthetic_trace(3)
    write_mahimahi(trace, tmp_path / "link")
    assert np.array_equal(read_mahimahi(tmp_path / "link").opportunities_ms, trace.opportunities_ms)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        write_mahimahi(synthetic_trace(3), tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
