"""Signals that ask a run to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_LOOK_S = 0.2


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


def result_of(future: Future[T]) -> T:
    """The future's result, waited for in the main thread with open ears.

    The system may give a signal to another thread of the process, or to this one in the moment before it waits; neither ends
    the wait for a lock, and Python runs handlers in the main thread alone.
    """
    while not future.done():
        wait((future,), _LOOK_S)
    return future.result()
