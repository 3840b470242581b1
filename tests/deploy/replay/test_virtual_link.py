"""The link in virtual time, against its trace's integral and against the queue of the live link."""

from __future__ import annotations

import numpy as np
import pytest
from edgefm.deploy.link_queue import LinkQueue
from edgefm.deploy.replay.virtual_link import VirtualLink
from edgefm.deploy.traces import PACKET_BYTES, Trace, constant_trace
from hypothesis import given, settings
from hypothesis import strategies as st

TRACES = st.lists(st.integers(0, 400), min_size=1, max_size=60).map(sorted).filter(lambda times: times[-1] > 0)
MESSAGES = st.lists(st.tuples(st.floats(0, 300), st.integers(1, 20_000)), min_size=1, max_size=30)


def send_all(link: VirtualLink, messages: list[tuple[float, int]]) -> list[tuple[float, float, int]]:
    """(sent_ms, carried_ms, bytes) of messages with gaps between them."""
    now_ms, carried = 0.0, []
    for gap_ms, size in messages:
        now_ms += gap_ms
        carried.append((now_ms, link.send(size, now_ms), size))
    return carried


@settings(max_examples=150, deadline=None)
@given(TRACES, MESSAGES)
def test_never_more_than_the_trace_allows_and_in_order(times: list[int], messages: list[tuple[float, int]]) -> None:
    trace = Trace("t", np.array(times))
    carried = send_all(VirtualLink(trace), messages)
    assert all(done >= sent for sent, done, _ in carried)
    ends = [done for _, done, _ in carried]
    assert ends == sorted(ends)
    for _, until, _ in carried:
        delivered = sum(size for _, done, size in carried if done <= until)
        assert delivered <= trace.opportunities_by(until) * PACKET_BYTES


@settings(max_examples=150, deadline=None)
@given(TRACES, MESSAGES)
def test_as_the_live_link(times: list[int], messages: list[tuple[float, int]]) -> None:
    """The queue of the shaper carries every byte at the same opportunity, with integer times of sending."""
    trace = Trace("t", np.array(times))
    whole = [(float(int(gap) + 0.5 * (i == 0)), size) for i, (gap, size) in enumerate(messages)]
    carried = send_all(VirtualLink(trace), whole)
    assert [done for _, done, _ in carried] == live_link(trace, [(sent, size) for sent, _, size in carried])


def live_link(trace: Trace, messages: list[tuple[float, int]]) -> list[float]:
    ends: list[float] = []

    class Pipe:
        def __init__(self) -> None:
            ends.append(-1.0)
            self.place = len(ends) - 1

        def carried(self, piece: memoryview, at_ms: float) -> None:
            ends[self.place] = at_ms

    class Chunk:
        def __init__(self, sent_ms: float, size: int) -> None:
            self.pipe, self.data, self.since_ms = Pipe(), memoryview(bytes(size)), sent_ms

    queue = LinkQueue(trace, lambda: 0.0)
    for sent_ms, size in messages:
        queue._queue.append(Chunk(sent_ms, size))  # pyright: ignore[reportArgumentType]
    queue._serve(1e12)
    return ends


@pytest.mark.parametrize("mbit", [0.5, 2.0, 12.0, 60.0])
def test_under_load_all_of_the_trace_is_used(mbit: float) -> None:
    trace, link = constant_trace(mbit), VirtualLink(constant_trace(mbit))
    end_ms = max(link.send(20_000, 0.0) for _ in range(500))
    assert link.carried_bytes == 500 * 20_000
    assert link.carried_bytes >= 0.995 * trace.opportunities_by(end_ms) * PACKET_BYTES


def test_a_replay_may_begin_anywhere_on_the_trace() -> None:
    trace = Trace("t", np.array([10, 500, 1000]))
    assert VirtualLink(trace).send(100, 0.0) == 10.0
    assert VirtualLink(trace, begin_ms=20.0).send(100, 0.0) == 480.0
    assert VirtualLink(trace, begin_ms=1005.0).send(100, 0.0) == 5.0
