from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from edgefm.edge.machine import describe_machine, machine_state, usable_cores


def test_the_machine_is_described():
    machine = describe_machine()
    assert machine["processor"] and machine["cores"] == usable_cores() <= (os.cpu_count() or 1)
    assert machine["memory_mb"] > 500 and "CPUExecutionProvider" in machine["providers"]
    assert set(machine["versions"]) == {"edgefm", "onnxruntime", "numpy", "pillow"}
    state = machine_state()
    assert set(state) == {"temperature_c", "clock_share", "busy"}
    assert state["temperature_c"] is None or -40 < state["temperature_c"] < 130
    assert state["clock_share"] is None or 0 < state["clock_share"] < 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_peak_memory_grows_with_what_is_taken_and_stays():
    script = """
from edgefm.edge.machine import peak_rss_mb
before = peak_rss_mb()
taken = bytearray(b"x") * 200_000_000
del taken
assert peak_rss_mb() >= before + 150, (before, peak_rss_mb())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
