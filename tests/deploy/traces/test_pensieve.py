"""Pensieve's format: a rate holds until its row's time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.traces import PACKET_MBIT, read_pensieve, synthetic_trace, with_outage, write_pensieve
from edgefm.models.errors import ConfigError, TraceError
from hypothesis import given
from hypothesis import strategies as st


def write(folder: Path, content: bytes) -> Path:
    path = folder / "link.log"
    path.write_bytes(content)
    return path


def simulated_mbit(rows: list[tuple[float, float]], until_s: float) -> float:
    """What Pensieve's simulator (`sim/fixed_env.py`) lets pass: its loop, without its share for headers."""
    sent, pointer, last_s, at_s = 0.0, 1, rows[0][0], rows[0][0]
    while pointer < len(rows):
        throughput, duration = rows[pointer][1], rows[pointer][0] - last_s
        if at_s + duration > until_s:
            return sent + throughput * (until_s - at_s)
        sent += throughput * duration
        at_s += duration
        last_s = rows[pointer][0]
        pointer += 1
    return sent


@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 40_000)), min_size=2, max_size=8),
    st.integers(0, 5000),
)
def test_bytes_pass_as_in_pensieve_s_simulator(tmp_path_factory, steps, start_ms: int) -> None:
    times_s = (start_ms + np.cumsum([0, *(max(step, 1) for step, _ in steps[1:])])) / 1000
    rows = list(zip(times_s.tolist(), [rate / 1000 + 0.1 for _, rate in steps], strict=True))
    text = "".join(f"{time_s} {rate}\n" for time_s, rate in [*rows, (rows[-1][0] + 1, 9.0)])
    trace = read_pensieve(write(tmp_path_factory.mktemp("pensieve"), text.encode()))
    assert trace.duration_s == pytest.approx(rows[-1][0] + 1 - start_ms / 1000)
    for at_s in np.linspace(0, rows[-1][0] - start_ms / 1000, 20).round(3).tolist():
        packets = simulated_mbit(rows, start_ms / 1000 + at_s) / PACKET_MBIT
        assert packets + 1e-5 >= trace.opportunities_by(round(at_s * 1000)) > packets - 1 - 1e-5


def test_the_first_row_starts_and_the_last_one_ends(tmp_path: Path) -> None:
    trace = read_pensieve(write(tmp_path, b"10.0\t99\n10.01\t6\n\n10.02 12.0\n"))
    assert trace.name == "link.log" and trace.period_ms == 20
    assert trace.opportunities_ms.tolist() == [2, 4, 6, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def test_of_rows_with_one_time_the_first_counts(tmp_path: Path) -> None:
    trace = read_pensieve(write(tmp_path, b"0 0\n0.01 6\n0.01 500\n0.02 6\n"))
    assert trace.opportunities_ms.tolist() == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b"", 1, "the trace has no row"),
        (b"\n\n", 2, "the trace has no row"),
        (b"0 5\n", 1, "all rows have one time; a trace needs at least two"),
        (b"0 5\n1 5\n2", 3, "1 column; expected two: seconds and Mbit/s; the file ends within this line"),
        (b"0 5\n1 5 7\n", 2, "3 columns; expected two"),
        (b"0 5\n1 five\n", 2, "the rate 'five' is not a number"),
        (b"0 5\none 5\n", 2, "the time 'one' is not a number"),
        (b"0 5\n1 1_000\n", 2, "'1_000' is not a number"),
        (b"0 5\n1 nan\n2 5\n", 2, "the rate 'nan' is not a number"),
        (b"0 5\ninf 5\n", 2, "the time 'inf' is not a number"),
        (b"0 5\n1 1e999\n", 2, "the rate '1e999' is too large"),
        (b"0 5\n1 -5\n", 2, "a rate of -5 Mbit/s is negative; a link that is down has 0"),
        (b"0 5\n1 5000000\n", 2, "a rate of 5e+06 Mbit/s is over 1,000,000 Mbit/s; is the unit right?"),
        (b"0 5\n2 5\n1.5 5\n", 3, "the time goes back by 0.5 s; sort the rows, or split the trace here"),
        (b"0 5\n1e15 5\n", 2, "would last more than"),
        (b"0 5\n1 0\n", 2, "let no packet of 1500 bytes pass"),
        (b"0 5\n100 900000\n10000 900000\n", 2, "more than 50,000,000 packets"),
        (b"0 5\n\xff\x00 5\n", 2, "is not a number"),
    ],
)
def test_malformed_traces_name_file_and_line(tmp_path: Path, content: bytes, line: int, what: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(TraceError) as caught:
        read_pensieve(path)
    assert str(caught.value).startswith(f"{path}: line {line}: ") and what in str(caught.value)


@pytest.mark.parametrize("window_ms", [100, 500, 700])
def test_what_is_written_has_the_same_integral(tmp_path: Path, window_ms: int) -> None:
    trace = with_outage(synthetic_trace(5), 20.0, 4.0)
    write_pensieve(trace, tmp_path / "link", window_ms)
    again = read_pensieve(tmp_path / "link")
    assert (again.period_ms, again.opportunities_ms.size) == (trace.period_ms, trace.opportunities_ms.size)
    for edge_ms in range(window_ms, trace.period_ms, window_ms):
        assert again.opportunities_by(edge_ms) == trace.opportunities_by(edge_ms)
    rows = [line.split() for line in (tmp_path / "link").read_text().splitlines()]
    assert rows[0] == ["0.0", rows[1][1]] and float(rows[-1][0]) == trace.duration_s


def test_impossible_windows_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_pensieve(synthetic_trace(5), tmp_path / "link", 0)
    assert not list(tmp_path.iterdir())
