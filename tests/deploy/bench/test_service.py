"""The service's benchmark: the three rivals really run, and do the same work."""

from __future__ import annotations

import pytest
from edgefm.deploy.bench.memory import SAMPLES, bench_memory
from edgefm.deploy.bench.service import ServiceOptions, bench_service
from edgefm.models.errors import ConfigError
from rich.console import Console


def test_every_rival_answers_and_says_the_same_labels():
    options = ServiceOptions(clients=(1, 4), sizes=((64, 64),), repeats=1, warm_up_s=0.5, seconds=1.5)
    result = bench_service(options, Console(quiet=True))
    rows = {(row["system"], row["clients"]): row for row in result["rows"]}
    assert rows.keys() == {
        *((system, clients) for system in ("edgefm", "litserve") for clients in (1, 4)),
        ("edgefm keep", 4),
        ("direct", None),
        ("direct, beside", None),
    }
    for row in rows.values():
        assert row["requests"] > 0 and row["server_cpu_ms"] > 0
        assert len(row["requests_per_s_each"]) == 1
        if row["clients"]:
            assert 0 < row["p50_ms"] <= row["p99_ms"] and row["client_cpu_ms"] > 0
            assert row["labels"] > 1  # different pictures got different answers
    ratios = result["ratios"]["64x64"]
    rate = {key: row["requests_per_s"] for key, row in rows.items()}
    assert ratios["direct"] == pytest.approx(rate["edgefm", 4] / rate["direct", None], abs=1e-3)
    assert ratios["litserve_1"] == pytest.approx(rate["edgefm", 1] / rate["litserve", 1], abs=1e-3)
    assert all(ratio > 0 for ratio in ratios.values())
    assert result["environment"]["versions"]["litserve"]


def test_the_memory_is_sampled_along_the_way():
    result = bench_memory(3 * SAMPLES, keep=False, seed=0, console=Console(quiet=True), clients=4)
    counts = [count for count, _ in result["resident_mb"]]
    assert len(counts) == SAMPLES and counts == sorted(counts) and counts[-1] == result["requests"] >= 3 * SAMPLES
    assert all(memory > 100 for _, memory in result["resident_mb"])


@pytest.mark.parametrize("setting", [{"repeats": 0}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ConfigError, match="repeats must be"):
        ServiceOptions(**setting)
