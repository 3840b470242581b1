"""Traces: mahimahi's format and its errors, the wrap, and the made links' statistics."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.traces import (
    LTE_DOWN,
    LTE_UP,
    PACKET_BYTES,
    Trace,
    constant_trace,
    read_mahimahi,
    synthetic_trace,
    with_outage,
)
from edgefm.models.errors import TraceError

SHARED = Path(os.environ.get("EDGEFM_SHARED") or Path(__file__).resolve().parents[3] / "shared")
RECORDED = SHARED / "data" / "traces"


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


@pytest.mark.parametrize("times", [[], [-1, 4], [4, 3], [0, 0], [[1, 2]]])
def test_a_trace_checks_itself(times: list[int]) -> None:
    with pytest.raises(TraceError):
        Trace("made", np.array(times, dtype=np.int64))


def test_integral_and_times_agree_across_the_wrap() -> None:
    trace = Trace("made", np.array([0, 2, 2, 5], dtype=np.int64))
    assert [trace.time_of(index) for index in range(9)] == [0, 2, 2, 5, 5, 7, 7, 10, 10]
    for elapsed_ms in (-1, 0, 1.9, 2, 4.99, 5, 6, 7, 9.5, 10, 5000):
        count = trace.opportunities_by(elapsed_ms)
        assert trace.time_of(count) > elapsed_ms
        assert count == 0 or trace.time_of(count - 1) <= elapsed_ms


def test_a_trace_cannot_be_changed() -> None:
    times = np.array([1, 2], dtype=np.int64)
    trace = Trace("made", times)
    times[0] = 2
    assert trace.opportunities_ms.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        trace.opportunities_ms[0] = 2


@pytest.mark.parametrize("rate", [0.1, 1.0, 7.3, 20.0, 100.0])
def test_constant_trace_holds_its_rate_and_never_exceeds_it(rate: float) -> None:
    trace = constant_trace(rate)
    assert trace.mean_mbit_per_s == pytest.approx(rate, abs=0.002)
    for elapsed_ms in (1, 10, 123, 999, 6000, 6001, 20000):
        allowed_bits = trace.mean_mbit_per_s * 1e3 * elapsed_ms
        bits = trace.opportunities_by(elapsed_ms) * PACKET_BYTES * 8
        assert allowed_bits * (1 + 1e-9) >= bits > allowed_bits - (rate * 1e3 + 12000)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_constant_trace_refuses_impossible_rates(rate: float) -> None:
    with pytest.raises(TraceError):
        constant_trace(rate)


def outages(trace: Trace) -> int:
    return int((np.diff(trace.opportunities_ms, prepend=0) >= 50).sum())


def test_synthetic_link_has_the_documented_statistics() -> None:
    for states, mean, spread, named in ((LTE_DOWN, 20.6, 1.6, 19.1), (LTE_UP, 8.2, 0.6, 7.6)):
        made = [synthetic_trace(seed, states=states) for seed in range(100)]
        rates = np.array([trace.mean_mbit_per_s for trace in made])
        assert rates.mean() == pytest.approx(mean, abs=0.05)
        assert rates.std() == pytest.approx(spread, abs=0.05)
        assert made[7].mean_mbit_per_s == pytest.approx(named, abs=0.05)
        assert np.mean([outages(trace) for trace in made]) == pytest.approx(4.5, abs=0.05)
        assert max(trace.longest_outage_ms for trace in made) <= 443
        assert {trace.duration_s for trace in made} == {60.0}


def test_synthetic_link_is_its_seed_and_both_directions_share_outages() -> None:
    down, up = synthetic_trace(7), synthetic_trace(7, states=LTE_UP)
    assert np.array_equal(down.opportunities_ms, synthetic_trace(7).opportunities_ms)
    assert not np.array_equal(down.opportunities_ms, synthetic_trace(8).opportunities_ms)
    assert (down.longest_outage_ms, outages(down)) == (343, 5)
    assert (up.longest_outage_ms, outages(up)) == (344, 5)
    starts = [trace.opportunities_ms[np.flatnonzero(np.diff(trace.opportunities_ms) >= 50)] for trace in (down, up)]
    assert np.allclose(starts[0], starts[1], atol=20)


def test_synthetic_trace_refuses_what_makes_no_link() -> None:
    with pytest.raises(TraceError):
        synthetic_trace(0, duration_s=0)
    with pytest.raises(TraceError):
        synthetic_trace(0, states=LTE_DOWN[:1])


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded traces are not here")
def test_recorded_traces_read_whole() -> None:
    paths = sorted([*RECORDED.glob("*.up"), *RECORDED.glob("*.down")])
    assert paths
    for path in paths:
        trace = read_mahimahi(path)
        assert trace.opportunities_ms.tolist() == [int(line) for line in path.read_text().split()]
        assert 0.1 < trace.mean_mbit_per_s < 200
        assert trace.duration_s > 10


def test_an_outage_silences_its_stretch_of_every_period_and_nothing_else():
    trace = synthetic_trace(3)
    cut = with_outage(trace, 20.0, 4.0)
    assert cut.period_ms == trace.period_ms
    for start_s, end_s, same in ((0, 20, True), (20, 24, False), (24, 60, True), (80, 84, False)):
        before, after = (
            t.opportunities_by(end_s * 1000 - 1) - t.opportunities_by(start_s * 1000 - 1) for t in (trace, cut)
        )
        assert before > 0 and after == (before if same else 0)
    with pytest.raises(TraceError, match="does not fit"):
        with_outage(trace, 58.0, 4.0)
