"""Signals that ask a run to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """While entered, the first SIGINT or SIGTERM calls `stop`, in the main thread; a second one ends the process at once.

    Gives the signals received so far.
    """
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        received.append(number)
        stop()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
