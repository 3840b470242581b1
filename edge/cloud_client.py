"""The device's end of the contract. grpc's errors end here: outside there are `CloudError` and results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
from pydantic import ValidationError

from ..models.errors import CloudError, InputError, ModelError
from ..models.versions import BlobRef, StudentManifest
from ..proto.limits import PROTOCOL_VERSION
from ..proto.v1 import edgefm_pb2 as pb
from ..proto.v1 import edgefm_pb2_grpc as rpc
from .connection import Connection, bounded_pushback_s, pushback_s, translate
from .queries import Completion, Queries, StudentAnswer
from .refusals import Refusal

C = TypeVar("C", bound=grpc.RpcContext)
_REPORT_TIMEOUT_S = 10.0
_NO_WORD = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""How a call ends that the other side has said nothing to."""
_NOT_FOR_GOOD = (pb.QueryError.CODE_UNKNOWN_ENVIRONMENT, pb.QueryError.CODE_OVERLOADED, pb.QueryError.CODE_INTERNAL)
"""What may be otherwise later: a cloud that has lost its data learns of the environment again when a device registers."""


@dataclass(frozen=True)
class Registration:
    """What the cloud wants the device to run."""

    student: StudentManifest
    pool: BlobRef
    foundation_model: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class UploadResult:
    """How a batch fared.

    Attributes:
        done: positions of the samples that the cloud keeps or has refused for good.
        retry_after_s: how long it wants to be left alone; 0: it does not say.
    """

    done: tuple[int, ...]
    retry_after_s: float = 0.0


class _Calls:
    """Calls under way that can be ended all at once, and for good."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: set[grpc.RpcContext] = set()
        self._ended = False

    @contextmanager
    def begin(self, connection: Connection, start: Callable[[rpc.EdgeFMStub], C]) -> Iterator[C]:
        """A call that `end` ends, and that is over with its block. Raises `CloudError` after `end`."""
        with self._lock:
            if self._ended:
                raise CloudError("the device is stopping")
            call = connection.call(start)
            self._under_way.add(call)
        try:
            yield call
        finally:
            with self._lock:
                self._under_way.discard(call)
            call.cancel()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            calls = list(self._under_way)
        for call in calls:
            call.cancel()


class CloudClient:
    """One device's calls: registration, recognition, upload, watching, fetching and reports.

    Bulk transfers take a connection of their own, so that a model on its way down does not stand in front of an answer.

    Args:
        target: host:port.
        deadline_ms: of each query.
    """

    def __init__(self, target: str, device_id: str, environment: str, deadline_ms: float) -> None:
        self._device_id = device_id
        self._environment = environment
        self._main = Connection(target)
        self._bulk = Connection(target)
        self._queries = Queries(self._main, device_id, environment, deadline_ms / 1e3)
        self._lasting = _Calls()
        self._uploads = _Calls()

    def close(self) -> None:
        self.interrupt()
        self.stop_uploads()
        self._queries.close()
        self._main.close()
        self._bulk.close()

    def interrupt(self) -> None:
        """Ends registering, watching and fetching with `CloudError`, now and later; queries and uploads go on."""
        self._lasting.end()

    def stop_uploads(self) -> None:
        """Ends uploading with `CloudError`, now and later."""
        self._uploads.end()

    @property
    def available(self) -> bool:
        """False in the pause after a broken stream, while a probe is out, and as long as an overloaded cloud has asked."""
        return self._queries.available

    def query(
        self, image: bytes, propensity: float, done: Completion, keep: bool = True, edge: StudentAnswer | None = None
    ) -> int:
        """Asks the FM; `done` is called once, from another thread, with the answer or a `CloudError`. Returns the id."""
        return self._queries.ask(image, propensity, done, keep, edge)

    def register(
        self, labels: Sequence[str], student_profile: str, timeout_s: float, patience_s: float = 0.0
    ) -> Registration:
        """Introduces the device. Raises `CloudError`, or `InputError` when the cloud refuses a name, label or profile.

        Args:
            timeout_s: for the cloud to answer.
            patience_s: beyond that, where the cloud has said a word within `timeout_s`: it may have to export a student.
        """
        request = pb.RegisterRequest(
            protocol=PROTOCOL_VERSION,
            device_id=self._device_id,
            environment=self._environment,
            labels=labels,
            student_profile=student_profile,
        )

        def start(stub: rpc.EdgeFMStub) -> grpc.CallFuture[pb.RegisterResponse]:
            # A cloud that has been heard and is gone is not waited for.
            return stub.Register.future(request, timeout=timeout_s + patience_s, wait_for_ready=not patience_s)

        try:
            if patience_s:
                self._hear(timeout_s)
            with self._lasting.begin(self._main, start) as call:
                response = call.result()
        except grpc.FutureCancelledError as error:  # interrupted, or the channel was rebuilt
            raise translate(error, "registration") from error
        except grpc.RpcError as error:
            self._main.judge(error)
            if isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                raise InputError(f"registration: {error.details()}") from error
            raise translate(error, "registration") from error
        self._main.heard()
        try:
            manifest, pool = StudentManifest.from_json(response.student.manifest_json), _blob(response.pool.file)
        except ModelError as error:
            raise CloudError(f"registration: the cloud's answer makes no sense: {error}") from error
        return Registration(manifest, pool, response.foundation_model, tuple(response.warnings))

    def _hear(self, timeout_s: float) -> None:
        """Waits for a word of the cloud, be it an error. Raises grpc's errors where none comes."""
        nothing = pb.ReportRequest(device_id=self._device_id, environment=self._environment)

        def start(stub: rpc.EdgeFMStub) -> grpc.CallFuture[pb.ReportResponse]:
            return stub.Report.future(nothing, timeout=timeout_s, wait_for_ready=True)

        with self._lasting.begin(self._main, start) as call:
            if call.code() in _NO_WORD:
                call.result()
        self._main.heard()

    def upload(
        self, samples: Iterable[tuple[bytes, float]], timeout_s: float, wait_for_ready: bool = False
    ) -> UploadResult:
        """Hands over (image, propensity) pairs, taken one by one as the link takes them. Raises `CloudError`.

        Args:
            wait_for_ready: wait for the connection as long as the time allows; otherwise a cloud that cannot be
                reached now is an error at once.
        """
        requests = (
            pb.UploadRequest(
                upload_id=i, environment=self._environment, image=image, propensity=p, device_id=self._device_id
            )
            for i, (image, p) in enumerate(samples)
        )

        def start(stub: rpc.EdgeFMStub) -> grpc.CallFuture[pb.UploadResponse]:
            return stub.Upload.future(requests, timeout=timeout_s, wait_for_ready=wait_for_ready)

        try:
            with self._uploads.begin(self._bulk, start) as call:
                response = call.result()
        except grpc.RpcError as error:
            self._bulk.judge(error)
            asked_s = pushback_s(error) if isinstance(error, grpc.Call) else None
            exhausted = isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            if asked_s is not None or exhausted:
                return UploadResult((), asked_s or 0.0)
            raise translate(error, "upload") from error
        except grpc.FutureCancelledError as error:  # stopped, or the channel was rebuilt or closed
            raise translate(error, "upload") from error
        self._bulk.heard()
        return UploadResult(
            tuple(a.upload_id for a in response.acks if not (a.HasField("error") and a.error.code in _NOT_FOR_GOOD)),
            max(
                (bounded_pushback_s(a.error.retry_after_ms) for a in response.acks if a.HasField("error")), default=0.0
            ),
        )

    def report(self, refusals: Sequence[Refusal], done: Callable[[], None]) -> None:
        """Tells the cloud of versions that this device does not run; `done` is called when it has heard of them."""
        request = pb.ReportRequest(
            device_id=self._device_id, environment=self._environment, refusals=[_refusal(r) for r in refusals]
        )
        call = self._main.call(lambda stub: stub.Report.future(request, timeout=_REPORT_TIMEOUT_S))

        def ended(ended_call: grpc.CallFuture[pb.ReportResponse]) -> None:
            if ended_call.code() == grpc.StatusCode.OK:
                done()

        call.add_done_callback(ended)  # pyright: ignore[reportArgumentType]

    def watch(self) -> Iterator[StudentManifest | BlobRef]:
        """Yields the running student (a manifest) and pool (a blob), then each change. Raises `CloudError`."""
        request = pb.WatchRequest(device_id=self._device_id, environment=self._environment)
        try:
            with self._lasting.begin(self._main, lambda stub: stub.Watch(request)) as call:
                for event in call:
                    self._main.heard()
                    if event.WhichOneof("change") == "student":
                        yield StudentManifest.from_json(event.student.manifest_json)
                    else:
                        yield _blob(event.pool.file)
        except grpc.RpcError as error:
            self._main.judge(error)
            raise translate(error, "watching for versions") from error

    def fetch(self, sha256: str, offset: int, stall_timeout_s: float) -> Iterator[bytes]:
        """The blob's bytes from `offset` on. Raises `CloudError` when the link stalls for `stall_timeout_s`."""
        request = pb.FetchRequest(sha256=sha256, offset_bytes=offset)
        stalled = threading.Event()
        with self._lasting.begin(self._bulk, lambda stub: stub.Fetch(request)) as call:

            def stall() -> None:
                stalled.set()
                call.cancel()

            timer = threading.Timer(stall_timeout_s, stall)
            timer.start()
            try:
                for chunk in call:
                    timer.cancel()
                    self._bulk.heard()
                    if not chunk.data:  # it could go on like that for ever
                        raise CloudError("download: the cloud sent an empty piece")
                    yield chunk.data
                    timer = threading.Timer(stall_timeout_s, stall)
                    timer.start()
            except grpc.RpcError as error:
                if stalled.is_set():
                    self._bulk.failed()
                    raise CloudError(f"download: nothing came for {stall_timeout_s:.0f} s") from error
                self._bulk.judge(error)
                raise translate(error, "download") from error
            finally:
                timer.cancel()


def _refusal(refusal: Refusal) -> pb.Refusal:
    message = pb.Refusal(kind=pb.Refusal.Kind.Value(f"KIND_{refusal.kind}"), reason=refusal.reason)
    if refusal.student_version is not None:
        message.student_version = refusal.student_version
    else:
        message.pool_version = refusal.pool_version or ""
    return message


def _blob(message: pb.Blob) -> BlobRef:
    try:
        return BlobRef(name=message.name, sha256=message.sha256, size_bytes=message.size_bytes)
    except ValidationError as error:
        raise ModelError(f"the cloud names a file that cannot be one: {message.name[:100]!r}") from error
