"""Prometheus metrics of a device: an observer of its answers, and its summary as it is at each scrape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..models.errors import ConfigError
from .records import Answer, Sink

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_COUNTS = {
    "frames": "Frames taken from the source.",
    "unreadable": "Frames that could not be decoded.",
    "swaps": "Students swapped in.",
    "uploads_dropped": "Samples that found no room in the spool.",
}


class HasSummary(Protocol):
    """What `edgefm.edge.agent.Summary` has."""

    def as_dict(self) -> dict[str, Any]: ...


class AgentMetrics:
    """`summary` is asked at each scrape, from another thread."""

    def __init__(self, summary: Callable[[], HasSummary]) -> None:
        self.registry = CollectorRegistry()
        self._answers = Counter(
            "edgefm_agent_answers", "Answers, by route and reason.", ["route", "reason"], registry=self.registry
        )
        self._answer_s = Histogram(
            "edgefm_agent_answer_seconds",
            "From the frame's arrival to its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._sent = Counter("edgefm_agent_query_bytes", "Images sent as queries.", registry=self.registry)
        self._threshold = Gauge(
            "edgefm_agent_threshold",
            "Margin from which the edge answers; NaN while there is none.",
            registry=self.registry,
        )
        self._bandwidth = Gauge(
            "edgefm_agent_bandwidth_bits_per_second", "As estimated from the queries.", registry=self.registry
        )
        self._version = Gauge("edgefm_agent_student_version", "Of the latest answer.", registry=self.registry)
        self.registry.register(_Summary(summary))

    def observe(self, sink: Sink) -> Sink:
        """A sink that counts each answer and hands it on."""

        def observed(answer: Answer) -> None:
            self._answers.labels(route=answer.route, reason=answer.reason).inc()
            self._answer_s.labels(route=answer.route).observe(answer.total_ms / 1e3)
            self._sent.inc(answer.bytes_sent)
            self._threshold.set(math.nan if answer.threshold is None else answer.threshold)
            self._bandwidth.set(answer.bandwidth_mbps * 1e6)
            self._version.set(answer.student_version)
            sink(answer)

        return observed

    @contextmanager
    def serve(self, host: str, port: int) -> Iterator[int]:
        """Serves /metrics while it is entered; gives the port. Raises `ConfigError` when the address is taken or none."""
        try:
            server, thread = start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as error:  # the latter for a port above 65535
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"cannot serve metrics on {host}:{port}: {reason}") from error
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Summary:
    def __init__(self, summary: Callable[[], HasSummary]) -> None:
        self._summary = summary

    def collect(self) -> Iterator[Metric]:
        values = self._summary().as_dict()
        for name, documentation in _COUNTS.items():
            yield CounterMetricFamily(f"edgefm_agent_{name}", documentation, values[name])
        yield CounterMetricFamily("edgefm_agent_refused", "Versions and pools refused.", len(values["refused"]))
        yield GaugeMetricFamily("edgefm_agent_spool_samples", "Samples that wait for upload.", values["uploads_left"])
