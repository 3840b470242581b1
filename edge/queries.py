"""Questions to the FM: one stream, one deadline each, and a circuit breaker that says when to ask."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from ..models.errors import CloudError, DeadlineError
from ..models.pool import MAX_LABEL_LENGTH, UNKNOWN
from ..proto.v1 import edgefm_pb2 as pb
from .circuit import Backoff, CircuitBreaker
from .connection import Connection, bounded_pushback_s, translate

_LARGEST_COSINE = 1.001  # rounded
_LEAST_HOLD_S = 0.1  # an overloaded cloud that gives no time is not asked again at once


@dataclass(frozen=True)
class StudentAnswer:
    """What the student said of a sample, for the cloud to compare with the FM; `propensity` of asking about such a one."""

    label: str
    margin: float
    student_version: int
    pool_version: str
    propensity: float


@dataclass(frozen=True)
class CloudAnswer:
    """What the FM said of one sample, and what it took in the cloud."""

    labels: tuple[str, ...]
    similarities: tuple[float, ...]
    unknown: bool
    margin: float
    queue_ms: float
    compute_ms: float
    pool_version: str
    samples_labelled: int
    edge_similarity: float | None = None  # the FM's, of the student's label

    @property
    def label(self) -> str:
        """The best one, or `UNKNOWN`."""
        return UNKNOWN if self.unknown else self.labels[0]

    @property
    def similarity(self) -> float:
        """Of the best label."""
        return self.similarities[0]


Completion = Callable[["CloudAnswer | CloudError"], None]


class Queries:
    """Queries share one bidirectional stream, opened by the first and again after it broke.

    Args:
        deadline_s: of each query.
    """

    def __init__(self, connection: Connection, device_id: str, environment: str, deadline_s: float) -> None:
        self._connection = connection
        self._device_id = device_id
        self._environment = environment
        self._deadline_s = deadline_s
        self._ids = itertools.count(1)
        self._lock = threading.Condition()
        self._pending: dict[int, tuple[float, Completion]] = {}  # in order of their deadlines: all have the same
        self._requests: queue.SimpleQueue[pb.RecognizeRequest | None] | None = None
        self._circuit = CircuitBreaker(Backoff(device_id))
        self._closed = False
        self._watchdog = threading.Thread(target=self._expire, name="query-deadlines", daemon=True)
        self._watchdog.start()

    def close(self) -> None:
        """No deadline is watched any more; what is under way ends with the connection."""
        with self._lock:
            self._closed = True
            if self._requests is not None:
                self._requests.put(None)
            self._lock.notify_all()
        self._watchdog.join()

    @property
    def available(self) -> bool:
        """False in the pause after a broken stream, while a probe is out, and as long as an overloaded cloud has asked."""
        with self._lock:
            return self._circuit.allows(time.monotonic())

    def ask(
        self, image: bytes, propensity: float, done: Completion, keep: bool = True, edge: StudentAnswer | None = None
    ) -> int:
        """Asks the FM; `done` is called once, from another thread, with the answer or a `CloudError`. Returns the id."""
        query_id = next(self._ids)
        request = pb.RecognizeRequest(
            query_id=query_id,
            environment=self._environment,
            image=image,
            deadline_ms=round(self._deadline_s * 1e3),
            keep=keep,
            propensity=propensity,
            device_id=self._device_id,
        )
        if edge is not None:
            request.edge_label, request.edge_margin = edge.label, edge.margin
            request.student_version, request.edge_pool_version = edge.student_version, edge.pool_version
            request.query_propensity = edge.propensity
        with self._lock:
            if self._requests is None:
                self._open_stream()
            assert self._requests is not None
            now_s = time.monotonic()
            self._circuit.began(now_s)
            self._pending[query_id] = (now_s + self._deadline_s, done)
            self._requests.put(request)
            self._lock.notify_all()
        return query_id

    def _open_stream(self) -> None:
        requests: queue.SimpleQueue[pb.RecognizeRequest | None] = queue.SimpleQueue()
        call = self._connection.call(lambda stub: stub.Recognize(iter(requests.get, None)))
        self._requests = requests
        threading.Thread(target=self._receive, args=(call, requests), name="answers", daemon=True).start()

    def _receive(
        self, call: Iterator[pb.RecognizeResponse], requests: queue.SimpleQueue[pb.RecognizeRequest | None]
    ) -> None:
        error = CloudError("recognition: the cloud ended the stream")
        try:
            for response in call:
                self._connection.heard()
                self._judge(response.error)
                self._complete(response.query_id, self._answer(response))
        except grpc.RpcError as broken:
            error = translate(broken, "recognition")
            self._connection.judge(broken)
        requests.put(None)  # grpc's sender waits there
        with self._lock:
            self._requests = None
            self._circuit.failed(time.monotonic())
            lost = list(self._pending)
        for query_id in lost:
            self._complete(query_id, error)

    def _answer(self, response: pb.RecognizeResponse) -> CloudAnswer | CloudError:
        if response.HasField("error"):
            kind = DeadlineError if response.error.code == pb.QueryError.CODE_DEADLINE else CloudError
            return kind(response.error.message)
        answer = CloudAnswer(
            labels=tuple(match.label for match in response.matches),
            similarities=tuple(match.similarity for match in response.matches),
            unknown=response.unknown,
            margin=response.margin,
            queue_ms=response.queue_ms,
            compute_ms=response.compute_ms,
            pool_version=response.pool_version,
            samples_labelled=response.samples_labelled,
            edge_similarity=response.edge_similarity if response.HasField("edge_similarity") else None,
        )
        wrong = _impossible(answer, self._deadline_s * 1e3)
        return CloudError(f"recognition: the cloud's answer makes no sense: {wrong}") if wrong else answer

    def _judge(self, error: pb.QueryError) -> None:
        """What an answer says of the cloud's health; an answer without error has an empty one."""
        with self._lock:
            now_s = time.monotonic()
            if error.code == pb.QueryError.CODE_INTERNAL:
                self._circuit.failed(now_s)
                return
            self._circuit.succeeded()
            if error.code == pb.QueryError.CODE_OVERLOADED:
                self._circuit.hold(now_s + max(bounded_pushback_s(error.retry_after_ms), _LEAST_HOLD_S))

    def _complete(self, query_id: int, result: CloudAnswer | CloudError) -> None:
        with self._lock:
            _, done = self._pending.pop(query_id, (0.0, None))
        if done is not None:
            done(result)

    def _expire(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                first = next(iter(self._pending.items()), None)
                left = first[1][0] - time.monotonic() if first else None
                if left is None or left > 0:
                    self._lock.wait(left)
                    continue
                query_id = first[0] if first else 0
                self._circuit.timed_out(time.monotonic())
            self._connection.failed()
            self._complete(query_id, DeadlineError(f"no answer within {self._deadline_s * 1e3:.0f} ms"))


def _impossible(answer: CloudAnswer, deadline_ms: float) -> str:
    """What no cloud can mean, for what is believed steers the switcher and the link estimate; empty when there is none."""
    cosines = [*answer.similarities, *(() if answer.edge_similarity is None else (answer.edge_similarity,))]
    if not answer.labels or any(not 0 < len(label) <= MAX_LABEL_LENGTH for label in answer.labels):
        return f"labels {answer.labels[:1]!r:.80}"
    if not all(abs(cosine) <= _LARGEST_COSINE for cosine in cosines):  # nor is nan
        return f"similarities {cosines[:5]}"
    if not (math.isfinite(answer.margin) and abs(answer.margin) <= 2 * _LARGEST_COSINE):
        return f"a margin of {answer.margin}"
    if not (answer.queue_ms >= 0 <= answer.compute_ms and answer.queue_ms + answer.compute_ms <= deadline_ms):
        return f"{answer.queue_ms} ms in the queue and {answer.compute_ms} ms computed, asked less than {deadline_ms} ms ago"
    return ""
