"""The link estimator on simulated links: a queue, first in first out, with a known round trip and bandwidth."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable

import pytest
from edgefm.edge.link import LinkEstimator

RTT_MS = 60.0
IDLE_MS, KBYTE = 1000.0, 1024
SIZES = (2 * KBYTE, 5 * KBYTE, 10 * KBYTE, 14 * KBYTE)


class Link:
    """Carries what it is given to a cloud that takes `server_ms`, and tells the estimator when answers come."""

    def __init__(self, kbps: Callable[[float], float], seed: int = 0, jitter_ms: float = 0.0) -> None:
        self.estimator = LinkEstimator()
        self._kbps = kbps
        self._random = random.Random(seed)
        self._jitter_ms = jitter_ms
        self._free_ms = 0.0
        self._answers: list[tuple[float, int, float]] = []
        self._ids = itertools.count()

    def send(self, size: int, now_ms: float) -> tuple[float, float]:
        """Returns the transit as predicted and as it will be."""
        self.settle(now_ms)
        predicted = self.estimator.predict_ms(size, now_ms)
        start = max(now_ms, self._free_ms)
        self._free_ms = start + size * 8 / self._kbps(start)
        jitter = self._random.expovariate(1 / self._jitter_ms) if self._jitter_ms else 0.0
        transit = self._free_ms + RTT_MS + jitter - now_ms
        server = self._random.uniform(10, 30)
        query = next(self._ids)
        self.estimator.sent(query, size, now_ms)
        heapq.heappush(self._answers, (now_ms + transit + server, query, server))
        return predicted, transit

    def settle(self, now_ms: float) -> None:
        while self._answers and self._answers[0][0] <= now_ms:
            at, query, server = heapq.heappop(self._answers)
            self.estimator.answered(query, at, server)


def times(count: int, period_ms: float, burst: int = 1, start_ms: float = 0.0) -> Iterable[float]:
    """`count` moments, `burst` at a time."""
    return (start_ms + i // burst * period_ms * burst for i in range(count))


@pytest.mark.parametrize("kbps", [500.0, 2000.0, 8000.0])
@pytest.mark.parametrize(("period_ms", "burst"), [(IDLE_MS, 1), (300.0, 5)], ids=["alone", "bursts"])
def test_round_trip_and_bandwidth_of_a_steady_link(kbps, period_ms, burst):
    link, chooser = Link(lambda _: kbps), random.Random(1)
    for now in times(100, period_ms, burst):
        link.send(chooser.choice(SIZES), now)
    link.settle(1e9)
    # Half of the smallest transmission may stay in the round trip.
    assert RTT_MS <= link.estimator.rtt_ms <= 1.2 * RTT_MS + 4 * KBYTE * 4 / kbps
    assert link.estimator.bits_per_ms == pytest.approx(kbps, rel=0.2)
    assert link.estimator.bandwidth_mbps == link.estimator.bits_per_ms / 1000
    for size in SIZES:
        assert link.estimator.transit_ms(size) == pytest.approx(RTT_MS + size * 8 / kbps, rel=0.1)
    assert link.estimator.cloud_ms == pytest.approx(20, abs=3)


@pytest.mark.parametrize("jitter_ms", [0.0, 3.0])
def test_queries_of_one_size_are_told_from_the_round_trip_by_their_queue(jitter_ms):
    """Pipelined queries count for the time the link was busy with them, not for the bytes that are under way."""
    link = Link(lambda _: 2000.0, jitter_ms=jitter_ms)
    for now in times(200, 160.0, burst=4):
        link.send(8000, now)
    link.settle(1e9)
    assert link.estimator.bits_per_ms == pytest.approx(2000, rel=0.2)
    assert link.estimator.rtt_ms == pytest.approx(RTT_MS, rel=0.2)


def test_the_prediction_includes_what_waits_to_be_sent():
    link = Link(lambda _: 2000.0)
    for now in times(100, 400.0, burst=5):
        link.send(8000, now)
    for now in times(40, 400.0, burst=5, start_ms=50_000):  # the fifth of a burst waits for four
        predicted, transit = link.send(8000, now)
        assert predicted == pytest.approx(transit, rel=0.1)
    alone, behind_four = 60 + 32, 60 + 5 * 32
    link.settle(100_000)
    predictions = [link.send(8000, 100_000)[0] for _ in range(5)]
    assert predictions[0] == pytest.approx(alone, rel=0.1) and predictions[4] == pytest.approx(behind_four, rel=0.1)


def test_predictions_are_right_on_average_under_jitter():
    link, chooser = Link(lambda _: 4000.0, jitter_ms=5.0), random.Random(2)
    pairs = [link.send(chooser.choice(SIZES), now) for now in times(500, 60.0)][50:]
    mean = sum(transit for _, transit in pairs) / len(pairs)
    assert sum(predicted for predicted, _ in pairs) / len(pairs) == pytest.approx(mean, rel=0.1)


@pytest.mark.parametrize(("before", "after"), [(8000.0, 2000.0), (2000.0, 8000.0)])
def test_follows_a_change_of_bandwidth_within_one_window(before, after):
    link, chooser = Link(lambda ms: before if ms < 50_000 else after), random.Random(3)
    for now in times(100, 500.0):
        link.send(chooser.choice(SIZES), now)
    assert link.estimator.bits_per_ms == pytest.approx(before, rel=0.2)
    for now in times(32, 500.0, start_ms=50_000):  # a window of 30 answers
        link.send(chooser.choice(SIZES), now)
    link.settle(1e9)
    assert link.estimator.bits_per_ms == pytest.approx(after, rel=0.2)
    assert link.estimator.transit_ms(8000) == pytest.approx(RTT_MS + 64_000 / after, rel=0.2)


def test_an_outage_under_way_is_part_of_the_prediction():
    link = LinkEstimator()
    for query in range(30):
        link.sent(query, 8000, query * 1000.0)
        link.answered(query, query * 1000.0 + 92 + 20, 20)
    link.sent(99, 8000, 100_000.0)
    fresh, late = link.predict_ms(8000, 100_010.0), link.predict_ms(8000, 100_800.0)
    assert fresh < 150 and late > 700
    assert link.predict_ms(8000, 101_800.0) == pytest.approx(late + 1000)
    assert link.transit_ms(8000) == pytest.approx(92)  # of an idle link: unchanged


def test_a_query_that_met_its_deadline_lowers_the_estimate():
    link, now = Link(lambda _: 2000.0).estimator, 0.0
    for query in range(10):
        link.sent(query, 4000 + 1000 * (query % 4), now)
        now += 60 + (4000 + 1000 * (query % 4)) * 8 / 2000 + 20
        link.answered(query, now, 20)
        now += 500
    before = link.bits_per_ms, link.transit_ms(8000)
    link.sent(50, 8000, now)
    link.lost(50, now + 1000)
    assert link.bits_per_ms < before[0] / 2 and link.transit_ms(8000) > before[1] + 50


def test_queries_lost_together_count_their_outage_once():
    one, many = LinkEstimator(), LinkEstimator()
    for link, lost in ((one, 1), (many, 5)):
        for query in range(20):
            link.sent(query, 5000, query * 500.0)
            link.answered(query, query * 500.0 + 80, 0)
        for query in range(lost):
            link.sent(100 + query, 5000, 20_000.0 + query)
        for query in range(lost):
            link.lost(100 + query, 21_000.0 + query)
    assert many.bits_per_ms >= one.bits_per_ms


def test_silence_alone_changes_nothing_but_after_a_loss_the_link_is_tried_again():
    link = LinkEstimator()
    for query in range(40):
        link.sent(query, 5000 + query % 2 * 3000, query * 500.0)
        link.answered(query, query * 500.0 + 300 + query % 2 * 24, 0)
    assert link.predict_ms(8000, 1e6) == link.transit_ms(8000) == pytest.approx(324, rel=0.05)
    for query in range(40, 80):
        link.sent(query, 8000, query * 1000.0)
        link.lost(query, query * 1000.0 + 1000)
    assert link.predict_ms(8000, 80_500.0) >= 999  # with the time in the cloud past the deadline of 1000 ms
    assert link.predict_ms(8000, 81_500.0) < 100  # as believed of a link before its first answer


def test_a_dropped_query_says_nothing_of_the_link():
    link = LinkEstimator()
    link.sent(1, 8000, 0.0)
    before = link.transit_ms(8000)
    link.dropped(1)
    assert link.pending == 0 and link.transit_ms(8000) == before


def test_before_the_first_answer_it_believes_what_it_is_told():
    link = LinkEstimator(initial_bandwidth_kbps=1000.0, initial_rtt_ms=100.0)
    assert link.predict_ms(10_000, 0.0) == link.transit_ms(10_000) == 180.0 and link.cloud_ms == 0.0


def test_unknown_queries_change_nothing():
    link = LinkEstimator()
    link.sent(1, 8000, 0.0)
    before = (link.rtt_ms, link.bits_per_ms, link.predict_ms(8000, 5.0))
    assert link.answered(77, 10.0, 1.0) == 0.0
    link.lost(78, 10.0)
    link.dropped(79)
    assert (link.rtt_ms, link.bits_per_ms, link.predict_ms(8000, 5.0)) == before and link.pending == 1


def test_clocks_that_disagree_leave_it_finite():
    """A cloud that claims to have spent more than the whole query took."""
    link = LinkEstimator()
    for query in range(5):
        link.sent(query, 8000, query * 10.0)
        assert link.answered(query, query * 10.0 + 5, 50.0) == pytest.approx(0.01)
    assert 0 <= link.rtt_ms < 1 and 0 < link.predict_ms(8000, 60.0) < 60
