"""Where answers go: a file of JSON Lines, an MQTT broker (extra `mqtt`), or several sinks at once."""

from __future__ import annotations

import json
import logging
import os
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit

from ..models.errors import ConfigError, MissingExtraError, StoreError, disk_reason
from .records import Answer, Sink

if TYPE_CHECKING:
    from paho.mqtt.client import Client

log = logging.getLogger("edgefm.edge.sinks")

_PORTS = {"mqtt": 1883, "mqtts": 8883}
_AT_LEAST_ONCE = 1
_LONGEST_RECORD = 65_536  # bytes; most have some 600
MQTT_QUEUE = 1000
"""Answers kept in memory while the broker is away, at most; some 600 bytes each."""


def fan_out(*sinks: Sink) -> Sink:
    """Each answer to every sink, in their order."""

    def sink(answer: Answer) -> None:
        for one in sinks:
            one(answer)

    return sink


class JsonLines:
    """A sink that appends each answer to a file as one JSON object a line, flushed at once.

    The part of a record that a kill or a full disk has left at the file's end is cut off first.

    Raises:
        StoreError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():  # no pipe, no device
                _mend_end(path)
            self._file = path.open("ab")
        except OSError as error:
            raise StoreError(f"cannot write answers to {path}: {disk_reason(error)}") from error

    def __call__(self, answer: Answer) -> None:
        try:
            self._file.write(answer.to_json() + b"\n")
            self._file.flush()
        except OSError as error:
            raise StoreError(f"cannot write answers to {self._path}: {disk_reason(error)}") from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # what could not be written before
            raise StoreError(f"cannot write answers to {self._path}: {disk_reason(error)}") from error


def _mend_end(path: Path) -> None:
    """Ends the last line of a file where it lacks its end; cuts it off where it is the beginning of a record."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _LONGEST_RECORD, 0))
        last = file.read().rpartition(b"\n")[2]
        if not last:
            return
        try:
            json.loads(last)
        except ValueError:
            if last.startswith(b"{"):
                log.warning("event=torn_answer_removed file=%s bytes=%d", path, len(last))
                file.truncate(size - len(last))
                return
        file.write(b"\n")


class Mqtt:
    """A sink that publishes each answer as JSON, at least once (QoS 1), and never waits for the broker.

    A thread connects, again and again while the broker is away; meanwhile answers wait in memory, and past `queue` of
    them the new ones are dropped and counted.

    Args:
        url: `mqtt://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC`, `mqtts://` for TLS (verified with the system's certificates,
            or those of `SSL_CERT_FILE`). User and password may come from `EDGEFM_MQTT_USER` and
            `EDGEFM_MQTT_PASSWORD` instead.

    Attributes:
        published: acknowledged by the broker.
        dropped: refused by the full queue.

    Raises:
        ConfigError: the URL is of another form.
        MissingExtraError: paho-mqtt is not installed.
    """

    def __init__(self, url: str, queue: int = MQTT_QUEUE) -> None:
        parts, port = _checked(url)
        client, self._queue_full = _client()
        self._client = client
        self._topic = unquote(parts.path[1:])
        self._broker = f"{parts.hostname}:{port}"
        self.published = 0
        self.dropped = 0
        self._accepted = 0
        self._away = False
        self._acknowledged = threading.Condition()
        client.max_queued_messages_set(queue)
        client.reconnect_delay_set(1, 30)
        if parts.scheme == "mqtts":
            client.tls_set_context(ssl.create_default_context())
        user = unquote(parts.username or "") or os.environ.get("EDGEFM_MQTT_USER")
        if user:
            client.username_pw_set(user, unquote(parts.password or "") or os.environ.get("EDGEFM_MQTT_PASSWORD"))
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_connect_fail, client.on_publish = self._on_connect_fail, self._on_publish
        client.connect_async(parts.hostname or "", port)
        client.loop_start()

    def __call__(self, answer: Answer) -> None:
        info = self._client.publish(self._topic, answer.to_json(), _AT_LEAST_ONCE)
        if info.rc == self._queue_full:
            self.dropped += 1
        else:
            self._accepted += 1

    def close(self, patience_s: float = 5.0) -> None:
        """Waits so long, at most, until the broker has acknowledged what is queued; the rest is lost and counted."""
        with self._acknowledged:
            self._acknowledged.wait_for(lambda: self.unsent == 0, patience_s)
        self._client.disconnect()
        stopping = threading.Thread(target=self._client.loop_stop, name="mqtt-close", daemon=True)
        stopping.start()
        stopping.join(patience_s)  # longer where the network swallows the farewell
        if self.unsent or self.dropped:
            log.warning("event=mqtt_lost_answers dropped=%d unsent=%d", self.dropped, self.unsent)

    @property
    def unsent(self) -> int:
        """Queued, and not acknowledged yet."""
        return self._accepted - self.published

    def counts(self) -> dict[str, int]:
        return {"mqtt_published": self.published, "mqtt_dropped": self.dropped, "mqtt_unsent": self.unsent}

    # ---- on paho's thread

    def _on_publish(self, *_: Any) -> None:
        with self._acknowledged:
            self.published += 1
            self._acknowledged.notify_all()

    def _on_connect(self, client: Client, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._say_away("mqtt_refused", str(reason))
        else:
            self._away = False
            log.info("event=mqtt_connected broker=%s", self._broker)

    def _on_disconnect(self, client: Client, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._say_away("mqtt_lost", str(reason))

    def _on_connect_fail(self, *_: Any) -> None:
        self._say_away("mqtt_unreachable", "no connection")

    def _say_away(self, event: str, reason: str) -> None:
        """Once an outage, not at every attempt."""
        if not self._away:
            self._away = True
            log.warning("event=%s broker=%s reason=%s", event, self._broker, reason)


def _client() -> tuple[Client, int]:
    """A client, and the code with which it refuses a message when its queue is full."""
    try:
        from paho.mqtt import enums
        from paho.mqtt.client import Client
    except ImportError as error:
        raise MissingExtraError("MQTT needs paho-mqtt: pip install 'edgefm[mqtt]'") from error
    return Client(enums.CallbackAPIVersion.VERSION2), enums.MQTTErrorCode.MQTT_ERR_QUEUE_SIZE


def _checked(url: str) -> tuple[SplitResult, int]:
    """The parts and the port. The message repeats no part of the URL that could be a password."""
    form = "an MQTT sink is mqtt://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC, or mqtts:// for TLS"
    try:
        parts = urlsplit(url)
    except ValueError:  # an address in brackets that is none
        raise ConfigError(f"{form}; the host is not an address") from None
    if parts.scheme not in _PORTS:
        raise ConfigError(f"{form}; the scheme is {parts.scheme!r}")
    topic = unquote(parts.path[1:])
    if any(sign in url for sign in "?#") or any(sign in topic for sign in "+#\0"):
        raise ConfigError(f"{form}; a topic to publish to has no wildcard (+, #), and ? and # are written %3F and %23")
    try:
        port = parts.port or _PORTS[parts.scheme]
    except ValueError:
        raise ConfigError(f"{form}; the port is not a number up to 65535") from None
    if not parts.hostname or not topic:
        raise ConfigError(f"{form}; the {'topic' if parts.hostname else 'host'} is missing")
    return parts, port
