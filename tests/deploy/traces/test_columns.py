"""Units in names that people chose."""

from __future__ import annotations

import pytest
from edgefm.deploy.traces.columns import named_rate_unit, named_time_unit, unit_by_size


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("throughput_mbps", "Mbit/s"),
        ("MBPS", "Mbit/s"),
        ("Throughput (Mbps)", "Mbit/s"),
        ("downlinkThroughputMbps", "Mbit/s"),
        ("rate_MBps", "MB/s"),
        ("rate MB/s", "MB/s"),
        ("rate_megabytes", None),
        ("kbit/s", "kbit/s"),
        ("Kbits/sec", "kbit/s"),
        ("DL [kbit/s]", "kbit/s"),
        ("kb_per_s", "kbit/s"),
        ("kB_per_s", "kB/s"),
        ("kilobytes_per_s", None),
        ("bytes_per_second", "B/s"),
        ("gbit_s", "Gbit/s"),
        ("bps", "bit/s"),
        ("bit/s", "bit/s"),
        ("DL_bitrate", "kbit/s"),
        ("bitrate", None),
        ("throughput", None),
        ("maps", None),
        ("cellid", None),
        ("", None),
    ],
)
def test_of_rates(name: str, unit: str | None) -> None:
    assert named_rate_unit(name) == unit


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("time_ms", "ms"),
        ("Time (s)", "s"),
        ("elapsed seconds", "s"),
        ("us", "us"),
        ("t [nsec]", "ns"),
        ("time", None),
        ("", None),
    ],
)
def test_of_times(name: str, unit: str | None) -> None:
    assert named_time_unit(name) == unit


def test_unix_times_are_told_by_their_size() -> None:
    since_1970_s = 1_518_452_041
    assert [unit_by_size(since_1970_s * scale) for scale in (1, 10**3, 10**6, 10**9)] == ["s", "ms", "us", "ns"]
    assert unit_by_size(0) == unit_by_size(10**6) == "s"
