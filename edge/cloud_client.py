"""The device's end of the contract. grpc's errors end here: outside there are `CloudError` and results."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc
from pydantic import ValidationError

from ..models.errors import CloudError, DeadlineError, InputError, ModelError
from ..models.versions import BlobRef, StudentManifest
from ..proto.limits import CHANNEL_OPTIONS, PROTOCOL_VERSION
from ..proto.v1 import edgefm_pb2 as pb
from ..proto.v1 import edgefm_pb2_grpc as rpc

_BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Registration:
    """What the cloud wants the device to run."""

    student: StudentManifest
    pool: BlobRef
    foundation_model: str
    warnings: tuple[str, ...]


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


Completion = Callable[["CloudAnswer | CloudError"], None]


def translate(error: grpc.RpcError, what: str) -> CloudError:
    """A grpc error as one sentence."""
    code = error.code() if isinstance(error, grpc.Call) else None
    details = (error.details() if isinstance(error, grpc.Call) else None) or str(error)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"{what}: the cloud did not answer in time")
    if code == grpc.StatusCode.UNAVAILABLE:
        return CloudError(f"{what}: the cloud cannot be reached ({details})")
    return CloudError(f"{what}: {details}" + (f" [{code.name}]" if code else ""))


class CloudClient:
    """One device's calls: registration, recognition, upload, watching and fetching.

    Queries share one bidirectional stream, opened by the first query and again after it broke; between two attempts
    lies a growing pause in which `available` is false. Bulk transfers take a connection of their own, so that a model on
    its way down does not stand in front of an answer.

    Args:
        target: host:port.
        deadline_ms: of each query.
    """

    def __init__(self, target: str, device_id: str, environment: str, deadline_ms: float) -> None:
        self._device_id = device_id
        self._environment = environment
        self._deadline_s = deadline_ms / 1e3
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        own_connection = ("grpc.use_local_subchannel_pool", 1)
        self._bulk_channel = grpc.insecure_channel(target, options=[*CHANNEL_OPTIONS, own_connection])
        self._stub = rpc.EdgeFMStub(self._channel)
        self._bulk = rpc.EdgeFMStub(self._bulk_channel)
        self._ids = itertools.count(1)
        self._lock = threading.Condition()
        self._pending: dict[int, tuple[float, Completion]] = {}  # in order of their deadlines: all have the same
        self._requests: queue.SimpleQueue[pb.RecognizeRequest | None] | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._closed = False
        self._watchdog = threading.Thread(target=self._expire, name="query-deadlines", daemon=True)
        self._watchdog.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._requests is not None:
                self._requests.put(None)
            self._lock.notify_all()
        self._watchdog.join()
        self._channel.close()
        self._bulk_channel.close()

    # ---- recognition

    @property
    def available(self) -> bool:
        """False in the pause after a broken stream."""
        return self._failures == 0 or time.monotonic() >= self._retry_at

    def query(self, image: bytes, propensity: float, done: Completion, keep: bool = True) -> int:
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
        with self._lock:
            if self._requests is None:
                self._open_stream()
            assert self._requests is not None
            self._pending[query_id] = (time.monotonic() + self._deadline_s, done)
            self._requests.put(request)
            self._lock.notify_all()
        return query_id

    def _open_stream(self) -> None:
        requests: queue.SimpleQueue[pb.RecognizeRequest | None] = queue.SimpleQueue()
        self._requests = requests
        call = self._stub.Recognize(iter(requests.get, None))
        threading.Thread(target=self._receive, args=(call, requests), name="answers", daemon=True).start()

    def _receive(
        self, call: Iterator[pb.RecognizeResponse], requests: queue.SimpleQueue[pb.RecognizeRequest | None]
    ) -> None:
        error = CloudError("recognition: the cloud ended the stream")
        try:
            for response in call:
                self._failures = 0
                self._complete(response.query_id, _answer(response))
        except grpc.RpcError as broken:
            error = translate(broken, "recognition")
        requests.put(None)  # grpc's sender waits there
        with self._lock:
            self._requests = None
            self._retry_at = time.monotonic() + _BACKOFF_S[min(self._failures, len(_BACKOFF_S) - 1)]
            self._failures += 1
            lost = list(self._pending)
        for query_id in lost:
            self._complete(query_id, error)

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
            self._complete(query_id, DeadlineError(f"no answer within {self._deadline_s * 1e3:.0f} ms"))

    # ---- everything else

    def register(self, labels: Sequence[str], student_profile: str, timeout_s: float) -> Registration:
        """Introduces the device. Raises `CloudError`, or `InputError` when the cloud refuses a name, label or profile."""
        request = pb.RegisterRequest(
            protocol=PROTOCOL_VERSION,
            device_id=self._device_id,
            environment=self._environment,
            labels=labels,
            student_profile=student_profile,
        )
        try:
            response = self._stub.Register(request, timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                raise InputError(f"registration: {error.details()}") from error
            raise translate(error, "registration") from error
        return Registration(
            StudentManifest.from_json(response.student.manifest_json),
            _blob(response.pool.file),
            response.foundation_model,
            tuple(response.warnings),
        )

    def upload(self, samples: Sequence[tuple[bytes, float]], timeout_s: float) -> list[int]:
        """Hands over (image, propensity) pairs; returns the positions the cloud is done with, kept or refused for good."""
        requests = (
            pb.UploadRequest(
                upload_id=i, environment=self._environment, image=image, propensity=p, device_id=self._device_id
            )
            for i, (image, p) in enumerate(samples)
        )
        try:
            response = self._bulk.Upload(requests, timeout=timeout_s)
        except grpc.RpcError as error:
            raise translate(error, "upload") from error
        return [ack.upload_id for ack in response.acks]

    def watch(self) -> Iterator[StudentManifest | BlobRef]:
        """Yields the running student (a manifest) and pool (a blob), then each change. Raises `CloudError`."""
        call = self._stub.Watch(pb.WatchRequest(device_id=self._device_id, environment=self._environment))
        try:
            for event in call:
                if event.WhichOneof("change") == "student":
                    yield StudentManifest.from_json(event.student.manifest_json)
                else:
                    yield _blob(event.pool.file)
        except grpc.RpcError as error:
            raise translate(error, "watching for versions") from error
        finally:
            call.cancel()

    def fetch(self, sha256: str, offset: int, stall_timeout_s: float) -> Iterator[bytes]:
        """The blob's bytes from `offset` on. Raises `CloudError` when the link stalls for `stall_timeout_s`."""
        call = self._bulk.Fetch(pb.FetchRequest(sha256=sha256, offset_bytes=offset))
        stalled = threading.Event()

        def stall() -> None:
            stalled.set()
            call.cancel()

        timer = threading.Timer(stall_timeout_s, stall)
        timer.start()
        try:
            for chunk in call:
                timer.cancel()
                yield chunk.data
                timer = threading.Timer(stall_timeout_s, stall)
                timer.start()
        except grpc.RpcError as error:
            if stalled.is_set():
                raise CloudError(f"download: nothing came for {stall_timeout_s:.0f} s") from error
            raise translate(error, "download") from error
        finally:
            timer.cancel()
            call.cancel()


def _answer(response: pb.RecognizeResponse) -> CloudAnswer | CloudError:
    if response.HasField("error"):
        kind = DeadlineError if response.error.code == pb.QueryError.CODE_DEADLINE else CloudError
        return kind(response.error.message)
    return CloudAnswer(
        labels=tuple(match.label for match in response.matches),
        similarities=tuple(match.similarity for match in response.matches),
        unknown=response.unknown,
        margin=response.margin,
        queue_ms=response.queue_ms,
        compute_ms=response.compute_ms,
        pool_version=response.pool_version,
        samples_labelled=response.samples_labelled,
    )


def _blob(message: pb.Blob) -> BlobRef:
    try:
        return BlobRef(name=message.name, sha256=message.sha256, size_bytes=message.size_bytes)
    except ValidationError as error:
        raise ModelError(f"the cloud names a file that cannot be one: {message.name[:100]!r}") from error
