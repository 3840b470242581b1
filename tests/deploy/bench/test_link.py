"""The benchmark of the link shaper, with one repeat."""

from __future__ import annotations

import pytest
from edgefm.deploy.bench.link import LOAD_MBIT_PER_S, bench_link
from rich.console import Console


def test_the_shaper_costs_something_and_carries_more_than_the_load() -> None:
    result = bench_link(1, Console(quiet=True))
    past, through = (result["round_trip_ms"][name] for name in ("past", "through"))
    assert 0 < past["p50"] <= past["p95"] and past["p50"] < through["p50"] <= through["p95"]
    assert result["link_ms"] == pytest.approx(1.0, abs=0.02)  # half a millisecond each way, until the next opportunity
    assert result["carried_mbit_per_s"] > LOAD_MBIT_PER_S
