from __future__ import annotations

import contextlib
import socket
import threading

import grpc
import pytest
from edgefm.edge.connection import Connection
from edgefm.models.errors import CloudError
from edgefm.proto.v1 import edgefm_pb2 as pb


class Lossy:
    """A TCP proxy whose present connections can be cut off without a word, as by a lost NAT entry; new ones work."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.accepted = 0
        self._dead = threading.Event()
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._dead.set()
        self._dead = threading.Event()

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the threads
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here = self._listener.accept()[0]
                self.accepted += 1
                there = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [here, there]
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=self._carry, args=(one, other, self._dead), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, dead: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not dead.is_set():
                    target.sendall(data)


def ask(connection: Connection) -> bool:
    """One short call, judged; True when the other side answered."""
    call = connection.call(lambda stub: stub.Report.future(pb.ReportRequest(), timeout=0.2))
    try:
        call.result()
    except grpc.RpcError as error:
        connection.judge(error)
        return False
    connection.heard()
    return True


@pytest.fixture
def connect():
    connections = []

    def make(port: int, **settings) -> Connection:
        connections.append(Connection(f"127.0.0.1:{port}", **settings))
        return connections[-1]

    yield make
    for connection in connections:
        connection.close()


def test_a_connection_that_died_without_a_word_is_made_anew(scripted, connect, until):
    link = Lossy(scripted.port)
    connection = connect(link.port, failures=3, silent_s=0.3)
    until(lambda: ask(connection))
    link.cut()
    assert not ask(connection) and not ask(connection)
    until(lambda: ask(connection))
    assert connection.rebuilt == 1 and link.accepted == 2
    link.close()


def test_failures_are_counted_in_a_row_and_over_time(scripted, connect):
    connection = connect(scripted.port, failures=3, silent_s=1000.0)
    for _ in range(10):
        connection.failed()
    assert connection.rebuilt == 0  # too short: an outage of a mobile link
    patient = connect(scripted.port, failures=3, silent_s=0.0)
    for _ in range(10):
        patient.failed()
        patient.failed()
        patient.heard()
    assert patient.rebuilt == 0


def test_a_refusal_is_a_word_of_the_other_side(scripted, connect, until):
    connection = connect(scripted.port, failures=2, silent_s=0.0)
    until(lambda: ask(connection))
    for _ in range(5):
        call = connection.call(lambda stub: stub.Rollback.future(pb.RollbackRequest(), timeout=5.0))
        with pytest.raises(grpc.RpcError) as refused:  # this server has no such call
            call.result()
        connection.judge(refused.value)
    assert connection.rebuilt == 0


def test_a_server_that_comes_back_is_found_again(scripted, connect, until):
    connection = connect(scripted.port, failures=3, silent_s=0.0)
    until(lambda: ask(connection))
    scripted.stop()
    until(lambda: connection.rebuilt >= 1 or ask(connection))
    scripted.start()
    until(lambda: ask(connection))


def test_rebuilding_ends_what_waits_on_the_old_channel(unused_port, connect):
    connection = connect(unused_port, failures=1, silent_s=0.0)
    waiting = connection.call(lambda stub: stub.Report.future(pb.ReportRequest(), timeout=60, wait_for_ready=True))
    connection.failed()
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
        waiting.result(10)


def test_nothing_begins_on_a_closed_connection(scripted, connect):
    connection = connect(scripted.port)
    connection.close()
    connection.close()
    with pytest.raises(CloudError, match="closed"):
        connection.call(lambda stub: stub.Report)
    for _ in range(10):
        connection.failed()
    assert connection.rebuilt == 0
