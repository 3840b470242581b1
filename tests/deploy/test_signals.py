"""Signals to a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from edgefm.deploy.signals import result_of

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


DEAF = """
import signal, threading, time
from concurrent.futures import ThreadPoolExecutor
from edgefm.deploy.signals import result_of, stopped_by_signals

stop = threading.Event()

def run():
    time.sleep(0.5)  # the main thread waits by now
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    return stop.wait(20)

with ThreadPoolExecutor(1) as worker, stopped_by_signals(stop.set):
    print(result_of(worker.submit(run)))
"""


def test_a_signal_that_another_thread_takes_is_heard():
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done


def test_what_was_waited_for_raises_as_it_did():
    with ThreadPoolExecutor(1) as worker, pytest.raises(TimeoutError, match="of its own"):
        result_of(worker.submit(_late))


def _late() -> None:
    raise TimeoutError("of its own")
