"""The agent: frame -> student -> margin -> switcher -> answer, with the cloud behind it.

One thread takes frames and never waits for the network; answers from the cloud arrive on the client's threads. Both
sides meet in the router and the sink, which one lock guards.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from ..models.errors import CloudError, DeadlineError, ImageError, ModelError
from ..proto.limits import MAX_IMAGE_BYTES
from .cloud_client import CloudClient
from .config import AgentConfig
from .frames import Frame, Unreadable
from .grading import grade
from .local_state import LocalState, StateLock, own_device_id
from .queries import CloudAnswer, StudentAnswer
from .records import Answer, Route, Sink
from .router import Router
from .spool import DAY_S, Spool
from .swap_test import RecentAnswers
from .switcher import Decision
from .updater import Running, Updater
from .uploader import Uploader

log = logging.getLogger("edgefm.edge.agent")
_UPLOAD_PATIENCE_S = 10.0


def _now_ms() -> float:
    return time.perf_counter() * 1e3


@dataclass
class Summary:
    """What a run did. Every frame is answered or counted as unreadable.

    Attributes:
        uploads_dropped: samples that found no room in the spool or that the disk did not take.
        uploads_expired: samples that waited longer than the retention.
        uploads_left: samples that wait for the next run.
        refused: versions and pools that are not run here, with the reason.
    """

    frames: int = 0
    edge: int = 0
    cloud: int = 0
    fallback: int = 0
    unreadable: int = 0
    unreadable_by_reason: dict[str, int] = field(default_factory=dict)
    swaps: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    uploads_dropped: int = 0
    uploads_expired: int = 0
    uploads_left: int = 0
    refused: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class _Local:
    """A frame with what the student said of it."""

    frame: Frame
    running: Running
    embedding: np.ndarray  # (D,)
    started_ms: float
    label: str
    similarity: float
    margin: float
    decode_ms: float
    preprocess_ms: float
    student_ms: float


class Agent:
    """One device. `run` answers a stream; `close` lets go of the cloud.

    Raises (from the constructor):
        CloudError: the cloud refuses or cannot be reached, and the device has nothing to start from.
        ModelError, StoreError: the state folder is damaged, cannot be written, or is in use by another process.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._state_lock = StateLock(config.state_dir)
        try:
            config = replace(config, device_id=config.device_id or own_device_id(config.state_dir))
        except BaseException:
            self._state_lock.release()
            raise
        self._config = config
        self._client = CloudClient(config.cloud, config.device_id, config.environment, config.deadline_ms)
        self._recent = RecentAnswers()
        try:
            state = LocalState(config.state_dir, config.environment)
            self._updater = Updater(self._client, state, config, self._recent)
            self._running = self._updater.begin()
        except BaseException:
            self._client.close()
            self._state_lock.release()
            raise
        self._spool = Spool(config.state_dir, config.spool_bytes, config.retention_days * DAY_S)
        self._uploader = Uploader(
            self._client, self._spool, config.environment, config.device_id, config.upload_bytes_per_day
        )
        self._router = Router(config.switcher, config.deadline_ms, config.max_pending)
        self._router.model_changed(self._running.calibration)
        self._lock = threading.Lock()
        self._answer_came = threading.Condition(self._lock)
        self._stop = threading.Event()
        self._samples_labelled = 0
        self._sink_error: Exception | None = None
        self._began_ms = _now_ms()
        self.summary = Summary()
        self._updater.start()

    def close(self) -> None:
        self._updater.close()
        self._uploader.close(_UPLOAD_PATIENCE_S)
        self.current_summary()
        self.summary.bytes_sent += self._uploader.sent_bytes
        self._spool.close()
        self._client.close()
        self._state_lock.release()

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def current_summary(self) -> Summary:
        """`summary`, with what spool and updater have counted by now; from any thread, until `close`."""
        self.summary.uploads_left = self._spool.count(self._config.environment)
        self.summary.uploads_dropped = self._spool.dropped
        self.summary.uploads_expired = self._spool.expired
        self.summary.bytes_received = self._updater.received_bytes
        self.summary.refused = list(self._updater.refused)
        return self.summary

    def stop(self) -> None:
        """Ends `run`, from another thread, once the frame under way is answered; a source that waits must be closed."""
        self._stop.set()

    def run(self, source: Iterable[Frame | Unreadable], sink: Sink) -> Summary:
        """Answers every frame of the source; `sink` gets one `Answer` each, in order of completion.

        An error of the source or the sink ends the run with it, after all that was asked has been answered.
        """
        try:
            for frame in self._paced(source):
                self._swap_if_ready()
                self._handle(frame, sink)
                if self._sink_error is not None:
                    raise self._sink_error
        finally:
            self._wait_for_answers(0)
        if self._sink_error is not None:
            raise self._sink_error
        return self.summary

    def _paced(self, source: Iterable[Frame | Unreadable]) -> Iterator[Frame | Unreadable]:
        """Waits before it takes a frame, not after: a camera's frame would be old by then."""
        frames, next_ms = iter(source), _now_ms()
        while True:
            if self._config.fps:
                self._stop.wait(max(next_ms - _now_ms(), 0.0) / 1e3)
                next_ms = max(next_ms, _now_ms() - 1e3 / self._config.fps) + 1e3 / self._config.fps
            else:
                self._wait_for_answers(self._config.max_pending - 1)
            if self._stop.is_set() or (frame := next(frames, None)) is None:
                return
            yield frame

    def _wait_for_answers(self, pending: int) -> None:
        """Until at most so many queries are under way."""
        with self._answer_came:
            # The client's deadline answers whatever is still out; the second is slack for its thread.
            self._answer_came.wait_for(
                lambda: self._router.link.pending <= pending, self._config.deadline_ms / 1e3 + 1.0
            )

    # ---- swapping

    def _swap_if_ready(self) -> None:
        ready = self._updater.take()
        if ready is not None:
            self._swap(ready)

    def _swap(self, ready: Running) -> None:
        before, self._running = self._running, ready
        new_student = ready.student is not before.student
        manifest = ready.student.manifest
        with self._lock:
            self._router.model_changed(ready.calibration)
            self.summary.swaps += new_student
        log.info(
            "event=swapped student=%d pool=%s labels=%d", manifest.version, ready.pool.version, len(ready.pool.labels)
        )

    # ---- one frame

    def _handle(self, frame: Frame | Unreadable, sink: Sink) -> None:
        self.summary.frames += 1
        if isinstance(frame, Unreadable):
            self._count_unreadable(frame)
            return
        try:
            local = self._answer_locally(frame)
        except ImageError as error:
            self._count_unreadable(Unreadable(frame.sample_id, error.reason, str(error)))
            return
        with self._lock:
            now_ms = _now_ms()
            edge_ms = now_ms - local.started_ms
            decision = self._router.decide(local.margin, edge_ms, now_ms, self._client.available)
            if not decision.to_cloud:
                route: Route = "fallback" if decision.reason == "link" else "edge"
                self._emit(local, decision, sink, route, decision.reason)
        if decision.to_cloud:
            self._ask(local, decision, sink)
        elif decision.reason == "link" or self._config.upload == "all":
            self._keep_for_upload(local, decision)

    def _count_unreadable(self, sample: Unreadable) -> None:
        self.summary.unreadable += 1
        by_reason = self.summary.unreadable_by_reason
        by_reason[sample.reason] = by_reason.get(sample.reason, 0) + 1
        log.warning("event=unreadable sample=%s reason=%s detail=%s", sample.sample_id, sample.reason, sample.detail)

    def _answer_locally(self, frame: Frame) -> _Local:
        running = self._running
        started = _now_ms()
        image = frame.image
        decoded = _now_ms()
        batch = running.student.preprocess(image)
        preprocessed = _now_ms()
        try:
            embedding, label, similarity, margin = running.student.recognise(batch, running.pool)
        except ModelError as error:
            self._swap(self._updater.fall_back(running, error))
            return self._answer_locally(frame)
        return _Local(
            frame=frame,
            running=running,
            embedding=embedding,
            started_ms=started,
            label=label,
            similarity=similarity,
            margin=margin,
            decode_ms=decoded - started,
            preprocess_ms=preprocessed - decoded,
            student_ms=_now_ms() - preprocessed,
        )

    def _ask(self, local: _Local, decision: Decision, sink: Sink) -> None:
        image = local.frame.encoded
        size = len(image)
        if size > MAX_IMAGE_BYTES:
            with self._lock:
                self._emit(local, decision, sink, "fallback", "too-large")
            return

        running = local.running
        version, pool = running.student.manifest.version, running.pool.version
        said = StudentAnswer(local.label, local.margin, version, pool, decision.propensity)

        def done(result: CloudAnswer | CloudError) -> None:
            with self._answer_came:
                if isinstance(result, CloudAnswer):
                    self._answered(query_id, local, decision, sink, result, size)
                else:
                    late = isinstance(result, DeadlineError)
                    self._router.failed(query_id, _now_ms(), late)
                    reason = "deadline" if late else "cloud-error"
                    self._emit(local, decision, sink, "fallback", reason, bytes_sent=size)
                self._answer_came.notify_all()
            if isinstance(result, CloudError):
                self._keep_for_upload(local, decision)
            else:
                self._recent.add(image, local.frame.image, result.label, result.pool_version)

        with self._lock:  # `done` waits here until the router knows of the query
            query_id = self._client.query(image, self._propensity(decision), done, edge=said)
            self._router.asked(query_id, size, _now_ms())
            self.summary.bytes_sent += size

    def _answered(
        self, query_id: int, local: _Local, decision: Decision, sink: Sink, answer: CloudAnswer, size: int
    ) -> None:
        transit_ms = self._router.answered(query_id, _now_ms(), answer.queue_ms + answer.compute_ms)
        self._samples_labelled = max(self._samples_labelled, answer.samples_labelled)
        pool = local.running.pool
        same_pool = answer.pool_version == pool.version and set(answer.labels) <= set(pool.labels)
        if local.running is self._running and same_pool:
            agreement = grade(answer, local.label, local.embedding, pool, local.running.confidence)
            self._router.learn(local.margin, agreement, decision.propensity)
        self._emit(local, decision, sink, "cloud", decision.reason, size, answer, transit_ms)

    def _keep_for_upload(self, local: _Local, decision: Decision) -> None:
        if self._config.upload != "never" and len(local.frame.encoded) <= MAX_IMAGE_BYTES:
            self._uploader.add(local.frame.encoded, local.margin, self._propensity(decision))

    def _propensity(self, decision: Decision) -> float:
        """Of the sample reaching the cloud at all: under `all` every one does, by query or by upload."""
        return 1.0 if self._config.upload == "all" else decision.propensity

    def _emit(
        self,
        local: _Local,
        decision: Decision,
        sink: Sink,
        route: Route,
        reason: str,
        bytes_sent: int = 0,
        cloud: CloudAnswer | None = None,
        transit_ms: float = 0.0,
    ) -> None:
        now = _now_ms()
        said = cloud or local
        answer = Answer(
            sample_id=local.frame.sample_id,
            environment=self._config.environment,
            label=said.label,
            similarity=said.similarity,
            margin=said.margin,
            route=route,
            reason=reason,
            edge_label=local.label,
            edge_margin=local.margin,
            threshold=decision.threshold,
            decode_ms=local.decode_ms,
            preprocess_ms=local.preprocess_ms,
            student_ms=local.student_ms,
            transit_ms=transit_ms,
            queue_ms=cloud.queue_ms if cloud else 0.0,
            compute_ms=cloud.compute_ms if cloud else 0.0,
            total_ms=now - local.started_ms,
            predicted_ms=decision.predicted_ms,
            bytes_sent=bytes_sent,
            student_version=local.running.student.manifest.version,
            pool_version=local.running.pool.version,
            bandwidth_mbps=self._router.link.bandwidth_mbps,
            time_s=(now - self._began_ms) / 1e3,
            samples_labelled=self._samples_labelled,
        )
        setattr(self.summary, route, getattr(self.summary, route) + 1)
        try:
            sink(answer)
        except Exception as error:  # a full disk: the run ends with it, in the run's own thread
            self._sink_error = error
