"""Sinks on a real disk and against a real MQTT broker."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from edgefm.edge.records import Answer
from edgefm.edge.sinks import JsonLines, Mqtt, fan_out
from edgefm.models.errors import ConfigError, StoreError
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion
from pwdlib import PasswordHash

TOPIC = "yard/répondu"


def _answers(answer: Answer, count: int, start: int = 0) -> list[Answer]:
    return [replace(answer, sample_id=str(number)) for number in range(start, start + count)]


# ---- JSON Lines


def test_lines_are_there_at_once_and_appended(tmp_path, answer):
    path = tmp_path / "new" / "answers.jsonl"
    for number in range(2):
        sink = JsonLines(path)
        sink(replace(answer, sample_id=str(number)))
        assert [json.loads(line)["sample_id"] for line in path.read_text("utf-8").splitlines()] == ["0", "1"][
            : number + 1
        ]
        sink.close()


@pytest.mark.parametrize("torn", [1, 100, -2])
def test_the_part_of_a_record_that_a_kill_left_is_cut_off(tmp_path, answer, torn, caplog):
    path, whole = tmp_path / "answers.jsonl", answer.to_json()
    path.write_bytes(whole + b"\n" + whole[:torn])
    sink = JsonLines(path)
    sink(answer)
    sink.close()
    assert path.read_bytes() == 2 * (whole + b"\n") and "event=torn_answer_removed" in caplog.text


@pytest.mark.parametrize("last", ['{"a": 1}', "a note of somebody's"])
def test_a_last_line_that_is_no_torn_record_stays(tmp_path, answer, last):
    path = tmp_path / "answers.jsonl"
    path.write_text(last)
    sink = JsonLines(path)
    sink(answer)
    sink.close()
    assert path.read_bytes() == last.encode() + b"\n" + answer.to_json() + b"\n"


def test_a_folder_in_the_way(tmp_path):
    with pytest.raises(StoreError, match=f"cannot write answers to {tmp_path}: Is a directory"):
        JsonLines(tmp_path)


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write answers to"):
        JsonLines(tmp_path / "file" / "answers.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(answer):
    sink = JsonLines(Path("/dev/full"))
    with pytest.raises(StoreError, match="No space left"):
        sink(answer)
    with pytest.raises(StoreError, match="No space left"):
        sink.close()


def test_any_callable_is_a_sink_and_several_get_each_answer_in_turn(tmp_path, answer):
    file, seen = JsonLines(tmp_path / "answers.jsonl"), []
    sink = fan_out(file, seen.append)
    for one in _answers(answer, 3):
        sink(one)
    file.close()
    assert seen == _answers(answer, 3)
    assert (tmp_path / "answers.jsonl").read_bytes().splitlines() == [one.to_json() for one in seen]


# ---- MQTT


@pytest.fixture
def broker(make_broker):
    broker = make_broker()
    broker.start()
    return broker


@pytest.fixture
def subscribe(until) -> Iterator[Callable[..., list[MQTTMessage]]]:
    """Another client of the broker, which gets everything."""
    clients: list[Client] = []

    def start(broker) -> list[MQTTMessage]:
        received: list[MQTTMessage] = []
        subscribed = threading.Event()
        client = Client(CallbackAPIVersion.VERSION2)
        client.on_message = lambda client, data, message: received.append(message)
        client.on_subscribe = lambda *_: subscribed.set()
        client.connect("127.0.0.1", broker.port)
        client.loop_start()
        client.subscribe("#", qos=1)
        assert subscribed.wait(10)
        clients.append(client)
        return received

    yield start
    for client in clients:
        client.disconnect()
        client.loop_stop()


def test_answers_arrive_as_json_at_least_once(broker, subscribe, answer, until):
    received = subscribe(broker)
    sink = Mqtt(f"mqtt://127.0.0.1:{broker.port}/{quote(TOPIC)}")
    for one in _answers(answer, 50):
        sink(one)
    sink.close()
    assert sink.counts() == {"mqtt_published": 50, "mqtt_dropped": 0, "mqtt_unsent": 0}
    until(lambda: len(received) >= 50)
    assert {(message.topic, message.qos, message.retain) for message in received} == {(TOPIC, 1, False)}
    assert [message.payload for message in received] == [one.to_json() for one in _answers(answer, 50)]


def test_while_the_broker_is_away_answers_wait_up_to_a_bound(make_broker, subscribe, answer, until, caplog):
    broker = make_broker()  # not started
    sink = Mqtt(f"mqtt://127.0.0.1:{broker.port}/yard", queue=5)
    for one in _answers(answer, 8):
        sink(one)
    assert sink.counts() == {"mqtt_published": 0, "mqtt_dropped": 3, "mqtt_unsent": 5}
    until(lambda: "event=mqtt_unreachable" in caplog.text)
    broker.start()
    until(lambda: sink.unsent == 0)
    broker.stop()
    until(lambda: "event=mqtt_lost" in caplog.text)
    for one in _answers(answer, 2, 8):
        sink(one)
    assert sink.unsent == 2
    broker.start()
    sink.close(patience_s=30)
    assert sink.counts() == {"mqtt_published": 7, "mqtt_dropped": 3, "mqtt_unsent": 0}
    assert caplog.text.count("event=mqtt_unreachable") == 1  # not one an attempt
    assert "event=mqtt_lost_answers dropped=3 unsent=0" in caplog.text


def test_a_broker_that_hangs_holds_up_neither_answers_nor_the_end(broker, answer, until):
    sink = Mqtt(f"mqtt://127.0.0.1:{broker.port}/yard")
    sink(answer)
    until(lambda: sink.unsent == 0)
    broker.signal(signal.SIGSTOP)
    for one in _answers(answer, 100):
        sink(one)
    sink.close(patience_s=0.2)
    assert sink.counts() == {"mqtt_published": 1, "mqtt_dropped": 0, "mqtt_unsent": 100}


def test_user_and_password(make_broker, tmp_path, answer, monkeypatch, caplog, until):
    (tmp_path / "passwords").write_text(f"me:{PasswordHash.recommended().hash('s:cr/t')}\n")
    broker = make_broker(passwords=str(tmp_path / "passwords"))
    broker.start()
    where = f"127.0.0.1:{broker.port}/yard"
    sink = Mqtt(f"mqtt://me:{quote('s:cr/t', safe='')}@{where}")
    sink(answer)
    sink.close(10)
    assert sink.unsent == 0
    monkeypatch.setenv("EDGEFM_MQTT_USER", "me")
    monkeypatch.setenv("EDGEFM_MQTT_PASSWORD", "s:cr/t")
    sink = Mqtt(f"mqtt://{where}")
    sink(answer)
    sink.close(10)
    assert sink.unsent == 0
    sink = Mqtt(f"mqtt://me:wrong@{where}")
    sink(answer)
    until(lambda: "event=mqtt_refused" in caplog.text)
    sink.close(0)
    assert sink.unsent == 1 and "wrong" not in caplog.text


@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")  # paho leaves a refused socket open
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_tls_with_a_certificate_that_is_trusted_and_one_that_is_not(
    make_broker, tmp_path, answer, monkeypatch, caplog, until
):
    certificate, key = tmp_path / "broker.pem", tmp_path / "broker.key"
    command = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 -subj /CN=broker"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    broker = make_broker(ssl=True, certfile=str(certificate), keyfile=str(key))
    broker.start()
    url = f"mqtts://127.0.0.1:{broker.port}/yard"
    sink = Mqtt(url)
    sink(answer)
    until(lambda: "event=mqtt_unreachable" in caplog.text)
    sink.close(0)
    assert sink.unsent == 1
    until(lambda: not any(thread.name.startswith("paho-mqtt") for thread in threading.enumerate()))
    del sink
    gc.collect()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    sink = Mqtt(url)
    sink(answer)
    sink.close(10)
    assert sink.unsent == 0


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("host:1883/yard", "the scheme is 'host'"),
        ("http://host/yard", "the scheme is 'http'"),
        ("mqtt://host", "the topic is missing"),
        ("mqtt://host:1883/", "the topic is missing"),
        ("mqtt:///yard", "the host is missing"),
        ("mqtt://me:secret@host/yard/#", "a topic to publish to has no wildcard"),
        ("mqtt://me:secret@host/yard/+/answers", "a topic to publish to has no wildcard"),
        ("mqtt://me:secret@host/yard?qos=2", "a topic to publish to has no wildcard"),
        ("mqtt://me:secret@host:99999/yard", "the port is not a number"),
        ("mqtt://me:secret/yard", "the port is not a number"),
    ],
)
def test_urls_of_another_form(url, says):
    with pytest.raises(ConfigError, match=says) as refused:
        Mqtt(url)
    assert "mqtt://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC" in str(refused.value) and "secret" not in str(refused.value)


def test_paho_is_not_loaded_before_it_is_wanted_and_missed_politely():
    script = """
import sys
from edgefm.edge.sinks import Mqtt
from edgefm.models.errors import MissingExtraError
assert not any(name.startswith("paho") for name in sys.modules)
sys.modules["paho"] = None
try:
    Mqtt("mqtt://host/yard")
except MissingExtraError as error:
    assert "pip install 'edgefm[mqtt]'" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
