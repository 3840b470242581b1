"""The benchmark of the agent's overhead: what it measures really is frames that the edge answered."""

from __future__ import annotations

import pytest
from edgefm.deploy.bench.agent import bench_agent
from edgefm.models.errors import ConfigError
from rich.console import Console


def test_every_frame_is_counted_and_what_is_timed_was_answered_by_the_edge():
    result = bench_agent(["lite0-64"], rounds=3, seed=0, console=Console(quiet=True))
    (row,) = result["students"]
    assert row["frames"] == 3 * result["pictures"] == sum(row["routes"].values())
    assert row["routes"]["edge"] >= 0.5 * row["frames"]
    assert row["cold_start_frames"] >= 150  # the least evidence that a switcher wants: the cloud really answered
    for part in ("decode_ms", "preprocess_ms", "session_ms", "session_in_agent_ms", "frame_ms"):
        assert 0 < row[part]["p50"] <= row[part]["p95"]
    assert 0 < row["overhead_ms"]["p50"] < row["frame_ms"]["p50"] - row["session_in_agent_ms"]["p50"]
    known = row["decode_ms"]["p50"] + row["preprocess_ms"]["p50"] + row["session_ms"]["p50"]
    assert row["frame_ms"]["p50"] == pytest.approx(known + row["overhead_ms"]["p50"], rel=0.5)
    assert result["frame"]["mean_bytes"] > 10_000 and result["environment"]["machine"]


def test_a_student_that_there_is_not_is_an_error_before_anything_runs():
    with pytest.raises(ConfigError, match="lite0-32"):
        bench_agent(["lite0-32"], rounds=1, seed=0, console=Console(quiet=True))
