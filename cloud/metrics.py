"""Prometheus metrics of the cloud. What happens is counted when it happens; what is, is read when it is scraped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..proto.v1 import edgefm_pb2 as pb
from .environments import Environments
from .health import HealthWatch
from .recognition import FmBatcher

if TYPE_CHECKING:
    from .language.engine import LanguageEngine

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ANSWER_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class CloudMetrics:
    """One registry of its own, so that several clouds fit into one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "edgefm_cloud_requests", "Queries answered, by outcome.", ["outcome"], registry=self.registry
        )
        self._queue_s = Histogram(
            "edgefm_cloud_queue_seconds", "Time a query waited for the FM.", buckets=_SECONDS, registry=self.registry
        )
        self._batch_s = Histogram(
            "edgefm_cloud_batch_seconds", "Time the FM took for a batch.", buckets=_SECONDS, registry=self.registry
        )
        self._batch_size = Histogram(
            "edgefm_cloud_batch_size", "Samples the FM saw at once.", buckets=_SIZES, registry=self.registry
        )
        self._refusals = Counter(
            "edgefm_cloud_refusals", "Versions that devices refused.", ["kind"], registry=self.registry
        )
        self._by_code = {0: self._requests.labels(outcome="ok")} | {
            code: self._requests.labels(outcome=name.removeprefix("CODE_").lower())
            for name, code in pb.QueryError.Code.items()
            if code
        }

    def answered(self, response: pb.RecognizeResponse) -> None:
        self._by_code[response.error.code].inc()
        if not response.HasField("error"):
            self._queue_s.observe(response.queue_ms / 1e3)

    def batch_computed(self, size: int, seconds: float) -> None:
        self._batch_size.observe(size)
        self._batch_s.observe(seconds)

    def refused(self, kind: str) -> None:
        self._refusals.labels(kind=kind.removeprefix("KIND_").lower()).inc()

    def watch_language(self, engine: LanguageEngine) -> None:
        """Counts the language model's answers, and adds what is read at each scrape."""
        engine.observer = _Answers(self.registry)
        self.registry.register(_Language(engine))

    def watch(self, environments: Environments, batcher: FmBatcher, health: HealthWatch) -> None:
        """Adds what is read at each scrape."""
        self.registry.register(_State(environments, batcher, health))


class _Answers:
    """An `Observer` of the language model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "edgefm_cloud_language_answer_seconds",
            "Time from a request to the end of its answer.",
            ["kind"],
            buckets=_ANSWER_SECONDS,
            registry=registry,
        )
        self._tokens = Counter("edgefm_cloud_language_tokens", "Tokens answered.", ["kind"], registry=registry)
        self._longer = Counter(
            "edgefm_cloud_language_longer", "Answers longer than predicted.", ["kind"], registry=registry
        )

    def answered(self, kind: str, tokens: int, predicted: int, seconds: float) -> None:
        self._seconds.labels(kind=kind).observe(seconds)
        self._tokens.labels(kind=kind).inc(tokens)
        self._longer.labels(kind=kind).inc(tokens > predicted)


class _Language:
    def __init__(self, engine: LanguageEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        for name, text, value in (
            ("queue_length", "Requests that wait for a place.", engine.waiting),
            ("running", "Answers in the making.", engine.running),
            ("cache_blocks", "Blocks of keys and values in use.", engine.blocks_used),
            ("healthy", "1 unless the latest step failed.", engine.failure is None),
        ):
            yield GaugeMetricFamily(f"edgefm_cloud_language_{name}", text, value)
        yield CounterMetricFamily(
            "edgefm_cloud_language_preempted", "Answers that waited again for cache.", engine.preempted
        )


class _State:
    def __init__(self, environments: Environments, batcher: FmBatcher, health: HealthWatch) -> None:
        self._environments = environments
        self._batcher = batcher
        self._health = health

    def collect(self) -> Iterator[Metric]:
        environments = self._environments
        queue = GaugeMetricFamily("edgefm_cloud_queue_length", "Samples that wait for the FM.", labels=["lane"])
        for lane, waiting in zip(("live", "bulk"), self._batcher.waiting, strict=True):
            queue.add_metric([lane], waiting)
        healthy = GaugeMetricFamily("edgefm_cloud_healthy", "1 while the part works.", labels=["part"])
        for part in ("fm", "store"):
            healthy.add_metric([part], part not in self._health.unhealthy)
        yield queue
        yield healthy
        stored = GaugeMetricFamily("edgefm_cloud_samples_stored", "Samples in the store.", labels=["environment"])
        size = GaugeMetricFamily("edgefm_cloud_stored_bytes", "Images and embeddings.", labels=["environment"])
        for name, usage in environments.store.usage.items():
            stored.add_metric([name], usage.samples)
            size.add_metric([name], usage.size_bytes)
        yield stored
        yield size
        version = GaugeMetricFamily("edgefm_cloud_student_version", "Current version.", labels=["environment"])
        agreement = GaugeMetricFamily(
            "edgefm_cloud_student_agreement_ratio",
            "Share of the latest samples on which student and FM agree, inverse-propensity weighted.",
            labels=["environment"],
        )
        raised = GaugeMetricFamily("edgefm_cloud_drift_raised", "Drift alarms raised now.", labels=["environment"])
        for name in environments.names():
            version.add_metric([name], environments.student(name).version)
            raised.add_metric([name], len(environments.drift.alarms(name)))
            known = environments.drift.agreement(name)
            if known is not None:
                agreement.add_metric([name], known.share)
        yield version
        yield agreement
        yield raised
        alarms = CounterMetricFamily(
            "edgefm_cloud_drift_alarms", "Drift alarms since the start.", labels=["environment", "kind"]
        )
        for (name, kind), count in list(environments.drift.raised.items()):
            alarms.add_metric([name, kind], count)
        yield alarms
        yield _counts("edgefm_cloud_samples", "Samples to keep, by outcome.", environments.keeper.outcomes)
        yield _counts(
            "edgefm_cloud_versions_published", "Customization runs, by outcome.", environments.trainer.outcomes
        )
        yield CounterMetricFamily(
            "edgefm_cloud_samples_evicted", "Samples removed for the quota.", environments.store.evicted
        )


def _counts(name: str, documentation: str, outcomes: dict[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=["outcome"])
    for outcome, count in list(outcomes.items()):
        family.add_metric([outcome], count)
    return family
