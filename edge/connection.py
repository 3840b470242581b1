"""A gRPC channel that is made anew when the old one is of no more use, and gRPC's errors in words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from ..models.errors import CloudError, DeadlineError
from ..proto.limits import CHANNEL_OPTIONS, PUSHBACK_KEY
from ..proto.v1 import edgefm_pb2_grpc as rpc

T = TypeVar("T")

LONGEST_PUSHBACK_S = 600.0
"""A cloud that asks for more is asked again all the same: what it says may be damaged."""

_OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)


def translate(error: grpc.RpcError | grpc.FutureCancelledError, what: str) -> CloudError:
    """A grpc error as one sentence."""
    code = error.code() if isinstance(error, grpc.Call) else None
    details = (error.details() if isinstance(error, grpc.Call) else None) or str(error) or "cancelled"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"{what}: the cloud did not answer in time")
    if code == grpc.StatusCode.UNAVAILABLE:
        return CloudError(f"{what}: the cloud cannot be reached ({details})")
    return CloudError(f"{what}: {details}" + (f" [{code.name}]" if code else ""))


def pushback_s(call: grpc.Call) -> float | None:
    """The server's hint of when to come again; None when it gives none."""
    hints = [str(value) for key, value in call.trailing_metadata() or () if key == PUSHBACK_KEY]
    return bounded_pushback_s(float(hints[0])) if hints and hints[0].isdecimal() else None


def bounded_pushback_s(asked_ms: float) -> float:
    return min(asked_ms / 1e3, LONGEST_PUSHBACK_S)


class Connection:
    """One channel, rebuilt after repeated failures with nothing heard in between.

    gRPC reconnects by itself when a connection is refused or reset. A connection that died without a word (a new address
    of the device, a lost NAT entry) hangs until the kernel gives up, many minutes later; a new channel does not.

    Args:
        target: host:port.
        failures: in a row, before the channel is rebuilt.
        silent_s: that these failures must have lasted: an outage of a mobile link is shorter, and the bytes on their way
            are worth keeping then.

    Attributes:
        rebuilt: how often that has happened.
    """

    def __init__(self, target: str, failures: int = 3, silent_s: float = 5.0) -> None:
        self._target = target
        self._enough = failures
        self._silent_s = silent_s
        self._lock = threading.Lock()
        self._failures = 0
        self._failing_since_s = 0.0
        self._closed = False
        self.rebuilt = 0
        self._open()

    def _open(self) -> None:
        self._channel = grpc.insecure_channel(self._target, options=[*CHANNEL_OPTIONS, _OWN_CONNECTION])
        self._stub = rpc.EdgeFMStub(self._channel)

    def call(self, start: Callable[[rpc.EdgeFMStub], T]) -> T:
        """What `start` returns for the present stub; it must not block. Raises `CloudError` after `close`."""
        with self._lock:  # so that the channel is not closed in between
            if self._closed:
                raise CloudError("the connection to the cloud is closed")
            return start(self._stub)

    def heard(self) -> None:
        """Something came from the other side."""
        self._failures = 0

    def failed(self) -> None:
        """A call could not reach the other side or met its deadline."""
        with self._lock:
            now_s = time.monotonic()
            if self._failures == 0:
                self._failing_since_s = now_s
            self._failures += 1
            if self._closed or self._failures < self._enough or now_s - self._failing_since_s < self._silent_s:
                return
            old, self._failures = self._channel, 0
            self.rebuilt += 1
            self._open()
        old.close()  # ends what still waits on it

    def judge(self, error: grpc.RpcError) -> None:
        """Takes a call's end in: unreachable counts as a failure, any word of the other side as heard."""
        code = error.code() if isinstance(error, grpc.Call) else None
        if (
            isinstance(error, grpc.Call) and pushback_s(error) is not None
        ):  # only a server writes that, whatever the code
            self.heard()
        elif code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            self.failed()
        elif code is not None and code != grpc.StatusCode.CANCELLED:
            self.heard()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._channel.close()
