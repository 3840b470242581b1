"""`edgefm trace info | convert` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from edgefm.deploy.cli import app
from edgefm.deploy.demo import DemoOptions, _traces
from edgefm.deploy.traces import open_trace, read_mahimahi, read_pensieve, synthetic_trace, write_mahimahi
from edgefm.models.errors import ConfigError, EdgeFMError, TraceError
from typer.testing import CliRunner

CSV = "time,dl_mbps,ul_mbps\n" + "".join(f"{second},{12 + second},{second}\n" for second in range(5))


def edgefm(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(done.exception, EdgeFMError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    path = tmp_path / "campaign.csv"
    path.write_text(CSV)
    return path


def test_info_prints_figures_and_draws(tmp_path: Path, campaign: Path) -> None:
    shown = edgefm("trace", "info", campaign, "--rate-column", "dl_mbps")
    assert "campaign.csv" in shown and "5 s, 5,833 packets" in shown and "14 Mbit/s" in shown and "█" in shown


def test_info_as_json_has_units_in_its_keys(campaign: Path) -> None:
    command = ["trace", "info", campaign, "--rate-column", "dl_mbps", "--json", "--window-ms", 1000, "--outage-ms", 50]
    found = json.loads(edgefm(*command))
    assert found.keys() == {
        "name",
        "duration_s",
        "opportunities",
        "mean_mbit_per_s",
        "window_ms",
        "percentiles_mbit_per_s",
        "outage_ms",
        "outages",
        "longest_outage_ms",
        "outage_share",
    }
    assert (found["window_ms"], found["outage_ms"], found["duration_s"]) == (1000, 50, 5.0)
    assert found["percentiles_mbit_per_s"]["50"] == pytest.approx(14, abs=0.02)


def test_info_draws_a_picture(tmp_path: Path) -> None:
    assert "synthetic-7" in edgefm("trace", "info", "synthetic:7:up", "--plot", tmp_path / "link.svg")
    assert (tmp_path / "link.svg").read_text().count("<svg") == 1
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        edgefm("trace", "info", "synthetic:7:up", "--plot", tmp_path / "link.jpg")


def test_convert_goes_round(tmp_path: Path, campaign: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one.down", "two.log", "three.down"))
    told = edgefm("trace", "convert", campaign, one, "--rate-column", "dl_mbps", "--longest-hold-s", 0.5)
    assert told == f"5 s, 7 Mbit/s on average, written to {one}\n"
    edgefm("trace", "convert", one, two, "--format", "pensieve", "--window-ms", 250)
    edgefm("trace", "convert", two, three, "--from", "pensieve", "--format", "mahimahi")
    first, last = read_mahimahi(one), read_mahimahi(three)
    assert [first.opportunities_by(ms) for ms in range(250, 5000, 250)] == [
        last.opportunities_by(ms) for ms in range(250, 5000, 250)
    ]
    assert len(two.read_text().splitlines()) == 21
    assert read_pensieve(two).period_ms == 5000


def test_convert_never_writes_over_its_source(tmp_path: Path) -> None:
    source, link = tmp_path / "link.up", tmp_path / "same.up"
    write_mahimahi(synthetic_trace(7), source)
    before = source.read_bytes()
    link.symlink_to(source)
    for output in (source, tmp_path / ".." / tmp_path.name / "link.up", link):
        with pytest.raises(TraceError, match="is the trace that is read; write to another file"):
            edgefm("trace", "convert", source, output)
    assert source.read_bytes() == before and link.is_symlink()


def test_convert_that_fails_leaves_the_old_output(tmp_path: Path) -> None:
    source, output = tmp_path / "link.up", tmp_path / "out.up"
    source.write_text("5\n3\n")
    output.write_text("old")
    with pytest.raises(TraceError, match="line 2"):
        edgefm("trace", "convert", source, output)
    assert output.read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_formats_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--format is mahimahi or pensieve, got 'csv'"):
        edgefm("trace", "convert", "constant:5", tmp_path / "out", "--format", "csv")
    with pytest.raises(ConfigError, match="--from is mahimahi, pensieve, csv; got 'json'"):
        edgefm("trace", "info", tmp_path / "out", "--from", "json")


def test_the_demo_takes_whatever_names_a_trace(tmp_path: Path, campaign: Path) -> None:
    up, down = _traces(DemoOptions(trace="synthetic:3:up"))
    assert up.mean_mbit_per_s < down.mean_mbit_per_s and up.duration_s == down.duration_s == 60
    up, down = _traces(DemoOptions(trace="constant:2", trace_down="constant:9"))
    assert (up.mean_mbit_per_s, down.mean_mbit_per_s) == pytest.approx((2, 9))
    pensieve = tmp_path / "link.log"
    pensieve.write_text("0 5\n10 5\n")
    up, down = _traces(DemoOptions(trace=str(pensieve)))
    assert (
        np.array_equal(up.opportunities_ms, open_trace(pensieve).opportunities_ms)
        and up.name == down.name == "link.log"
    )
    write_mahimahi(up, tmp_path / "link.up")
    write_mahimahi(open_trace("constant:9"), tmp_path / "link.down")
    assert [trace.name for trace in _traces(DemoOptions(trace=str(tmp_path / "link.up")))] == ["link.up", "link.down"]
    with pytest.raises(ConfigError, match="--trace-down needs --trace"):
        _traces(DemoOptions(trace_down="constant:9"))
    with pytest.raises(TraceError, match="several columns"):
        _traces(DemoOptions(trace=str(campaign)))
