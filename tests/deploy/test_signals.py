"""Signals to a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import time
from edgefm.deploy.signals import stopped_by_signals
with stopped_by_signals(lambda: print("stopping", flush=True)) as received:
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(second):
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopping\n"
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(20) == -second
