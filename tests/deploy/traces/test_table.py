"""CSV with named columns: which ones, their units, and what holds between rows."""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.traces import PACKET_MBIT, CsvOptions, Trace, read_csv
from edgefm.models.errors import ConfigError, TraceError
from hypothesis import given
from hypothesis import strategies as st

CAMPAIGN = (
    "Timestamp,Longitude,Latitude,Speed,Operatorname,CellID,NetworkMode,RSRP,RSRQ,SNR,CQI,RSSI,DL_bitrate,UL_bitrate,State\n"
    "2018.02.12_16.14.01,-8.5,51.9,4,A,2,LTE,-95,-13,0.0,9,-80,600000,6000,D\n"
    "2018.02.12_16.14.02,-8.5,51.9,5,A,2,LTE,-95,-12,-,9,-,12000,120,D\n"
    "2018.02.12_16.14.03,-8.5,51.9,6,A,2,LTE,-96,-13,2.0,8,-,0,0,I\n"
)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "drive.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def packets_by_second(trace: Trace) -> list[int]:
    edges_ms = range(1000, trace.period_ms, 1000)
    counted = [0, *(trace.opportunities_by(edge) for edge in edges_ms), trace.opportunities_ms.size]
    return np.diff(counted).tolist()


def test_a_measurement_campaign_s_rates_hold_until_the_next_row(tmp_path: Path) -> None:
    down = read_csv(write(tmp_path, CAMPAIGN), CsvOptions(rate_column="DL_bitrate"))
    up = read_csv(write(tmp_path, CAMPAIGN), CsvOptions(rate_column="UL_bitrate"))
    assert (down.name, down.period_ms, up.period_ms) == ("drive.csv", 3000, 3000)
    assert packets_by_second(down) == [50_000, 999, 1]  # 600 and 12 Mbit/s, then nothing but the last, at the end
    assert packets_by_second(up) == [500, 9, 1]


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("time,throughput_mbps", ["0,12", "1,24", "2,6"]),
        ("time_s;note;rate [kbit/s]", ["0;a;12000", "1;b,c;24000", "2;;6000"]),
        ("elapsed ms\tThroughput(Mbps)", ["0\t12", "1000\t24", "2000\t6"]),
        ("timestamp_us,downlink_mbit_per_s", ["5,12", "1000005,24", "2000005,6"]),
        ("Time (ns),dl_bps", ["0,12e6", "1e9,24e6", "2e9,.6e7"]),
        ("Timestamp,capacity_MB/s", ["1518452041,1.5", "1518452042,3", "1518452043,0.75"]),
        ("Timestamp,bandwidthKBps", ["1518452041000,1500", "1518452042000,3000", "1518452043000,750"]),
        (
            "Timestamp,speed,bytes_per_s",
            ["1518452041000000,1,1500e3", "1518452042000000,1,3e6", "1518452043000000,,.75e6"],
        ),
        ("t,GBps", ["1518452041000000000,.0015", "1518452042000000000,.003", "1518452043000000000,.00075"]),
        (
            '"time","dl_bitrate"',
            ['"2018-02-12T16:14:01Z","12000"', '"2018-02-12T16:14:02Z",24000', "2018-02-12T16:14:03Z,6000"],
        ),
        (
            "datetime,UL_Bitrate",
            ["2018-02-12 23:59:59.5,12000", "2018/02/13_00.00.00.500,24000", "2018-02-13 00:00:01.50,6000"],
        ),
        (
            "time,goodput_KBPS",
            ["2018-02-12T16:14:01+01:00,12000", "2018-02-12T15:14:02Z,24000", "2018-02-12T10:14:03-0500,6000"],
        ),
    ],
)
def test_names_and_sizes_tell_the_units(tmp_path: Path, header: str, rows: list[str]) -> None:
    for end, mark in (("\n", b""), ("\r\n", b"\xef\xbb\xbf")):
        path = write(tmp_path, mark + end.join([header, "", *rows, ""]).encode())
        assert packets_by_second(read_csv(path)) == [1000, 2000, 500]


def test_units_and_columns_may_be_given(tmp_path: Path) -> None:
    path = write(tmp_path, "time,seq_num,throughput,other_mbps\n0,1,12,9\n0,2,24,9\n0,3,6,9\n")
    options = CsvOptions(time_column="seq_num", rate_column="throughput", rate_unit="Mbps")
    assert packets_by_second(read_csv(path, options)) == [1000, 2000, 500]
    path = write(tmp_path, "time,throughput_mbps\n0,12000\n1000,24000\n2000,6000\n")
    assert packets_by_second(read_csv(path, CsvOptions(time_unit="ms", rate_unit="kbit/s"))) == [1000, 2000, 500]


@pytest.mark.parametrize(
    ("field", "value"),
    [("time_unit", "h"), ("rate_unit", "furlong"), ("longest_hold_s", 0.0), ("longest_hold_s", float("nan"))],
)
def test_impossible_options_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match="got"):
        CsvOptions(**{field: value})  # pyright: ignore[reportArgumentType]


def test_rows_with_one_time_count_as_their_mean(tmp_path: Path) -> None:
    path = write(tmp_path, "time,rate_mbps\n0,12\n1,0\n1,24\n1,48\n2,6\n2,6\n")
    assert packets_by_second(read_csv(path)) == [1000, 2000, 500]


def test_a_gap_is_held_and_told_or_becomes_an_outage(tmp_path: Path, caplog) -> None:
    path = write(tmp_path, "time,rate_mbps\n0,12\n1,12\n2,12\n20,12\n21,12\n")
    with caplog.at_level(logging.WARNING):
        assert packets_by_second(read_csv(path)) == [1000] * 22
        (record,) = caplog.records
        assert record.getMessage().endswith("line=4 gap_s=18.000 gaps=1 remedy=longest_hold_s")
        caplog.clear()
        cut = read_csv(path, CsvOptions(longest_hold_s=1.5))
        assert packets_by_second(cut) == [1000, 1000, 1000, 500, *[0] * 16, 1000, 1000]
        assert packets_by_second(read_csv(write(tmp_path, "t,mbps\n0,12\n1,12\n3,12\n"))) == [1000] * 5
    assert not caplog.records


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 90_000)), min_size=2, max_size=10),
    st.sampled_from(",;\t"),
    st.sampled_from([("kbps", 1.0), ("MBps", 1 / 8000), ("bps", 1000.0)]),
)
def test_bytes_follow_the_integral(tmp_path_factory, steps, delimiter: str, unit: tuple[str, float]) -> None:
    times_ms = np.cumsum([1 + step for step, _ in steps])
    kbit_per_s = np.array([1000 + rate for _, rate in steps])
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["note, or so", "time_ms", f"dl {unit[0]}"])
    writer.writerows(
        ("a;b", int(at), repr(float(rate * unit[1]))) for at, rate in zip(times_ms, kbit_per_s, strict=True)
    )
    path = write(tmp_path_factory.mktemp("csv"), out.getvalue())
    edges_ms = np.append(times_ms, 2 * times_ms[-1] - times_ms[-2]) - times_ms[0]
    allowed = np.concatenate([[0], np.cumsum(np.diff(edges_ms) * kbit_per_s / 1e6)]) / PACKET_MBIT
    if allowed[-1] < 1.01:
        return
    trace = read_csv(path)
    assert trace.period_ms == edges_ms[-1]
    for at_ms in np.linspace(0, edges_ms[-1] - 1, 30).astype(int).tolist():
        packets = np.interp(at_ms, edges_ms, allowed)
        assert packets + 1e-5 >= trace.opportunities_by(at_ms) > packets - 2 - 1e-5


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ("", 1, "the trace is empty; its first line must name the columns"),
        ("time,rate_mbps\n", 1, "the trace has no row"),
        ("time,rate_mbps\n\n0,5\n", 3, "all rows have one time"),
        ("time,rate_mbps\n0,5\n1,5\n2", 4, "1 columns where the first line names 2; the file ends within this line"),
        ("time,rate_mbps\n0,5\n1,5,9\n", 3, "3 columns where the first line names 2"),
        ("time,rate_mbps\n0,5\n1,\n", 3, "the rate 'rate_mbps' is missing"),
        ("time,rate_mbps\n0,5\n,5\n", 3, "the time 'time' is missing"),
        ("time,rate_mbps\n0,5\n1,-\n", 3, "the rate 'rate_mbps' '-' is not a number"),
        ("time;rate_mbps\n0;5\n1;5,5\n", 3, "'5,5' is not a number"),
        ("time,rate_mbps\n0,5\n1,NaN\n", 3, "'NaN' is not a number"),
        ("time,rate_mbps\n0,5\n1,-5\n", 3, "a rate of -5 Mbit/s is negative"),
        ("time,rate_kbps\n0,5\n1,5e12\n", 3, "a rate of 5e+12 kbit/s is over 1,000,000 Mbit/s; is the unit right?"),
        ("time,rate_mbps\n5,5\n1,5\n", 3, "the time goes back by 4 s"),
        ("time,rate_mbps\n0,5\n2018-02-12T16:14:01,5\n", 3, "the time 'time' '2018-02-12T16:14:01' is not a number"),
        ("time,rate_mbps\n2018-02-12T16:14:01,5\n5,5\n", 3, "'5' is not a time; expected a number, 2018-02-12T16:14:01.5Z"),
        ("time,rate_mbps\n2018-02-12T16:14:01,5\n,5\n", 3, "the time 'time' is missing"),
        ("time,rate_mbps\n0001-01-01T00:00:00+01:00,5\n", 2, "is not a time within the calendar"),
        ("time,rate_mbps\n2018-02-31T16:14:01,5\n", 2, "'2018-02-31T16:14:01' is not a time: day"),
        ("time,rate_mbps\n12.02.2018 16:14:01,5\n", 2, "is not a time; expected a number"),
        ("time,RSRP,State\n0,5,D\n", 1, "no column is called like a rate; choose with --rate-column among 'time', 'RSRP'"),
        ("clock,rate_mbps\n0,5\n", 1, "no column is called like a time; choose with --time-column among 'clock', 'rate_m"),
        ("time,DL_bitrate,UL_bitrate\n0,5,5\n", 1, "several columns may be the rate; choose with --rate-column among 'DL_b"),
        ("time,t,rate_mbps\n0,5,5\n", 1, "several columns may be the time; choose with --time-column among 'time', 't'"),
        ("time,throughput\n0,5\n", 1, "the name 'throughput' does not tell the unit; give --rate-unit (bit/s, kbit/s"),
        ('time,rate_mbps\n0,"5\n', 2, "not CSV: unexpected end of data"),
        ("time,rate_mbps\n0,0.001\n1,0.001\n", 3, "the rates let no packet of 1500 bytes pass"),
        ("time,rate_mbps\n0,900000\n1000,5\n", 2, "more than 50,000,000 packets of 1500 bytes by here; split the trace"),
    ],
)  # fmt: skip
def test_malformed_files_name_file_and_line(tmp_path: Path, content: str, line: int, what: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(TraceError) as caught:
        read_csv(path)
    assert str(caught.value).startswith(f"{path}: line {line}: ") and what in str(caught.value)


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path, "time,dl_mbps,x,x\n0,5,1,1\n")
    with pytest.raises(TraceError, match="line 1: no column 'speed'; there are 'time', 'dl_mbps', 'x', 'x'"):
        read_csv(path, CsvOptions(rate_column="speed"))
    with pytest.raises(TraceError, match="line 1: several columns 'x'"):
        read_csv(path, CsvOptions(time_column="x"))
