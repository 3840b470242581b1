from __future__ import annotations

import os

import numpy as np
from edgefm.edge.machine import describe_machine, peak_rss_mb, thermal_state, usable_cores


def test_the_machine_is_described():
    machine = describe_machine()
    assert machine["processor"] and machine["cores"] == usable_cores() <= (os.cpu_count() or 1)
    assert machine["memory_mb"] > 500 and "CPUExecutionProvider" in machine["providers"]
    assert set(machine["versions"]) == {"edgefm", "onnxruntime", "numpy", "pillow"}
    state = thermal_state()
    assert set(state) == {"temperature_c", "clock_share"}
    assert state["temperature_c"] is None or -40 < state["temperature_c"] < 130
    assert state["clock_share"] is None or 0 < state["clock_share"] < 2


def test_peak_memory_grows_with_what_is_taken_and_stays():
    before = peak_rss_mb()
    if before is None:  # not Linux
        return
    np.ones(round(before * 1e6 / 8) + 10_000_000)  # more than was ever taken, and let go at once
    assert (peak_rss_mb() or 0) >= before + 40
